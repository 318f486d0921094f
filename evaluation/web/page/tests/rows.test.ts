import assert from "node:assert/strict";
import { test } from "node:test";
import { Splitter } from "../src/pieces";
import { Search, softmax } from "../src/spans";
import { cutRow, shares, shortened, windowCount, windows } from "../src/windows";

const VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "light", "##house", "e", "##e", "[", "]", "sep", "中", "𠀀", "x"];
const splitter = new Splitter({
  added_tokens: VOCABULARY.slice(0, 4).map((content, id) => ({ id, content, special: true })),
  normalizer: { type: "BertNormalizer", clean_text: true, handle_chinese_chars: true, strip_accents: null, lowercase: true },
  pre_tokenizer: { type: "BertPreTokenizer" },
  post_processor: null,
  decoder: null,
  model: {
    type: "WordPiece", unk_token: "[UNK]", continuing_subword_prefix: "##", max_input_chars_per_word: 100,
    vocab: Object.fromEntries(VOCABULARY.map((token, id) => [token, id])),
  },
});
const parts = (text: string) => splitter.split(text).map(({ id, start, end }) => [VOCABULARY[id], text.slice(start, end)]);

test("pieces know their place in the text as it was written", () => {
  assert.deepEqual(parts("The  Lighthouse"), [["the", "The"], ["light", "Light"], ["##house", "house"]]);
  assert.deepEqual(parts("\u0000É\u200be\u0301"), [["e", "É"], ["##e", "e"]]);
  assert.deepEqual(parts("the 🚢 the"), [["the", "the"], ["[UNK]", "🚢"], ["the", "the"]]);
  assert.deepEqual(parts("x".repeat(101)), [["[UNK]", "x".repeat(101)]]);
});

test("Chinese characters are words, those beyond 16 bits too", () => {
  assert.deepEqual(parts("中𠀀"), [["中", "中"], ["𠀀", "𠀀"]]);
});

test("names of control tokens are text", () => {
  assert.deepEqual(parts("[SEP]").map(([token]) => token), ["[", "sep", "]"]);
});

test("windows cover the context, and neighbours share the stride", () => {
  const question = splitter.split("the x");
  const context = splitter.split("x ".repeat(23));
  const rows = [...windows(splitter, question, context, 15, 4)];
  const covered = rows.map(({ places }) => places.filter(Boolean).map((piece) => piece!.start / 2));
  assert.deepEqual(covered.map((places) => [places[0], places.at(-1)]), [[0, 9], [6, 15], [12, 21], [18, 22]]);
  assert.equal(windowCount(question, context, 15, 4), rows.length);
  assert.equal(rows[0]!.ids.length, 15);
  assert.deepEqual(rows[0]!.types, [0, 0, 0, 0, ...Array(11).fill(1)]);
  assert.equal([...windows(splitter, question, [], 15, 4)].length, 1);
});

test("a long question is shortened, so that the context has room", () => {
  assert.equal(shortened(splitter, " x".repeat(200), 384).length, 64);
  assert.equal(shortened(splitter, " x".repeat(200), 100).length, 25);
});

test("pairs are cut as the Python library cuts them", () => {
  assert.deepEqual(shares(3, 4, 10), [3, 4]);
  assert.deepEqual(shares(3, 40, 10), [3, 7]);
  assert.deepEqual(shares(40, 3, 10), [7, 3]);
  assert.deepEqual(shares(40, 30, 11), [6, 5]);
  assert.equal(cutRow(splitter, 12, splitter.split("x ".repeat(50)), splitter.split("x ".repeat(50))).ids.length, 12);
});

test("the best span is the best start and end together, in order, and never too long", () => {
  const context = splitter.split("x ".repeat(40));
  const row = [...windows(splitter, [], context, 60, 4)][0]!;
  const logits = (best: Record<number, number>) => Float32Array.from(row.ids, (_, i) => best[i] ?? 0);
  const answer = (start: Record<number, number>, end: Record<number, number>) => {
    const search = new Search();
    search.add(row, logits(start), logits(end));
    const [best] = search.answers(1);
    return [best!.first, best!.last, best!.score];
  };
  assert.deepEqual(answer({ 5: 2 }, { 7: 1 }), [5, 7, 3]);
  assert.deepEqual(answer({ 9: 5, 3: 2 }, { 4: 5 }), [3, 4, 7]);
  assert.deepEqual(answer({ 2: 3, 20: 1 }, { 32: 3, 25: 0.5 }), [20, 32, 4]); // 2 to 32 has 31 tokens
  assert.deepEqual(answer({ 0: 90 }, { 1: 90 }), [2, 2, 0]); // [CLS] and [SEP] are no answers
});

test("probabilities of all spans of all windows are at most one together", () => {
  const row = [...windows(splitter, [], splitter.split("x x"), 60, 4)][0]!;
  const search = new Search();
  for (const shift of [0, 1]) search.add(row, Float32Array.from(row.ids, (_, i) => i + shift), new Float32Array(row.ids.length));
  const found = search.answers(10);
  assert.equal(new Set(found.map(({ start, end }) => `${start} ${end}`)).size, found.length);
  assert.ok(found.reduce((sum, { probability }) => sum + probability, 0) < 1);
  assert.ok(Math.abs(softmax([1, 2, 3]).reduce((sum, share) => sum + share, 0) - 1) < 1e-12);
});
