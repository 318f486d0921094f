from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers

from infra.errors import UserError
from infra.settings.sections import Masking
from offline_teacher.sequences.masking import (
    MaskVocab,
    continuation_flags,
    mask_sequences,
    mask_vocab,
    masked_count,
    philox,
)

V, MASK, SPECIAL = 1000, 4, (0, 1, 2, 3, 4)
PLAIN = MaskVocab(MASK, SPECIAL, V)


def wordpiece(pieces: Sequence[str], prefix: str = "##") -> dict[str, Any]:
    """As in a tokenizer.json."""
    vocab = {piece: token for token, piece in enumerate(pieces)}
    model = {"type": "WordPiece", "continuing_subword_prefix": prefix, "vocab": vocab}
    return {"model": model, "pre_tokenizer": {"type": "BertPreTokenizer"}}


def vocab_of(
    masking: Masking, size: int, counts: np.ndarray | None = None, tokenizer: dict[str, Any] | None = None
) -> MaskVocab:
    """Of a tokenizer of ``size`` tokens; ``tokenizer``: its content."""
    encoder: Any = SimpleNamespace(special_ids=SPECIAL, vocab_size=size, content=lambda: tokenizer)
    return mask_vocab(masking, MASK, encoder, counts)


def batch(count: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences of every fill, ids from 5 on between [CLS] = 2 and [SEP] = 3, pad = 0."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(5, V, (count, length)).astype(np.uint16)
    token_count = rng.integers(2, length + 1, count).astype(np.uint16)
    input_ids[np.arange(length) >= token_count[:, None]] = 0
    input_ids[:, 0] = 2
    input_ids[np.arange(count), token_count - 1] = 3
    return input_ids, token_count, np.arange(count, dtype=np.int64)


def full(count: int, length: int, token: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    input_ids = np.full((count, length), token, np.uint16)
    input_ids[:, 0], input_ids[:, -1] = 2, 3
    return input_ids, np.full(count, length, np.uint16), np.arange(count, dtype=np.int64)


@pytest.mark.parametrize(
    ("word", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(
    word: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    got = philox([np.array([w], np.uint64) for w in word], key)
    assert tuple(int(w[0]) for w in got) == expected


@given(
    count=st.integers(1, 9),
    length=st.integers(8, 512),
    probability=st.sampled_from([0.01, 0.15, 0.3, 0.5]),
    whole_word=st.booleans(),
    frequency=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 999),
)
def test_exact_counts_and_no_special_token_for_any_shape(
    count: int, length: int, probability: float, whole_word: bool, frequency: bool, seed: int, epoch: int
) -> None:
    input_ids, token_count, ids = batch(count, length, seed % 1000)
    masking = Masking(
        probability=probability,
        seed=seed,
        whole_word=whole_word,
        sampling="frequency" if frequency else "uniform",
    )
    tokens = [("##" if token % 3 == 0 else "") + str(token) for token in range(V)]
    vocab = vocab_of(masking, V, np.arange(V), wordpiece(tokens))
    before = input_ids.copy()
    got = mask_sequences(input_ids, token_count, ids, epoch, masking, vocab)

    slots = masked_count(length, probability)
    assert got.positions.shape == got.labels.shape == (count, slots)
    assert got.positions.dtype == np.int16
    assert got.labels.dtype == got.input_ids.dtype == np.uint16
    np.testing.assert_array_equal(input_ids, before)
    for row in range(count):
        used = got.positions[row][got.positions[row] >= 0]
        assert len(used) == ceil(Fraction(repr(probability)) * (int(token_count[row]) - 2))
        assert (np.diff(used) > 0).all()
        assert (got.positions[row][len(used) :] == -1).all()
        assert (got.labels[row][len(used) :] == 0).all()
        assert not np.isin(before[row][used], SPECIAL).any()
        np.testing.assert_array_equal(got.labels[row][: len(used)], before[row][used])
        untouched = np.setdiff1d(np.arange(length), used)
        np.testing.assert_array_equal(got.input_ids[row][untouched], before[row][untouched])


def test_a_probability_means_its_decimal() -> None:
    # In floating point 0.07 * 100 is above 7, and its ceil 8.
    assert masked_count(102, 0.07) == 7
    assert masked_count(128, 0.15) == 19


def test_the_mask_is_the_same_in_any_batch_and_order() -> None:
    input_ids, token_count, ids = batch(300, 64)
    masking = Masking(probability=0.15, seed=5)
    whole = mask_sequences(input_ids, token_count, ids, 3, masking, PLAIN)
    order = np.random.default_rng(1).permutation(300)
    for rows in (order, order[:7], np.array([299])):
        some = mask_sequences(input_ids[rows], token_count[rows], ids[rows], 3, masking, PLAIN)
        np.testing.assert_array_equal(some.input_ids, whole.input_ids[rows])
        np.testing.assert_array_equal(some.positions, whole.positions[rows])
        np.testing.assert_array_equal(some.labels, whole.labels[rows])


def test_uniform_masks_are_these_on_every_platform() -> None:
    """A change here changes every store: raise the format version with it."""
    sequence, epoch, seed = 2**40 + 3, 1, 2**40 + 1
    input_ids, token_count, _ = full(1, 16)
    got = mask_sequences(
        input_ids, token_count, np.array([sequence]), epoch, Masking(probability=0.15, seed=seed), PLAIN
    )
    keys = {}
    for position in range(1, 15):
        counter = [position, epoch, sequence % 2**32, sequence >> 32]
        words = plain_philox(counter, [seed % 2**32, seed >> 32])
        keys[(words[0] << 32 | words[1]) >> 9] = position
    expected = sorted(keys[key] for key in sorted(keys)[:3])
    assert got.positions.tolist() == [expected] == [[7, 13, 14]]


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """As in the paper's section 3.3, one word at a time."""
    for _ in range(10):
        high_0, low_0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high_1, low_1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def test_eighty_ten_ten() -> None:
    input_ids, token_count, ids = full(4000, 128)
    got = mask_sequences(input_ids, token_count, ids, 0, Masking(probability=0.15), PLAIN)
    masked = np.take_along_axis(got.input_ids, got.positions.astype(np.int64), axis=1).ravel()
    random = masked[(masked != MASK) & (masked != 7)]
    observed = [(masked == MASK).sum(), len(random), (masked == 7).sum()]
    ordinary = V - len(SPECIAL)
    by_chance = 0.1 / ordinary  # a random token may be the original one
    expected = np.array([0.8, 0.1 - by_chance, 0.1 + by_chance]) * len(masked)
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    counts = np.bincount(random, minlength=V)
    assert counts[list(SPECIAL)].sum() == 0
    assert stats.chisquare(np.delete(counts, [*SPECIAL, 7])).pvalue > 1e-3


def test_every_masked_token_becomes_the_mask_token_and_positions_stay() -> None:
    """Only the replacement differs from BERT's rule, so that the two can be compared at equal positions."""
    input_ids, token_count, ids = batch(50, 64)
    bert = Masking(probability=0.15)
    usual = mask_sequences(input_ids, token_count, ids, 0, bert, PLAIN)
    got = mask_sequences(input_ids, token_count, ids, 0, replace(bert, replacement="mask"), PLAIN)
    np.testing.assert_array_equal(got.positions, usual.positions)
    np.testing.assert_array_equal(got.labels, usual.labels)
    expected = input_ids.copy()
    row, slot = np.nonzero(got.positions >= 0)
    expected[row, got.positions[row, slot]] = MASK
    np.testing.assert_array_equal(got.input_ids, expected)


@pytest.mark.parametrize("step", ["sequence", "epoch", "seed"])
def test_positions_are_uniform_and_neighbours_independent(step: str) -> None:
    count, length = 4000, 66
    input_ids, token_count, ids = full(count, length)
    first = mask_sequences(input_ids, token_count, ids, 0, Masking(probability=0.15), PLAIN)
    other = mask_sequences(
        input_ids,
        token_count,
        ids + (step == "sequence"),
        int(step == "epoch"),
        Masking(probability=0.15, seed=int(step == "seed")),
        PLAIN,
    )
    hit = np.zeros((2, count, length), bool)
    for index, got in enumerate((first, other)):
        np.put_along_axis(hit[index], got.positions.astype(np.int64), True, axis=1)
    hit = hit[:, :, 1:-1]
    share = masked_count(length, 0.15) / 64
    # Positions of a row exclude each other a little, which takes 1/64 of the statistic's degrees.
    uniform = ((hit[1].sum(0) - count * share) ** 2).sum() / (count * share * (1 - share)) * 63 / 64
    assert 1e-3 < stats.chi2.sf(uniform, 63) < 1 - 1e-3
    both = int((hit[0] & hit[1]).sum())
    expected = count * 64 * share**2
    # Overlap of two independent draws of m in 64: hypergeometric in each row.
    variance = count * stats.hypergeom(64, round(64 * share), round(64 * share)).var()
    assert abs(both - expected) < 4 * variance**0.5


def test_frequency_sampling_agrees_with_successive_draws_in_float64() -> None:
    length, count = 8, 20000
    input_ids = np.tile(np.array([2, 10, 11, 12, 13, 14, 15, 3], np.uint16), (count, 1))
    counts = np.zeros(V, np.int64)
    counts[10:16] = [0, 1, 10, 100, 1000, 10000]
    masking = Masking(probability=0.3, sampling="frequency", smoothing=0.5)
    vocab = vocab_of(masking, V, counts)
    got = mask_sequences(
        input_ids, np.full(count, length, np.uint16), np.arange(count), 0, masking, vocab
    ).positions
    assert got.shape[1] == 2
    weights = np.array([1, 1, 10**-0.5, 0.1, 1000**-0.5, 0.01])
    expected = {}
    for a in range(6):
        for b in range(a + 1, 6):
            total = weights.sum()
            expected[a + 1, b + 1] = weights[a] / total * weights[b] / (total - weights[a]) + weights[
                b
            ] / total * weights[a] / (total - weights[b])
    observed = [(got == pair).all(axis=1).sum() for pair in expected]
    assert stats.chisquare(observed, np.array(list(expected.values())) * count).pvalue > 1e-3


def test_whole_words_are_masked_whole_but_for_the_last() -> None:
    # Words of 1, 2, 3 and 4 tokens: a | b ##b | c ##c ##c | d ##d ##d ##d
    tokens = [*(f"[{n}]" for n in range(5)), "a", "b", "##b", "c", "##c", "d", "##d"]
    row = [2, 5, 6, 7, 8, 9, 9, 10, 11, 11, 11, 3]
    words = [{1}, {2, 3}, {4, 5, 6}, {7, 8, 9, 10}]
    count = 500
    masking = Masking(probability=0.5, whole_word=True)
    vocab = vocab_of(masking, len(tokens), tokenizer=wordpiece(tokens))
    got = mask_sequences(
        np.tile(np.array(row, np.uint16), (count, 1)),
        np.full(count, len(row), np.uint16),
        np.arange(count),
        0,
        masking,
        vocab,
    )
    seen = set()
    for positions in got.positions.tolist():
        chosen = set(positions)
        assert len(chosen) == 5
        touched = [word for word in words if word & chosen]
        cut = [word for word in touched if not word <= chosen]
        assert len(cut) <= 1
        assert all(sorted(word & chosen) == sorted(word)[: len(word & chosen)] for word in cut)
        seen.add(frozenset(min(word) for word in touched))
    assert len(seen) > 3


def test_continuations_of_wordpiece() -> None:
    """A letter is not taken for another kind's mark of a space: Maltese begins words with this one."""
    assert continuation_flags(wordpiece(["un", "##able", "\u0121", "\u0120", "!"]), 6).tolist() == [
        False, True, False, False, False, False,
    ]  # fmt: skip
    assert continuation_flags(wordpiece(["un", "@able", "##x"], prefix="@"), 3).tolist() == [
        False,
        True,
        False,
    ]


def _tokenizer(model: Any, pre_tokenizer: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def test_continuations_of_marked_spaces() -> None:
    byte_level = models.BPE({"\u0120un": 0, "able": 1, "\u0120the": 2, "!": 3}, [])
    content = _tokenizer(byte_level, pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert continuation_flags(content, 4).tolist() == [False, True, False, True]
    pieces = models.Unigram([("<unk>", 0.0), ("\u2581un", -1.0), ("able", -2.0), ("\u2581", -3.0)], unk_id=0)
    both = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    for pre_tokenizer in (both, pre_tokenizers.Metaspace()):
        flags = continuation_flags(_tokenizer(pieces, pre_tokenizer), 4).tolist()
        assert flags[1:] == [False, True, False]


def test_a_tokenizer_that_does_not_tell_words_is_refused() -> None:
    for pre_tokenizer in (None, pre_tokenizers.Whitespace()):
        content = _tokenizer(models.WordLevel({"a": 0}, unk_token="a"), pre_tokenizer)
        with pytest.raises(UserError, match=r"masking\.whole_word: the teacher's tokenizer \(WordLevel\)"):
            continuation_flags(content, 1)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"probability": 0.3}, {"sampling": "frequency"}, {"whole_word": True}]
)
def test_every_setting_has_an_effect(change: dict[str, Any]) -> None:
    input_ids, token_count, ids = batch(20, 64)
    tokens = wordpiece([f"##{token}" if token % 2 else str(token) for token in range(V)])

    def positions(masking: Masking) -> list:
        vocab = vocab_of(masking, V, np.arange(V) ** 3, tokens)
        return mask_sequences(input_ids, token_count, ids, 0, masking, vocab).positions.tolist()

    usual = Masking(probability=0.15)
    assert positions(usual) != positions(replace(usual, **change))
