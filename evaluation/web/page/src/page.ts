// The page: reads site.json, loads a model and runs the visitor's requests.
import { Client, type Done, Replaced } from "./client";
import { duration, find, make, megabytes } from "./dom";
import { type Form, formOf } from "./forms";
import { type Model, type Site, type Task, prune, readSite } from "./site";
import type { Loaded } from "./worker";

const status = find("status");
const progress = find<HTMLProgressElement>("progress");
const stop = find<HTMLButtonElement>("stop");
const client = new Client((done, all) => showProgress(done, all));
/** What progress counts: "byte" while a model is loaded, "part" while it runs. */
let unit = "";

function showStatus(message: string, state: "busy" | "ready" | "error"): void {
  status.textContent = message;
  document.body.dataset.state = state;
  progress.hidden = state !== "busy";
  stop.hidden = true;
}

function showProgress(done: number, all: number): void {
  if (document.body.dataset.state !== "busy") return;
  progress.max = all;
  progress.value = done;
  stop.hidden = unit !== "part" || all < 2;
  status.textContent = unit === "byte"
    ? `Loading ${megabytes(all)} to this device: ${Math.floor((100 * done) / all)} %`
    : `Reading part ${done + 1} of ${all.toLocaleString("en")} …`;
}

function showFigures(entries: Record<string, string>): void {
  const list = find("figures");
  for (const [name, value] of Object.entries(entries)) {
    const existing = [...list.children].find((item) => item.firstElementChild?.textContent === name);
    const item = make("div", {}, make("dt", {}, name), make("dd", {}, value));
    if (existing) existing.replaceWith(item);
    else list.append(item);
  }
}

async function load(site: Site, model: Model): Promise<void> {
  unit = "byte";
  showStatus(`Loading ${megabytes(model.graph.bytes)} …`, "busy");
  const startTime = performance.now();
  const processor = new URLSearchParams(location.search).get("processor");
  const { result: loaded } = await client.ask<Loaded>({ kind: "load", site, model, processor });
  document.body.dataset.processor = loaded.processor;
  showFigures({
    "Model": `${model.name}, ${megabytes(model.graph.bytes)}`,
    "Loaded in": duration(performance.now() - startTime),
    "Computed by": processorText(loaded),
    "An answer here takes": "–",
  });
  showStatus("Ready. Everything runs on this device.", "ready");
}

function processorText({ processor, problem }: Loaded): string {
  if (processor === "gpu") return "the graphics processor (WebGPU)";
  return `the processor (WebAssembly)${problem ? `, because the graphics processor failed: ${problem}` : ""}`;
}

async function run(form: Form, model: Model, result: HTMLElement): Promise<void> {
  unit = "part";
  showStatus("Working …", "busy");
  const done: Done<never> | string = await form.run(client, model, result);
  if (typeof done === "string") return showStatus(done, "ready");
  result.hidden = false;
  showFigures({ "An answer here takes": duration(done.milliseconds), "A window of text": duration(done.perRow) });
  showStatus(`Done in ${duration(done.milliseconds)} on this device.`, "ready");
  document.body.dataset.perRow = String(done.perRow); // for measurements
  document.body.dataset.answers = String(Number(document.body.dataset.answers ?? 0) + 1);
}

/** Runs `work` and shows its error, if any; a request that was replaced by a newer one shows nothing. */
async function showErrors(work: () => Promise<void>): Promise<void> {
  try {
    await work();
  } catch (error) {
    if (error instanceof Replaced) return;
    showStatus(error instanceof Error ? error.message : String(error), "error");
  }
}

function showTasks(site: Site, task: Task): void {
  const nav = find("tasks");
  nav.hidden = site.tasks.length < 2;
  nav.replaceChildren(...site.tasks.map((other) =>
    make("a", { href: `?task=${encodeURIComponent(other.name)}`, "aria-current": other === task ? "page" : false }, other.name),
  ));
}

function showModels(task: Task, chosen: Model, choose: (model: Model) => void): void {
  const group = find("models");
  group.hidden = task.models.length < 2;
  for (const model of task.models) {
    const input = make("input", { type: "radio", name: "model", value: model.role, checked: model === chosen });
    input.addEventListener("change", () => choose(model));
    const name = model.role[0]!.toUpperCase() + model.role.slice(1);
    group.append(make("label", {}, input, ` ${name} (${megabytes(model.graph.bytes)})`));
  }
}

function showForm(form: Form): HTMLFormElement {
  const element = find<HTMLFormElement>("form");
  element.replaceChildren(...form.fields, make("button", { type: "submit" }, form.button));
  element.hidden = false;
  find("title").textContent = form.title;
  document.title = form.title;
  return element;
}

async function open(site: Site, wanted: URLSearchParams): Promise<void> {
  const task = site.tasks.find(({ name }) => name === wanted.get("task")) ?? site.tasks[0]!;
  let model = task.models.find(({ role }) => role === wanted.get("model")) ?? task.models[0]!;
  const form = formOf(model);
  const result = find("result");
  const start = () => showErrors(() => run(form, model, result));
  showTasks(site, task);
  showModels(task, model, (other) => {
    model = other;
    const asked = !result.hidden;
    void showErrors(() => load(site, model)).then(() => (asked && document.body.dataset.state === "ready" ? start() : undefined));
  });
  showForm(form).addEventListener("submit", (event) => {
    event.preventDefault();
    void start();
  });
  stop.addEventListener("click", () => {
    void client.ask({ kind: "stop" });
    showStatus("Stopped.", "ready");
  });
  await load(site, model);
  if (wanted.has("selftest")) await check(result);
}

async function check(result: HTMLElement): Promise<void> {
  unit = "part";
  showStatus("Comparing with Python …", "busy");
  const done = await client.ask<never>({ kind: "selftest" });
  const { examples, differences } = done.result as { examples: number; differences: { example: number }[] };
  const wrong = new Set(differences.map(({ example }) => example)).size;
  result.replaceChildren(make("pre", { id: "report", tabindex: "0" }, JSON.stringify({ examples, differences }, null, 1)));
  result.hidden = false;
  showStatus(`${examples - wrong} of ${examples} examples are equal to Python's.`, wrong ? "error" : "ready");
}

void showErrors(async () => {
  if ("serviceWorker" in navigator) void navigator.serviceWorker.register("offline.js").catch(() => {});
  const site = await readSite();
  await prune(site).catch(() => {});
  await open(site, new URLSearchParams(location.search));
});
