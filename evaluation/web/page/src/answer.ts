// Computes what the page shows: answers from a text, scores of texts, similarity of sentences.
import type { Engine } from "./engine";
import { Search, type Span, softmax } from "./spans";
import { cutRow, shortened, windowCount, windows } from "./windows";

export interface Answers {
  answers: (Span & { probability: number })[];
  noAnswer: number;
  windows: number;
  ids: number[][];
}

export interface Scores {
  ids: number[];
  logits: number[];
  /** One number per class; empty for a regression. */
  probabilities: number[];
}

export interface Similarity {
  ids: number[][];
  /** Cosine similarity of the first sentence to each of the others. */
  cosines: number[];
}

/** Is called with the number of finished rows and of all rows; throws to stop the request. */
export type ReportProgress = (done: number, all: number) => Promise<void>;

export async function answer(engine: Engine, question: string, context: string, reportProgress: ReportProgress): Promise<Answers> {
  const { length, stride } = engine.model;
  const asked = shortened(engine.splitter, question, length);
  const text = engine.splitter.split(context);
  const search = new Search();
  const ids: number[][] = [];
  const all = windowCount(asked, text, length, stride);
  for (const window of windows(engine.splitter, asked, text, length, stride)) {
    await reportProgress(ids.length, all);
    const outputs = await engine.run(window);
    search.add(window, outputs.start_logits!.data, outputs.end_logits!.data);
    ids.push(window.ids);
  }
  return { answers: search.answers(5), noAnswer: search.noAnswer, windows: all, ids };
}

export async function score(engine: Engine, first: string, second: string | undefined): Promise<Scores> {
  const { length, kind } = engine.model;
  const pieces = [first, second].map((text) => (text === undefined ? undefined : engine.splitter.split(text)));
  const input = cutRow(engine.splitter, length, pieces[0]!, pieces[1]);
  const logits = Array.from((await engine.run(input)).logits!.data);
  return { ids: input.ids, logits, probabilities: kind === "classification" ? softmax(logits) : [] };
}

export async function compare(engine: Engine, texts: string[], reportProgress: ReportProgress): Promise<Similarity> {
  const ids: number[][] = [];
  const vectors: Float64Array[] = [];
  for (const text of texts) {
    await reportProgress(vectors.length, texts.length);
    const input = cutRow(engine.splitter, engine.model.length, engine.splitter.split(text));
    vectors.push(mean((await engine.run(input)).last_hidden_state!));
    ids.push(input.ids);
  }
  return { ids, cosines: vectors.slice(1).map((vector) => cosine(vectors[0]!, vector)) };
}

/** Returns the mean over tokens of hidden states [1, L, D]. */
function mean(states: { data: Float32Array; dims: readonly number[] }): Float64Array {
  const [, length, width] = states.dims as [number, number, number];
  const sum = new Float64Array(width);
  for (let i = 0; i < states.data.length; i++) sum[i % width]! += states.data[i]! / length;
  return sum;
}

function cosine(one: Float64Array, two: Float64Array): number {
  const dot = (left: Float64Array, right: Float64Array) => left.reduce((sum, value, i) => sum + value * right[i]!, 0);
  return dot(one, two) / Math.max(Math.sqrt(dot(one, one) * dot(two, two)), 1e-12);
}
