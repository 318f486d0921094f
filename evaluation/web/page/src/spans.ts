// Finds the best answers in the logits of windows, with the same search as evaluation/tasks/answer_spans.py.
import type { Row } from "./windows";

const N_BEST = 20;
const MAX_TOKENS = 30;

/** A candidate answer: tokens `first` to `last` of a window, characters `start` to `end` (excluded) of the text. */
export interface Span {
  /** Sum of the start and end logit in float32. */
  score: number;
  window: number;
  first: number;
  last: number;
  start: number;
  end: number;
}

/** Collects the best spans of all windows, and the sums that turn their scores into probabilities. */
export class Search {
  private spans: Span[] = [];
  private window = 0;
  private readonly starts: number[] = [];
  private readonly ends: number[] = [];
  /** Lowest score of "no answer", which is [CLS] as start and end, of all windows. */
  noAnswer = Infinity;

  add(row: Row, start: Float32Array, end: Float32Array): void {
    const contextTokens = row.places.flatMap((piece, token) => (piece ? [token] : []));
    const firsts = best(contextTokens, start);
    const lasts = best(contextTokens, end);
    for (const first of firsts) {
      for (const last of lasts) {
        if (last < first || last - first >= MAX_TOKENS) continue;
        const score = Math.fround(start[first]! + end[last]!);
        const from = row.places[first]!.start;
        this.spans.push({ score, window: this.window, first, last, start: from, end: row.places[last]!.end });
      }
    }
    this.spans = this.spans.sort((one, two) => two.score - one.score).slice(0, N_BEST * MAX_TOKENS);
    this.starts.push(logSumExp(start));
    this.ends.push(logSumExp(end));
    this.noAnswer = Math.min(this.noAnswer, start[0]! + end[0]!);
    this.window++;
  }

  /** Returns the best spans with their probabilities over all windows; of spans with the same text only the best. */
  answers(count: number): (Span & { probability: number })[] {
    const normaliser = logSumExp(this.starts) + logSumExp(this.ends);
    const seen = new Set<string>();
    const found = [];
    for (const span of this.spans) {
      const range = `${span.start}-${span.end}`;
      if (found.length === count) break;
      if (seen.has(range)) continue;
      seen.add(range);
      found.push({ ...span, probability: Math.exp(span.score - normaliser) });
    }
    return found;
  }
}

/** Returns up to N_BEST tokens with the largest logits; tokens with equal logits keep their order. */
function best(tokens: number[], logits: Float32Array): number[] {
  return [...tokens].sort((one, two) => logits[two]! - logits[one]!).slice(0, N_BEST);
}

export function logSumExp(values: ArrayLike<number>): number {
  let largest = -Infinity;
  for (let i = 0; i < values.length; i++) largest = Math.max(largest, values[i]!);
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += Math.exp(values[i]! - largest);
  return largest + Math.log(sum);
}

export function softmax(logits: ArrayLike<number>): number[] {
  const normaliser = logSumExp(logits);
  return Array.from(logits, (logit) => Math.exp(logit - normaliser));
}
