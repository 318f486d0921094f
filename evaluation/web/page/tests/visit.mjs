// Visits a served page in headless Chromium, runs one of the steps below and prints its findings as JSON.
// node tests/visit.mjs ADDRESS CHROMIUM STEP [QUERY]
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const [address, executablePath, step, query = ""] = process.argv.slice(2);
const graphics = query.includes("processor=gpu"); // emulated by Chromium's SwiftShader
const flags = graphics ? ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"] : [];
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", ...flags] });
const context = await browser.newContext({ viewport: { width: 1200, height: 900 } });
const page = await context.newPage();
const seen = { requests: [], errors: [] };
context.on("request", (request) => seen.requests.push(request.url()));
page.on("pageerror", (error) => seen.errors.push(String(error)));

const settled = (target = page) =>
  target.waitForFunction(() => ["ready", "error"].includes(document.body.dataset.state), null, { timeout: 600_000 });
const status = () => page.textContent("#status");
/** The processor that ran the model, whether the browser has a WebGPU adapter, and the figures below the result. */
const processor = () => page.evaluate(async () => ({
  processor: document.body.dataset.processor,
  adapter: Boolean(await navigator.gpu?.requestAdapter()),
  figures: [...document.querySelectorAll("dl div")].map((item) => item.innerText.replace("\n", ": ")),
}));
async function open(extra = query) {
  await page.goto(`${address}?${extra}`);
  await settled();
}
async function submit() {
  for (const field of await page.$$("form textarea")) if (!(await field.inputValue())) await field.fill("Two eggs.");
  const before = await page.evaluate(() => Number(document.body.dataset.answers ?? 0));
  await page.click("form button");
  await page.waitForFunction((count) => Number(document.body.dataset.answers) > count, before, { timeout: 600_000 });
  return page.textContent(".answer, #result h2");
}
/** Longest time, in milliseconds, in which the page's main thread was blocked while `work` ran. */
async function longestPause(work) {
  await page.evaluate(() => {
    window.pause = 0;
    let last = performance.now();
    window.beat = setInterval(() => {
      window.pause = Math.max(window.pause, performance.now() - last);
      last = performance.now();
    }, 10);
  });
  await work();
  return page.evaluate(() => new Promise((resolve) => setTimeout(() => resolve(window.pause), 50)));
}

const HOSTILE = {
  emoji: "👩‍👩‍👧 🚢 🏴‍☠️ ".repeat(200),
  rightToLeft: "\u202eبني البرج سنة 1874 שלום\u202c ".repeat(50),
  nul: "a\u0000b\ufffd\ud800 c".repeat(100),
  oneWord: "x".repeat(20_000),
  html: "<img src=x onerror=alert(1)> </textarea><script>alert(1)</script>",
};

const steps = {
  /** Compares the page with Python. */
  async selftest() {
    await page.goto(`${address}?selftest&${query}`);
    await page.waitForSelector("#report, [data-state=error]", { timeout: 900_000 });
    await settled();
    const report = await page.evaluate(() => document.getElementById("report")?.textContent ?? "null");
    return { status: await status(), report: JSON.parse(report), ...(await processor()) };
  },
  /** A first visit up to the first answer, and its times in milliseconds. */
  async first() {
    const begun = performance.now();
    await open();
    const loaded = performance.now() - begun;
    const answer = await submit();
    const total = performance.now() - begun;
    return { answer, loaded, total, status: await status(), ...(await processor()) };
  },
  /** Milliseconds per window for each question of a file; the file holds a list of [question, context]. */
  async latency() {
    await open("");
    const milliseconds = [];
    for (const [question, context] of JSON.parse(readFileSync(query, "utf8"))) {
      await page.fill("#context", context);
      await page.fill("#question", question);
      await submit();
      milliseconds.push(Number(await page.evaluate(() => document.body.dataset.perRow)));
    }
    return { milliseconds };
  },
  /** A second visit without a network gives the same answer. */
  async offline() {
    await open();
    const online = await submit();
    await page.waitForFunction(() => navigator.serviceWorker.ready.then((one) => one.active?.state === "activated"));
    await context.setOffline(true);
    await open();
    const offline = await submit();
    const refused = await page.evaluate(() => fetch("never-there").then(() => false, () => true));
    return { online, offline, refused };
  },
  /** Rules of axe-core that the page violates: before and after an answer, light and dark, narrow and wide. */
  async accessibility() {
    const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
    const violations = [];
    for (const colorScheme of ["light", "dark"]) {
      for (const width of [375, 1200]) {
        await page.emulateMedia({ colorScheme });
        await page.setViewportSize({ width, height: 800 });
        await open();
        for (const moment of ["before", "after"]) {
          if (moment === "after") await submit();
          await page.evaluate(axe);
          const found = await page.evaluate(() => window.axe.run(document));
          violations.push(...found.violations.map(({ id, nodes }) => `${colorScheme} ${width} ${moment}: ${id}: ${nodes[0].html}`));
        }
        const wide = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
        if (wide) violations.push(`${colorScheme} ${width}: wider than the screen`);
      }
    }
    return { violations };
  },
  /** Texts that break programs, for the first text field of the form. */
  async hostile() {
    await open();
    const found = {};
    for (const [name, text] of Object.entries(HOSTILE)) {
      await page.fill("form textarea", text);
      found[name] = { answer: await submit(), state: await page.evaluate(() => document.body.dataset.state) };
    }
    await page.fill("form textarea", "   ");
    await page.click("form button");
    found.empty = { answer: await status(), state: await page.evaluate(() => document.body.dataset.state) };
    return { found };
  },
  /** With a megabyte of text, the page stays responsive and the request can be stopped. */
  async large() {
    await open();
    const text = "The lighthouse on the northern cape was built by two sisters in 1874, they say. ".repeat(12_500);
    const longest = await longestPause(async () => {
      await page.evaluate((value) => {
        const field = document.querySelector("form textarea");
        field.value = value;
        field.dispatchEvent(new Event("input"));
      }, text);
      await page.click("form button");
      await page.waitForFunction(() => /part [2-9]/.test(document.getElementById("status").textContent), null, { timeout: 300_000 });
    });
    const during = await status();
    await page.click("#stop");
    await settled();
    return { longest, during, stopped: await status(), characters: text.length };
  },
  /** The page's message about a damaged folder. */
  async message() {
    await open();
    return { state: await page.evaluate(() => document.body.dataset.state), status: await status() };
  },
  /** Writes phone.png and desktop.png, at the widths of these screens, to the folder that the query names. */
  async screenshots() {
    for (const [name, width, height] of [["phone", 390, 844], ["desktop", 1200, 900]]) {
      await page.setViewportSize({ width, height });
      await open("");
      await submit();
      await page.screenshot({ path: `${query}/${name}.png`, fullPage: true });
    }
    return {};
  },
};
const found = await steps[step]();
const foreign = seen.requests.filter((url) => !url.startsWith(address));
const asked = seen.requests.map((url) => url.slice(address.length));
console.log(JSON.stringify({ ...found, errors: seen.errors, foreign, asked, requests: asked.length }));
await browser.close();
