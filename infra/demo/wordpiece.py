"""A WordPiece vocabulary that is the same every time it is made.

``tokenizers``' own trainer counts in hash maps with random seeds and breaks ties by their order: two demos
would have two vocabularies, two teachers and two stores, and a stopped demo could not be compared with one
left alone. The algorithm is its own: byte-pair merges (arXiv 1508.07909) over pieces that begin with ``##``
within a word; ties go to the pair that sorts first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

INSIDE = "##"
Pair = tuple[str, str]


def wordpiece_vocabulary(words: Mapping[str, int], size: int, special: list[str]) -> list[str]:
    """``special``, the pieces of one letter, then the most frequent merges, up to ``size`` entries.

    ``words``: how often each word occurs.
    """
    pieces = {word: [word[0], *(INSIDE + letter for letter in word[1:])] for word in sorted(words)}
    vocabulary = special + sorted({piece for word in pieces.values() for piece in word})
    counts: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[str]] = defaultdict(set)
    for word, parts in pieces.items():
        for pair in zip(parts, parts[1:], strict=False):
            counts[pair] += words[word]
            where[pair].add(word)
    while len(vocabulary) < size and counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merged = best[0] + best[1].removeprefix(INSIDE)
        vocabulary.append(merged)
        for word in where.pop(best):
            before = pieces[word]
            pieces[word] = after = _merge(before, best, merged)
            for pair in zip(before, before[1:], strict=False):
                counts[pair] -= words[word]
            for pair in zip(after, after[1:], strict=False):
                counts[pair] += words[word]
                where[pair].add(word)
        counts = +counts  # without the pairs that are gone
    return vocabulary


def _merge(parts: list[str], pair: Pair, merged: str) -> list[str]:
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] = merged
        else:
            found.append(part)
    return found
