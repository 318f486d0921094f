// A loaded model: rows to outputs, one row at a time.
import * as ort from "onnxruntime-web/wasm";
import { Splitter } from "./pieces";
import { type Model, type Progress, type Site, read, unpack } from "./site";
import type { Row } from "./windows";

export type Outputs = Record<string, { data: Float32Array; dims: readonly number[] }>;

/** Starts the runtime once. It uses one thread, so a static host needs no special headers. */
let started: Promise<void> | undefined;

function start(site: Site, progress: Progress): Promise<void> {
  started ??= read(site.runtime, progress).then(unpack).then((binary) => {
    ort.env.wasm.wasmBinary = binary;
    ort.env.wasm.numThreads = 1;
    ort.env.logLevel = "error";
  });
  return started;
}

export class Engine {
  /** Milliseconds of the model's last forwards. */
  readonly times: number[] = [];

  private constructor(
    readonly model: Model,
    readonly splitter: Splitter,
    private readonly session: ort.InferenceSession,
  ) {}

  /** Loads runtime, tokenizer and graph; `progress` is told bytes of all three together. */
  static async load(site: Site, model: Model, progress: Progress): Promise<Engine> {
    const files = [site.runtime, model.tokenizer, model.graph];
    const received = files.map(() => 0);
    const total = files.reduce((sum, file) => sum + file.bytes, 0);
    const tell = (place: number): Progress => (bytes) => {
      received[place] = bytes;
      progress(received.reduce((sum, count) => sum + count, 0), total);
    };
    const [, tokenizer, graph] = await Promise.all([
      start(site, tell(0)), read(model.tokenizer, tell(1)).then(unpack), read(model.graph, tell(2)),
    ]);
    const splitter = named(model.tokenizer.path, () => new Splitter(JSON.parse(new TextDecoder().decode(tokenizer))));
    const session = await ort.InferenceSession.create(new Uint8Array(graph), { executionProviders: ["wasm"] }).catch(
      (error) => {
        throw new Error(`${model.graph.path} cannot be used: ${firstLine(error)}`);
      },
    );
    return new Engine(model, splitter, session);
  }

  async run(row: Row): Promise<Outputs> {
    const columns: Record<string, number[]> = {
      input_ids: row.ids, token_type_ids: row.types, attention_mask: row.ids.map(() => 1),
    };
    const feeds: Record<string, ort.Tensor> = {};
    for (const name of this.model.inputs) {
      feeds[name] = new ort.Tensor("int64", BigInt64Array.from(columns[name]!, BigInt), [1, row.ids.length]);
    }
    const begun = performance.now();
    const outputs = await this.session.run(feeds);
    this.times.push(performance.now() - begun);
    return outputs as unknown as Outputs;
  }

  async release(): Promise<void> {
    await this.session.release();
  }
}

function named<T>(path: string, make: () => T): T {
  try {
    return make();
  } catch (error) {
    throw new Error(`${path} cannot be used: ${firstLine(error)}`);
  }
}

function firstLine(error: unknown): string {
  return String(error instanceof Error ? error.message : error).split("\n")[0]!.slice(0, 200);
}
