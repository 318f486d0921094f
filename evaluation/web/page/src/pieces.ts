// Splits a text into word pieces with their positions. The library returns no positions, so it tokenizes word by word.
import { Tokenizer } from "@huggingface/tokenizers";

/** A token: its id, and the range of the text that it represents, in UTF-16 code units. */
export interface Piece {
  id: number;
  start: number;
  end: number;
}

/** Chinese characters outside the 16-bit range, which the library does not treat as words of their own. */
const RARE_CHINESE = /^[\u{20000}-\u{2B81F}\u{2B920}-\u{2CEAF}\u{2F800}-\u{2FA1F}]$/u;
/** Largest number of words whose pieces are cached. */
const MAX_CACHED_WORDS = 50_000;

/** Splits texts as the model's BERT tokenizer does; "[SEP]" and other control tokens in a text are ordinary text. */
export class Splitter {
  readonly cls: number;
  readonly sep: number;
  private readonly tokenizer: Tokenizer;
  private readonly characters = new Map<string, string>();
  private readonly words = new Map<string, { id: number; units: number }[]>();

  constructor(json: object) {
    this.tokenizer = new Tokenizer(json, {});
    const { normalizer, pre_tokenizer, model } = this.tokenizer;
    if (!normalizer || !pre_tokenizer || !model) throw new Error("the tokenizer is not a BERT tokenizer");
    this.cls = this.control("[CLS]");
    this.sep = this.control("[SEP]");
  }

  private control(token: string): number {
    const id = this.tokenizer.token_to_id(token);
    if (id === undefined) throw new Error(`the tokenizer has no ${token}`);
    return id;
  }

  /** Returns the pieces of a text, without control tokens. */
  split(text: string): Piece[] {
    const { normal, starts, ends } = this.normalise(text);
    const pieces: Piece[] = [];
    let position = 0;
    for (const word of this.tokenizer.pre_tokenizer!(normal)) {
      position = normal.indexOf(word, position);
      for (const { id, units } of this.piecesOf(word)) {
        pieces.push({ id, start: starts[position]!, end: ends[position + units - 1]! });
        position += units;
      }
    }
    return pieces;
  }

  /** Returns the normalised text and, for each of its code units, the range of the original text that it comes from. */
  private normalise(text: string): { normal: string; starts: number[]; ends: number[] } {
    const parts: string[] = [];
    const starts: number[] = [];
    const ends: number[] = [];
    let position = 0;
    for (const character of text) {
      const normal = this.normalised(character);
      parts.push(normal);
      for (let unit = 0; unit < normal.length; unit++) {
        starts.push(position);
        ends.push(position + character.length);
      }
      position += character.length;
    }
    return { normal: parts.join(""), starts, ends };
  }

  private normalised(character: string): string {
    let normal = this.characters.get(character);
    if (normal === undefined) {
      normal = RARE_CHINESE.test(character) ? ` ${character} ` : this.tokenizer.normalizer!(character);
      this.characters.set(character, normal);
    }
    return normal;
  }

  private piecesOf(word: string): { id: number; units: number }[] {
    const cached = this.words.get(word);
    if (cached) return cached;
    const model = this.tokenizer.model!;
    const found = model([word]).map((token, position) => ({
      id: model.tokens_to_ids.get(token)!,
      units: token === model.unk_token ? word.length : token.length - (position > 0 ? "##".length : 0),
    }));
    if (this.words.size < MAX_CACHED_WORDS) this.words.set(word, found);
    return found;
  }
}
