"""Which tokens are masked, as a pure function of (seed, sequence id, masking epoch). numpy only.

Axes: B batch, L length, M masked slots a sequence, V vocabulary.

Random numbers are counter-based: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) of the counter (position, masking epoch, sequence id) under the key seed. So there is no
state, and a mask does not depend on the batch, the order or the worker. Each position gets four random 32-bit
numbers: 0 and 1 decide whether it is masked, 2 makes the 80/10/10 choice, 3 draws the replacement token.

Uniform sampling is integer arithmetic throughout: the same bits on every platform. Frequency sampling takes a
float64 ``log`` and a power, whose last bit may differ between platforms. Only the first 42 bits of a key's
mantissa are used, so a different last bit changes a mask only if two keys of one sequence nearly tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from math import ceil
from typing import Any

import numpy as np

from infra.errors import UserError
from infra.settings.sections import Masking

WORD_STARTS = {"ByteLevel": "\u0120", "Metaspace": "\u2581"}
"""Pre-tokenizer (ByteLevel: GPT-2, RoBERTa; Metaspace: SentencePiece) -> its character for the space before
a word."""

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_POSITION_BITS = np.uint64(10)
_POSITION = np.uint64(1023)
"""L <= 1024: the low 10 bits of a key are its position. So a sorted key tells its position, and no two keys
are equal."""
_NEVER = np.uint64(0xFFFFFFFFFFFFFFFF)
_BLOCK_POSITIONS = 1 << 13
"""Positions masked at a time: few enough to stay in the processor's cache."""

