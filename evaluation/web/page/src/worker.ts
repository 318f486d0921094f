// The web worker that runs the model. It serves one request at a time; a newer request stops the current one.
import { type Answers, type Scores, type Similarity, answer, compare, score } from "./answer";
import type { Engine } from "./engine";
import { type Processor, load } from "./processor";
import { type Difference, selftest } from "./selftest";
import type { Model, Site } from "./site";

export type Request =
  | { kind: "load"; id: number; site: Site; model: Model; processor: string | null }
  | { kind: "answer"; id: number; question: string; context: string }
  | { kind: "score"; id: number; first: string; second?: string }
  | { kind: "compare"; id: number; texts: string[] }
  | { kind: "selftest"; id: number }
  | { kind: "stop"; id: number };

export type Result = Answers | Scores | Similarity | Loaded | { examples: number; differences: Difference[] } | undefined;

export interface Loaded {
  processor: Processor;
  /** Why the graphics processor, which this device has, does not run the model. */
  problem?: string;
}

export type Reply =
  | { kind: "progress"; id: number; done: number; all: number }
  | { kind: "result"; id: number; result: Result; milliseconds: number; perRow: number }
  | { kind: "error"; id: number; message: string }
  | { kind: "stopped"; id: number };

class Stopped extends Error {}

let engine: Engine | undefined;
let newestId = 0;
let queue: Promise<void> = Promise.resolve();

const send = (reply: Reply) => postMessage(reply);

/** Returns a function that reports progress, lets messages arrive, and throws if one of them is a newer request. */
function progressReporter(id: number): (done: number, all: number) => Promise<void> {
  return async (done, all) => {
    send({ kind: "progress", id, done, all });
    const channel = new MessageChannel();
    await new Promise((resolve) => {
      channel.port1.onmessage = resolve;
      channel.port2.postMessage(0);
    });
    if (newestId !== id) throw new Stopped();
  };
}

async function loadModel({ id, site, model, processor }: Request & { kind: "load" }): Promise<Loaded> {
  await engine?.release();
  engine = undefined;
  const loaded = await load(site, model, processor, (done, all) => send({ kind: "progress", id, done, all }));
  engine = loaded.engine;
  return { processor: engine.processor, problem: loaded.problem };
}

async function compute(request: Request): Promise<Result> {
  if (request.kind === "load") return loadModel(request);
  if (request.kind === "stop") return undefined;
  if (!engine) throw new Error("no model is loaded");
  const reportProgress = progressReporter(request.id);
  if (request.kind === "answer") return answer(engine, request.question, request.context, reportProgress);
  if (request.kind === "score") return score(engine, request.first, request.second);
  if (request.kind === "compare") return compare(engine, request.texts, reportProgress);
  return selftest(engine, reportProgress);
}

async function respond(request: Request): Promise<void> {
  const startTime = performance.now();
  try {
    if (engine) engine.times.length = 0;
    const result = await compute(request);
    const times = engine?.times ?? [];
    const perRow = times.length ? times.toSorted((one, two) => one - two)[times.length >> 1]! : 0;
    send({ kind: "result", id: request.id, result, milliseconds: performance.now() - startTime, perRow });
  } catch (error) {
    if (error instanceof Stopped) send({ kind: "stopped", id: request.id });
    else send({ kind: "error", id: request.id, message: error instanceof Error ? error.message : String(error) });
  }
}

onmessage = ({ data }: MessageEvent<Request>) => {
  newestId = data.id;
  queue = queue.then(() => respond(data));
};
