// The form of each kind of task, and how its result is shown.
import type { Answers, Scores, Similarity } from "./answer";
import type { Client, Done } from "./client";
import { make, percent } from "./dom";
import type { Model } from "./site";

export interface Form {
  title: string;
  button: string;
  fields: HTMLElement[];
  /** Runs the model and shows its result. Returns a message to the visitor instead if an input is missing. */
  run(client: Client, model: Model, result: HTMLElement): Promise<Done<never> | string>;
}

/** Number of characters that are shown before and after the answer in a long text. */
const AROUND = 600;

/** Matches texts whose first letter belongs to a script that is written from right to left. */
const RIGHT_TO_LEFT = /^\P{L}*[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;

const SAMPLE =
  "The lighthouse on the northern cape was built in 1874 by two sisters, Ada and Ruth Marlow. It is 31 metres high, " +
  "and its lamp could be seen from 18 miles away. In the winter of 1912 the keeper, Tom Hale, kept the lamp burning " +
  "for nine nights with fish oil, because the supply ship had not arrived. Since 1986 the lamp has worked without a keeper.";

export function formOf(model: Model): Form {
  if (model.kind === "spans") return spans();
  return model.kind === "encoder" ? similarity() : scores(model.texts);
}

function area(id: string, label: string, rows: number, value = ""): [HTMLElement, HTMLTextAreaElement] {
  const input = make("textarea", { id, rows: String(rows), spellcheck: "false" });
  input.value = value;
  // dir="auto" does this too, but lays a megabyte of text out for ten seconds
  input.addEventListener("input", () => (input.dir = RIGHT_TO_LEFT.test(input.value.slice(0, 1000)) ? "rtl" : "ltr"));
  return [make("div", {}, make("label", { for: id }, label), input), input];
}

function meter(label: string, value: number, lowest = 0): HTMLElement {
  return make("meter", { min: String(lowest), max: "1", value: String(value), "aria-label": label });
}

function spans(): Form {
  const [text, context] = area("context", "Text", 7, SAMPLE);
  const [ask, question] = area("question", "Question", 2, "Who kept the lamp burning?");
  const threshold = make("input", { id: "threshold", type: "number", step: "0.5", value: "0" });
  const label = make("label", { for: "threshold" }, "Say “no answer” if it scores higher than the best answer by more than");
  return {
    title: "Answers from a text", button: "Answer", fields: [text, ask, make("div", { class: "inline" }, label, threshold)],
    async run(client, _model, result) {
      if (!context.value.trim()) return "Write or paste a text first.";
      if (!question.value.trim()) return "Write a question first.";
      const done = await client.ask<Answers>({ kind: "answer", question: question.value, context: context.value });
      showAnswers(done.result, context.value, threshold.valueAsNumber || 0, result);
      return done as Done<never>;
    },
  };
}

function showAnswers({ answers, noAnswer }: Answers, context: string, threshold: number, result: HTMLElement): void {
  const best = answers[0];
  const none = !best || noAnswer - best.score > threshold;
  const heading = make("p", { class: "answer", dir: "auto" }, none ? "No answer in this text" : textOf(best, context));
  const list = answers.map((span) =>
    make("li", {}, make("span", { dir: "auto" }, textOf(span, context)), meter("Probability", span.probability), make("span", { class: "number" }, percent(span.probability))),
  );
  const others = make("ol", { class: "ranking" }, ...list);
  result.replaceChildren(heading, make("h2", {}, "Candidates"), others);
  if (best && !none) result.append(make("h2", {}, "In the text"), highlighted(context, best.start, best.end));
}

const textOf = (span: { start: number; end: number }, context: string): string => context.slice(span.start, span.end);

function highlighted(context: string, start: number, end: number): HTMLElement {
  const from = Math.max(0, start - AROUND);
  const to = Math.min(context.length, end + AROUND);
  return make(
    "p", { class: "text", dir: "auto", tabindex: "0", role: "region", "aria-label": "The text around the answer" },
    from > 0 ? "… " : "", context.slice(from, start), make("mark", {}, context.slice(start, end)), context.slice(end, to),
    to < context.length ? " …" : "",
  );
}

function scores(texts: number | null): Form {
  const [one, first] = area("first", "Text", 4, "A warm and funny film that never loses its way.");
  const [two, second] = area("second", texts === 2 ? "Second text" : "Second text, for tasks on pairs (may stay empty)", 3);
  return {
    title: texts === 2 ? "Score a pair of texts" : "Score a text", button: "Score", fields: texts === 1 ? [one] : [one, two],
    async run(client, model, result) {
      if (!first.value.trim()) return "Write a text first.";
      if (texts === 2 && !second.value.trim()) return "Write the second text first.";
      const other = second.value.trim() ? { second: second.value } : {};
      const done = await client.ask<Scores>({ kind: "score", first: first.value, ...other });
      showScores(done.result, model.labels, result);
      return done as Done<never>;
    },
  };
}

function showScores({ logits, probabilities }: Scores, labels: string[], result: HTMLElement): void {
  if (!probabilities.length) {
    result.replaceChildren(make("p", { class: "answer" }, logits[0]!.toFixed(2)));
    return;
  }
  const ranked = probabilities.map((share, i) => ({ share, label: labels[i] ?? String(i) })).sort((a, b) => b.share - a.share);
  const list = ranked.map(({ share, label }) =>
    make("li", {}, make("span", {}, label), meter(label, share), make("span", { class: "number" }, percent(share))),
  );
  result.replaceChildren(make("p", { class: "answer" }, ranked[0]!.label), make("ol", { class: "ranking" }, ...list));
}

function similarity(): Form {
  const [one, first] = area("first", "Sentence", 2, "A man plays a guitar on the street.");
  const [many, others] = area("others", "Compare with (one sentence per line)", 5,
    "Someone makes music outdoors.\nThe stock market fell sharply.\nA guitarist performs in town.\nThe recipe needs two eggs.");
  return {
    title: "Similar sentences", button: "Compare", fields: [one, many],
    async run(client, _model, result) {
      const lines = others.value.split("\n").filter((line) => line.trim());
      if (!first.value.trim() || !lines.length) return "Write a sentence and at least one to compare it with first.";
      const done = await client.ask<Similarity>({ kind: "compare", texts: [first.value, ...lines] });
      showSimilarity(done.result, lines, result);
      return done as Done<never>;
    },
  };
}

function showSimilarity({ cosines }: Similarity, lines: string[], result: HTMLElement): void {
  const ranked = lines.map((line, i) => ({ line, cosine: cosines[i]! })).sort((a, b) => b.cosine - a.cosine);
  const list = ranked.map(({ line, cosine }) =>
    make("li", {}, make("span", { dir: "auto" }, line), meter("Similarity", cosine), make("span", { class: "number" }, cosine.toFixed(2))),
  );
  result.replaceChildren(make("h2", {}, "Most similar first"), make("ol", { class: "ranking" }, ...list));
}
