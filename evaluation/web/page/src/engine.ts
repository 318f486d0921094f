// Loads a model and runs it on one row at a time.
import type * as Ort from "onnxruntime-web/wasm";
import { Splitter } from "./pieces";
import type { Processor } from "./processor";
import { type Model, type Progress, type Site, read, unpack } from "./site";
import type { Row } from "./windows";

export type Outputs = Record<string, { data: Float32Array; dims: readonly number[] }>;

/** Import of the runtime for each processor; only the one in use is fetched. */
const SCRIPTS: Record<Processor, () => Promise<typeof Ort>> = {
  cpu: () => import("onnxruntime-web/wasm"),
  gpu: () => import("onnxruntime-web/jspi"),
};
const PROVIDERS = { cpu: "wasm", gpu: "webgpu" };
const started: Partial<Record<Processor, Promise<typeof Ort>>> = {};

/** Starts the runtime at the first call. It has one thread, because more threads need special headers from the host. */
function start(site: Site, processor: Processor, progress: Progress): Promise<typeof Ort> {
  started[processor] ??= Promise.all([SCRIPTS[processor](), read(site.runtimes[processor], progress).then(unpack)]).then(
    ([ort, binary]) => {
      ort.env.wasm.wasmBinary = binary;
      ort.env.wasm.numThreads = 1;
      ort.env.logLevel = "error";
      return ort;
    },
  );
  return started[processor];
}

export class Engine {
  /** Milliseconds of each forward pass of the current request. */
  readonly times: number[] = [];

  private constructor(
    readonly model: Model,
    readonly processor: Processor,
    readonly splitter: Splitter,
    private readonly ort: typeof Ort,
    private readonly session: Ort.InferenceSession,
  ) {}

  /** Loads runtime, tokenizer and graph; `progress` gets the bytes received and the total of these three files. */
  static async load(site: Site, model: Model, processor: Processor, progress: Progress): Promise<Engine> {
    const files = [site.runtimes[processor], model.tokenizer, model.graph];
    const received = files.map(() => 0);
    const total = files.reduce((sum, file) => sum + file.bytes, 0);
    const progressOf = (file: number): Progress => (bytes) => {
      received[file] = bytes;
      progress(received.reduce((sum, count) => sum + count, 0), total);
    };
    const [ort, tokenizer, graph] = await Promise.all([
      start(site, processor, progressOf(0)), read(model.tokenizer, progressOf(1)).then(unpack), read(model.graph, progressOf(2)),
    ]);
    const splitter = naming(model.tokenizer.path, () => new Splitter(JSON.parse(new TextDecoder().decode(tokenizer))));
    const options = { executionProviders: [PROVIDERS[processor]] };
    const session = await ort.InferenceSession.create(new Uint8Array(graph), options).catch((error) => {
      throw new Error(`${model.graph.path} cannot be used: ${firstLine(error)}`);
    });
    return new Engine(model, processor, splitter, ort, session);
  }

  async run(row: Row): Promise<Outputs> {
    const columns: Record<string, number[]> = {
      input_ids: row.ids, token_type_ids: row.types, attention_mask: row.ids.map(() => 1),
    };
    const feeds: Record<string, Ort.Tensor> = {};
    for (const name of this.model.inputs) {
      feeds[name] = new this.ort.Tensor("int64", BigInt64Array.from(columns[name]!, BigInt), [1, row.ids.length]);
    }
    const startTime = performance.now();
    const outputs = await this.session.run(feeds);
    this.times.push(performance.now() - startTime);
    return outputs as unknown as Outputs;
  }

  async release(): Promise<void> {
    await this.session.release();
  }
}

function naming<T>(path: string, make: () => T): T {
  try {
    return make();
  } catch (error) {
    throw new Error(`${path} cannot be used: ${firstLine(error)}`);
  }
}

export function firstLine(error: unknown): string {
  return String(error instanceof Error ? error.message : error).split("\n")[0]!.slice(0, 200);
}
