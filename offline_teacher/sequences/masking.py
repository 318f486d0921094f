"""Masks tokens, as a pure function of (seed, sequence id, masking epoch), with numpy only.

Axes: B batch, b sequences of a block, L length, M slots for masked positions per sequence, V vocabulary.

Random numbers are counter-based: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) of the counter (position, masking epoch, sequence id), with the seed as key. So there is no
state, and a mask does not depend on the batch, the order or the worker. Each position gets four random 32-bit
numbers: 0 and 1 decide whether it is masked, 2 chooses the replacement's kind, 3 draws the replacement token.

Uniform sampling uses only integers, so its results are the same on every platform. Frequency sampling uses a
float64 ``log`` and a power, whose last bit may differ between platforms. Only the first 42 bits of a key's
mantissa are used, so another last bit changes a mask only if two keys of one sequence are almost equal.
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
from offline_teacher.sequences.tokenizer import Encoder

WORD_STARTS = {"ByteLevel": "\u0120", "Metaspace": "\u2581"}
"""Pre-tokenizer (of GPT-2 and RoBERTa; of SentencePiece) -> its character for the space before a word."""

_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_POSITION_MASK = np.uint64(1023)
"""The low 10 bits of a sort key are its position (L <= 1024), so no two keys of a sequence are equal."""
_LARGEST_KEY = np.uint64(0xFFFFFFFFFFFFFFFF)
"""Sort key of positions that must not be masked."""
_BLOCK_POSITIONS = 1 << 13
"""Number of positions that are masked together: few enough for the processor's cache."""

