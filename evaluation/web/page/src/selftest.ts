// Compares the page's outputs with those that Python computed from the same files (golden.json).
import { type ReportProgress, answer, compare, score } from "./answer";
import type { Engine } from "./engine";
import { read, unpack } from "./site";

/** Largest difference between a score here and in Python that counts as equal. */
const TOLERANCE = 1e-3;

interface Golden {
  examples: Example[];
}

/** Texts, and the token ids and outputs that Python computed for them. */
interface Example {
  texts: string[];
  ids: number[][];
  /** The best answer to a question. */
  span?: { window: number; first: number; last: number; score: number; text: string; noAnswer: number };
  logits?: number[];
  cosines?: number[];
}

export interface Difference {
  example: number;
  what: string;
  expected: unknown;
  found: unknown;
}

/** Records a difference if the two values of `what`, such as "ids", are not the same. */
type Report = (what: string, expected: unknown, found: unknown) => void;

export async function selftest(
  engine: Engine,
  reportProgress: ReportProgress,
  count = Infinity,
): Promise<{ examples: number; differences: Difference[] }> {
  const golden: Golden = JSON.parse(new TextDecoder().decode(await unpack(await read(engine.model.golden))));
  const examples = golden.examples.slice(0, count);
  const differences: Difference[] = [];
  for (const [example, content] of examples.entries()) {
    await reportProgress(example, examples.length);
    const report: Report = (what, expected, found) => {
      if (!same(expected, found)) differences.push({ example, what, expected, found });
    };
    await (engine.model.kind === "spans" ? spans : engine.model.kind === "encoder" ? cosines : logits)(engine, content, report);
  }
  return { examples: examples.length, differences };
}

async function spans(engine: Engine, { texts, ids, span }: Example, report: Report): Promise<void> {
  const found = await answer(engine, texts[0]!, texts[1]!, async () => {});
  report("ids", ids, found.ids);
  const best = found.answers[0];
  report("answer", span?.text, best && texts[1]!.slice(best.start, best.end));
  report("span", span && [span.window, span.first, span.last], best && [best.window, best.first, best.last]);
  report("score", span?.score, best?.score);
  report("no answer", span?.noAnswer, found.noAnswer);
}

async function logits(engine: Engine, { texts, ids, logits }: Example, report: Report): Promise<void> {
  const found = await score(engine, texts[0]!, texts[1]);
  report("ids", ids, [found.ids]);
  report("logits", logits, found.logits);
}

async function cosines(engine: Engine, { texts, ids, cosines }: Example, report: Report): Promise<void> {
  const found = await compare(engine, texts, async () => {});
  report("ids", ids, found.ids);
  report("cosines", cosines, found.cosines);
}

/** Whether two values are equal; of numbers that are not integers, within the tolerance. */
export function same(expected: unknown, found: unknown): boolean {
  if (Array.isArray(expected) && Array.isArray(found)) {
    return expected.length === found.length && expected.every((item, i) => same(item, found[i]));
  }
  if (typeof expected === "number" && typeof found === "number") {
    const exact = Number.isInteger(expected) && Number.isInteger(found);
    return exact ? expected === found : Math.abs(expected - found) < TOLERANCE;
  }
  return expected === found;
}