_MASKED_BELOW = np.uint64(2**32 * 8 // 10)
_RANDOM_BELOW = np.uint64(2**32 * 9 // 10)


@dataclass(frozen=True)
class MaskVocab:
    """The properties of a vocabulary that masking uses."""

    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    weights: np.ndarray | None = None
    """float64 [V], positive; None: all tokens are equally likely."""
    is_continuation: np.ndarray | None = None
    """bool [V]: the token goes on with the word before it; None: no whole-word masking."""

    @cached_property
    def is_special(self) -> np.ndarray:
        """bool [V]"""
        flags = np.zeros(self.vocab_size, bool)
        flags[list(self.special_ids)] = True
        return flags

    @cached_property
    def ordinary(self) -> np.ndarray:
        """The ids that are not special, ascending: what random replacements are drawn from."""
        return np.flatnonzero(~self.is_special)


def mask_vocab(
    masking: Masking,
    mask_id: int,
    special_ids: Sequence[int],
    vocab_size: int,
    token_counts: np.ndarray | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> MaskVocab:
    """The vocabulary as ``masking`` needs it.

    ``token_counts`` [at most V] are needed for frequency sampling: weight = max(count, 1)^-smoothing (XLM,
    DistilBERT). ``tokenizer``, the content of a tokenizer.json, is needed for whole words; UserError where it
    does not tell which tokens begin a word.
    """
    weights = None
    if masking.sampling == "frequency":
        if token_counts is None:
            raise ValueError("frequency sampling needs token counts")
        counts = np.ones(vocab_size)
        counts[: len(token_counts)] = np.maximum(token_counts, 1)
        weights = counts**-masking.smoothing
    continuation = None
    if masking.whole_word:
        if tokenizer is None:
            raise ValueError("whole-word masking needs the tokenizer")
        continuation = continuation_flags(tokenizer, vocab_size)
    return MaskVocab(mask_id, tuple(special_ids), vocab_size, weights, continuation)


def continuation_flags(tokenizer: Mapping[str, Any], vocab_size: int) -> np.ndarray:
    """bool [V]: tokens that go on with a word, by the content of a tokenizer.json.

    In WordPiece these have the prefix ``##``. In byte-level BPE and SentencePiece they lack the mark of a
    space; that includes punctuation. Raises UserError for another kind of tokenizer.
    """
    model = tokenizer["model"]
    spelled = model["vocab"]
    if model["type"] == "Unigram":  # pairs of a piece and its log probability, by id
        spelled = {piece: token for token, (piece, _) in enumerate(spelled)}
    parts = [part for part in _components(tokenizer["pre_tokenizer"]) if part["type"] in WORD_STARTS]
    marks = [part.get("replacement", WORD_STARTS[part["type"]]) for part in parts]
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        going_on = [token for piece, token in spelled.items() if piece.startswith(prefix)]
    elif marks:
        going_on = [token for piece, token in spelled.items() if not piece.startswith(marks[0])]
    else:
        raise UserError(
            f"masking.whole_word: the teacher's tokenizer ({model['type']}) does not tell where a word"
            " begins; set masking.whole_word: false"
        )
    flags = np.zeros(vocab_size, bool)
    flags[going_on] = True
    return flags


def _components(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The members of a pre-tokenizer of type Sequence; any other pre-tokenizer alone."""
    if part is None:
        return []
    return list(part["pretokenizers"]) if part["type"] == "Sequence" else [part]


@dataclass(frozen=True)
class Masked:
    input_ids: np.ndarray
    """[B, L]: the given ids with the masking applied."""
    positions: np.ndarray
    """int16 [B, M] ascending; unused slots -1."""
    labels: np.ndarray
    """[B, M], the dtype of ``input_ids``: the original ids; unused slots 0."""


def masked_count(length: int, probability: float) -> int:
    """M, the masked tokens of a sequence without padding: ceil(probability * (L - 2)); 0 if masking is
    off."""
    return int(_budgets(length, probability)[length - 2])


@lru_cache(maxsize=16)
def _budgets(length: int, probability: float) -> np.ndarray:
    """ceil(probability * n) for n = 0 .. L, with the recipe's decimal instead of its float: int64 [L + 1]."""
    exact = Fraction(repr(probability))
    return np.array([ceil(exact * count) for count in range(length + 1)], np.int64)


def mask_sequences(
    input_ids: np.ndarray,
    token_count: np.ndarray,
    sequence_ids: np.ndarray,
    epoch: int,
    masking: Masking,
    vocab: MaskVocab,
) -> Masked:
    """Masks ceil(probability * maskable) tokens of every sequence, drawn without replacement.

    ``input_ids`` [B, L], ``token_count`` [B], ``sequence_ids`` [B]. Special tokens and padding are never
    masked. Of the masked tokens 80 % become [MASK], 10 % a uniformly drawn ordinary token, 10 % stay
    (BERT, arXiv 1810.04805, section 3.1).

    Whole words: words are drawn until the count is reached. Of the last one, only as many first tokens are
    masked as still fit. With frequency sampling, a word has the weight of its first token. If a sequence
    begins within a word, the rest of that word counts as a word.
    """
    count, length = input_ids.shape
    assert masking.probability, "masking is off, or was not decided yet"
    slots = masked_count(length, masking.probability)
    output = input_ids.copy()
    positions = np.full((count, slots), -1, np.int16)
    labels = np.zeros((count, slots), input_ids.dtype)
    rows = max(1, _BLOCK_POSITIONS // length)
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        words = _random_words(np.asarray(sequence_ids[block]), length, epoch, masking.seed)
        chosen = _draw(input_ids[block], token_count[block], words, slots, masking.probability, vocab)
        _apply(output[block], positions[block], labels[block], chosen, words, vocab)
    return Masked(output, positions, labels)


def _draw(
    input_ids: np.ndarray,
    token_count: np.ndarray,
    words: Sequence[np.ndarray],
    slots: int,
    probability: float,
    vocab: MaskVocab,
) -> np.ndarray:
    """Ascending positions [b, M] int64 to mask; L where a slot is unused.

    Each token gets a random key, and the smallest keys are taken, which draws without replacement. Uniform
    keys draw uniformly; keys -log(u) / w draw in proportion to w (Efraimidis & Spirakis, 2006).
    """
    length = input_ids.shape[1]
    position = np.arange(length, dtype=np.uint64)
    maskable = (position < token_count[:, None]) & ~vocab.is_special[input_ids]
    keys = (words[0] << _HALF) | words[1]
    if vocab.weights is not None:
        uniform = ((keys >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
        # A positive float64 and its bits, read as an integer, are in the same order.
        keys = (-np.log(uniform) / vocab.weights[input_ids]).view(np.uint64)
    if vocab.is_continuation is not None:
        keys = np.take_along_axis(keys, _word_starts(input_ids, maskable, vocab.is_continuation), axis=1)
    keys = (keys & ~_POSITION) | position
    keys[~maskable] = _NEVER
    keys.sort(axis=1)
    budget = _budgets(length, probability)[maskable.sum(axis=1)]
    assert budget.max(initial=0) <= slots, "more maskable tokens than L - 2: [CLS] and [SEP] must be special"
    chosen = (keys[:, :slots] & _POSITION).astype(np.int64)
    chosen[np.arange(slots) >= budget[:, None]] = length
    chosen.sort(axis=1)
    return chosen


def _word_starts(input_ids: np.ndarray, maskable: np.ndarray, is_continuation: np.ndarray) -> np.ndarray:
    """[b, L] int64: where the word of each token starts; all tokens of a word take the key of its start."""
    starts = ~is_continuation[input_ids]
    starts[:, 1:] |= ~maskable[:, :-1]
    starts[:, 0] = True
    first: np.ndarray = np.maximum.accumulate(np.where(starts, np.arange(input_ids.shape[1]), 0), axis=1)
    return first


def _apply(
    output: np.ndarray,
    positions: np.ndarray,
    labels: np.ndarray,
    chosen: np.ndarray,
    words: Sequence[np.ndarray],
    vocab: MaskVocab,
) -> None:
    """Fills the three outputs (views) for the positions chosen; 80/10/10."""
    row, slot = np.nonzero(chosen < output.shape[1])
    at = chosen[row, slot]
    original = output[row, at]
    positions[row, slot] = at
    labels[row, slot] = original
    choice, draw = words[2][row, at], words[3][row, at]
    # Multiply and shift (Lemire, arXiv 1805.10941) without rejection: probabilities err by at most V / 2^32.
    random = vocab.ordinary[((draw * np.uint64(len(vocab.ordinary))) >> _HALF).astype(np.int64)]
    kept_or_random = np.where(choice < _RANDOM_BELOW, random, original)
    output[row, at] = np.where(choice < _MASKED_BELOW, vocab.mask_id, kept_or_random)


def _random_words(sequence_ids: np.ndarray, length: int, epoch: int, seed: int) -> tuple[np.ndarray, ...]:
    """Four independent random 32-bit numbers for each position of each sequence: uint64 [b, L] each."""
    shape = (len(sequence_ids), length)
    ids = sequence_ids.astype(np.uint64)[:, None]
    counter = [
        np.broadcast_to(word, shape)
        for word in (np.arange(length, dtype=np.uint64), np.uint64(epoch), ids & _LOW, ids >> _HALF)
    ]
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


def philox(counter: Sequence[np.ndarray], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four words of counter (uint64 arrays below 2^32) to four random words.

    The test vectors of Random123 (kat_vectors) hold.
    """
    a, b, c, d = counter
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = (product_1 >> _HALF) ^ b ^ np.uint64(key_0)
        b = product_1 & _LOW
        c = (product_0 >> _HALF) ^ d ^ np.uint64(key_1)
        d = product_0 & _LOW
        key_0, key_1 = (key_0 + _WEYL[0]) & 0xFFFFFFFF, (key_1 + _WEYL[1]) & 0xFFFFFFFF
    return a, b, c, d
