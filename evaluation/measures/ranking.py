"""Computes metrics of ranked documents as trec_eval and BEIR (arXiv 2104.08663) define them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def ndcg(ranking: Sequence[str], grades: Mapping[str, float], depth: int) -> float:
    """Returns nDCG of the first ``depth`` documents, with gain = grade and discount log2(rank + 1).

    ranking: ids of documents, the best first. grades: id -> grade; a missing or negative grade counts as 0.
    nDCG is 0.0 if no document has a positive grade.
    """
    ideal = _gain(sorted(grades.values(), reverse=True)[:depth])
    return _gain([grades.get(document, 0.0) for document in ranking[:depth]]) / ideal if ideal else 0.0


def _gain(grades: Sequence[float]) -> float:
    return math.fsum(max(grade, 0.0) / math.log2(rank + 2) for rank, grade in enumerate(grades))


def recall(ranking: Sequence[str], grades: Mapping[str, float], depth: int) -> float:
    """Returns the share of the relevant documents (grade > 0) that are among the first ``depth``, or 0.0."""
    relevant = {document for document, grade in grades.items() if grade > 0}
    return len(relevant.intersection(ranking[:depth])) / len(relevant) if relevant else 0.0