_MASK_BELOW = {"bert": np.uint64(2**32 * 8 // 10), "mask": np.uint64(2**32)}
"""``masking.replacement`` -> a masked token whose last random number is below this becomes [MASK]."""
_RANDOM_BELOW = np.uint64(2**32 * 9 // 10)
"""With a number from ``_MASK_BELOW`` to this, it becomes a random token (``bert``: 10 %), else it stays."""


@dataclass(frozen=True)
class MaskVocab:
    """Properties of a vocabulary that masking uses."""

    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    weights: np.ndarray | None = None
    """Sampling weights, float64 [V], positive. None: all tokens are equally likely to be masked."""
    is_continuation: np.ndarray | None = None
    """bool [V]: whether a token continues the word of the token before it. None: no whole-word masking."""

    @cached_property
    def is_special(self) -> np.ndarray:
        flags = np.zeros(self.vocab_size, bool)
        flags[list(self.special_ids)] = True
        return flags

    @cached_property
    def ordinary(self) -> np.ndarray:
        """Ids that are not special, ascending. Random replacements are drawn from them."""
        return np.flatnonzero(~self.is_special)


def mask_vocab(
    masking: Masking, mask_id: int, encoder: Encoder, token_counts: np.ndarray | None = None
) -> MaskVocab:
    """Returns the properties of a tokenizer's vocabulary that ``masking`` needs.

    ``token_counts`` [at most V] are needed for frequency sampling: weight = max(count, 1)^-smoothing (XLM,
    DistilBERT). Raises UserError if whole words are masked and the tokens do not show where words begin.
    """
    size, weights, continuation = encoder.vocab_size, None, None
    if masking.sampling == "frequency":
        assert token_counts is not None
        counts = np.ones(size)
        counts[: len(token_counts)] = np.maximum(token_counts, 1)
        weights = counts**-masking.smoothing
    if masking.whole_word:
        continuation = continuation_flags(encoder.content(), size)
    return MaskVocab(mask_id, encoder.special_ids, size, weights, continuation)


def continuation_flags(tokenizer: Mapping[str, Any], vocab_size: int) -> np.ndarray:
    """Returns bool [V]: whether a token continues a word. ``tokenizer``: the content of a tokenizer.json.

    In WordPiece, such tokens have the prefix ``##``. In byte-level BPE and SentencePiece, they lack the
    character for a space; that includes punctuation. Raises UserError for other tokenizers.
    """
    model = tokenizer["model"]
    ids = model["vocab"]
    if model["type"] == "Unigram":  # a list of (piece, log probability), ordered by id
        ids = {piece: token for token, (piece, _) in enumerate(ids)}
    steps = [tokenizer["pre_tokenizer"] or {"type": None}]
    if steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    steps = [step for step in steps if step["type"] in WORD_STARTS]
    word_starts = [step.get("replacement", WORD_STARTS[step["type"]]) for step in steps]
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        continuing = [token for piece, token in ids.items() if piece.startswith(prefix)]
    elif word_starts:
        continuing = [token for piece, token in ids.items() if not piece.startswith(word_starts[0])]
    else:
        raise UserError(
            f"masking.whole_word: the teacher's tokenizer ({model['type']}) does not show where words begin;"
            " set masking.whole_word: false"
        )
    flags = np.zeros(vocab_size, bool)
    flags[continuing] = True
    return flags


@dataclass(frozen=True)
class Masked:
    """Sequences after masking."""

    input_ids: np.ndarray
    """[B, L]: the input ids after masking."""
    positions: np.ndarray
    """Positions of the masked tokens, int16 [B, M], ascending; -1 in unused slots."""
    labels: np.ndarray
    """Original ids of the masked tokens, [B, M], in the dtype of ``input_ids``; 0 in unused slots."""


def masked_count(length: int, probability: float) -> int:
    """Returns M = ceil(probability * (L - 2)), the number of masked tokens of a sequence without padding."""
    return int(_budgets(length, probability)[length - 2])


@lru_cache(maxsize=16)
def _budgets(length: int, probability: float) -> np.ndarray:
    """Returns ceil(probability * n) for n = 0 .. L: int64 [L + 1]."""
    exact = Fraction(repr(probability))  # the recipe's decimal: rounding of its float could change a ceil
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
    masked. With ``masking.replacement: bert``, 80 % of the masked tokens become [MASK], 10 % a uniformly
    drawn ordinary token, and 10 % stay (BERT, arXiv 1810.04805, section 3.1).

    In whole-word masking, words are drawn until the count is reached. Only as many first tokens of the last
    word are masked as the count allows. With frequency sampling, a word has the weight of its first token. If
    a sequence begins within a word, the rest of that word counts as a word.
    """
    count, length = input_ids.shape
    assert masking.probability, "masking is off, or its probability is not decided yet"
    slots = masked_count(length, masking.probability)
    output = input_ids.copy()
    positions = np.full((count, slots), -1, np.int16)
    labels = np.zeros((count, slots), input_ids.dtype)
    rows = max(1, _BLOCK_POSITIONS // length)
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        ids, draws = input_ids[block], _random_numbers(sequence_ids[block], length, epoch, masking.seed)
        chosen = _draw_positions(ids, token_count[block], draws, slots, masking.probability, vocab)
        outputs = output[block], positions[block], labels[block]
        _apply_masking(*outputs, chosen, draws, vocab, _MASK_BELOW[masking.replacement])
    return Masked(output, positions, labels)


def _draw_positions(
    input_ids: np.ndarray,
    token_count: np.ndarray,
    draws: Sequence[np.ndarray],
    slots: int,
    probability: float,
    vocab: MaskVocab,
) -> np.ndarray:
    """Returns the positions to mask, int64 [b, M], ascending; L in unused slots.

    The tokens with the smallest random sort keys are masked, which draws without replacement. Uniform keys
    draw uniformly; keys -log(u) / w draw in proportion to w (Efraimidis & Spirakis, 2006).
    """
    length = input_ids.shape[1]
    position = np.arange(length, dtype=np.uint64)
    maskable = (position < token_count[:, None]) & ~vocab.is_special[input_ids]
    keys = (draws[0] << _SHIFT_32) | draws[1]
    if vocab.weights is not None:
        uniform = ((keys >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
        # A positive float64 and its bits, read as an integer, are in the same order.
        keys = (-np.log(uniform) / vocab.weights[input_ids]).view(np.uint64)
    if vocab.is_continuation is not None:
        keys = np.take_along_axis(keys, _word_starts(input_ids, maskable, vocab.is_continuation), axis=1)
    keys = (keys & ~_POSITION_MASK) | position
    keys[~maskable] = _LARGEST_KEY
    keys.sort(axis=1)
    budget = _budgets(length, probability)[maskable.sum(axis=1)]
    assert budget.max(initial=0) <= slots, "more maskable tokens than L - 2: [CLS] and [SEP] must be special"
    chosen = (keys[:, :slots] & _POSITION_MASK).astype(np.int64)
    chosen[np.arange(slots) >= budget[:, None]] = length
    chosen.sort(axis=1)
    return chosen


def _word_starts(input_ids: np.ndarray, maskable: np.ndarray, is_continuation: np.ndarray) -> np.ndarray:
    """Returns for each token the position at which its word starts: int64 [b, L]."""
    starts = ~is_continuation[input_ids]
    starts[:, 1:] |= ~maskable[:, :-1]
    starts[:, 0] = True
    first: np.ndarray = np.maximum.accumulate(np.where(starts, np.arange(input_ids.shape[1]), 0), axis=1)
    return first


def _apply_masking(
    output: np.ndarray,
    positions: np.ndarray,
    labels: np.ndarray,
    chosen: np.ndarray,
    draws: Sequence[np.ndarray],
    vocab: MaskVocab,
    mask_below: np.uint64,
) -> None:
    """Writes masked ids, positions and labels of the ``chosen`` positions into the first three arguments."""
    row, slot = np.nonzero(chosen < output.shape[1])
    at = chosen[row, slot]
    original = output[row, at]
    positions[row, slot] = at
    labels[row, slot] = original
    choice, draw = draws[2][row, at], draws[3][row, at]
    # Multiply and shift (Lemire, arXiv 1805.10941) without rejection: probabilities err by at most V / 2^32.
    random = vocab.ordinary[((draw * np.uint64(len(vocab.ordinary))) >> _SHIFT_32).astype(np.int64)]
    kept_or_random = np.where(choice < _RANDOM_BELOW, random, original)
    output[row, at] = np.where(choice < mask_below, vocab.mask_id, kept_or_random)


def _random_numbers(sequence_ids: np.ndarray, length: int, epoch: int, seed: int) -> tuple[np.ndarray, ...]:
    """Returns four arrays of independent random 32-bit numbers, uint64 [b, L], one number per position."""
    shape = (len(sequence_ids), length)
    ids = sequence_ids.astype(np.uint64)[:, None]
    counter = [
        np.broadcast_to(word, shape)
        for word in (np.arange(length, dtype=np.uint64), np.uint64(epoch), ids & _LOW_32, ids >> _SHIFT_32)
    ]
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


def philox(counter: Sequence[np.ndarray], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Returns the four random words that Philox4x32-10 computes from a counter of four words: uint64 arrays
    with values below 2^32. Reproduces the test vectors of Random123 (kat_vectors)."""
    a, b, c, d = counter
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = (product_1 >> _SHIFT_32) ^ b ^ np.uint64(key_0)
        b = product_1 & _LOW_32
        c = (product_0 >> _SHIFT_32) ^ d ^ np.uint64(key_1)
        d = product_0 & _LOW_32
        key_0, key_1 = (key_0 + _WEYL[0]) & 0xFFFFFFFF, (key_1 + _WEYL[1]) & 0xFFFFFFFF
    return a, b, c, d
