"""A keyed permutation of [0, n) with random access: every element is computed when needed, none is stored.

A store of 100 billion tokens has tens of millions of blocks. A stored permutation of them would take
hundreds of megabytes on every rank.

A balanced Feistel network (Luby and Rackoff 1988) permutes [0, 4^b). Repeating it until the result is below n
gives a permutation of [0, n) ("cycle walking", Black and Rogaway, CT-RSA 2002). 4^b < 4 n, so a
value takes fewer than four applications on average.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_ROUNDS = 6
_WORD = (1 << 64) - 1


def permute(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """Returns the elements at ``positions`` [m] of the permutation of [0, n) with this key: int64 [m]."""
    return _cycle_walk(positions, n, _round_keys(key), inverse=False)


def positions_of(elements: np.ndarray, n: int, key: int) -> np.ndarray:
    """Returns the positions of ``elements`` [m] in the permutation: int64 [m], the inverse of ``permute``."""
    return _cycle_walk(elements, n, _round_keys(key), inverse=True)


def mix(words: np.ndarray) -> np.ndarray:
    """Returns splitmix64 of uint64 words (Steele et al. 2014; https://prng.di.unimi.it/splitmix64.c)."""
    z = words + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def mix_int(word: int) -> int:
    """Returns splitmix64 of one Python integer; see ``mix``."""
    z = (word + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def _cycle_walk(values: np.ndarray, n: int, keys: list[np.uint64], inverse: bool) -> np.ndarray:
    """Applies the network to every value, and again to results that are not below n."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    result = _feistel(values.astype(np.uint64), half_bits, keys, inverse)
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], half_bits, keys, inverse)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, keys: list[np.uint64], inverse: bool) -> np.ndarray:
    """Permutes [0, 4^half_bits), with one round per key."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    if inverse:
        for key in reversed(keys):
            left, right = right ^ (mix(left ^ key) & mask), left
    else:
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << shift) | right


@lru_cache(maxsize=16)
def _round_keys(key: int) -> list[np.uint64]:
    return [np.uint64(mix_int((key + number) & _WORD)) for number in range(_ROUNDS)]
