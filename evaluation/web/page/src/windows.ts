// Builds the model's input rows: one text, a pair of texts, or a question with overlapping windows of a long text.
import type { Piece, Splitter } from "./pieces";

/** One input row. `places[i]` is the piece of the context at token i; undefined for other tokens. */
export interface Row {
  ids: number[];
  types: number[];
  places: (Piece | undefined)[];
}

export function row(splitter: Splitter, first: Piece[], second?: Piece[]): Row {
  const { cls, sep } = splitter;
  const ids = [cls, ...first.map((piece) => piece.id), sep];
  const types = ids.map(() => 0);
  const places: (Piece | undefined)[] = ids.map(() => undefined);
  if (second) {
    for (const piece of second) {
      ids.push(piece.id);
      types.push(1);
      places.push(piece);
    }
    ids.push(sep);
    types.push(1);
    places.push(undefined);
  }
  return { ids, types, places };
}

/** Returns a row of one or two texts, cut to `length` tokens. Of two texts, the longer one loses tokens first. */
export function cutRow(splitter: Splitter, length: number, first: Piece[], second?: Piece[]): Row {
  if (!second) return row(splitter, first.slice(0, Math.max(0, length - 2)));
  const room = length - 3;
  const [one, two] = shares(first.length, second.length, room);
  return row(splitter, first.slice(0, one), second.slice(0, two));
}

/** Returns how many pieces of each text are kept, as truncation `longest_first` of transformers does. */
export function shares(one: number, two: number, room: number): [number, number] {
  if (one + two <= room) return [one, two];
  const shorter = Math.min(one, two);
  const [small, large] = shorter > room - shorter ? [Math.floor(room / 2), room - Math.floor(room / 2)] : [shorter, room - shorter];
  return one > two ? [large, small] : [small, large];
}

/** Yields rows of at most `length` tokens that cover the context; neighbours share `stride` pieces of the context. */
export function* windows(splitter: Splitter, question: Piece[], context: Piece[], length: number, stride: number): Generator<Row> {
  const room = length - question.length - 3;
  for (let start = 0; ; start += room - stride) {
    yield row(splitter, question, context.slice(start, start + room));
    if (start + room >= context.length) return;
  }
}

export function windowCount(question: Piece[], context: Piece[], length: number, stride: number): number {
  const room = length - question.length - 3;
  return context.length <= room ? 1 : 1 + Math.ceil((context.length - room) / (room - stride));
}

/** Returns the first pieces of the question: at most 64, and at most a quarter of a row, to leave room for the context. */
export function shortened(splitter: Splitter, question: string, length: number): Piece[] {
  const limit = Math.min(64, Math.floor(length / 4));
  const text = question.replace(/^[\s\u001c-\u001f\u0085]+/, "");
  const pieces = splitter.split(text);
  return pieces.length <= limit ? pieces : splitter.split(text.slice(0, pieces[limit - 1]!.end));
}
