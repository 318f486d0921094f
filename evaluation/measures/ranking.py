"""Scores of a ranking of documents, as trec_eval and BEIR (arXiv 2104.08663) define them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def ndcg(ranking: Sequence[str], grades: Mapping[str, float], depth: int) -> float:
    """nDCG of the first ``depth`` documents: gain = grade, discount log2(rank + 1); 0.0 if none is relevant.

    ranking: ids, the best first. grades: of the judged documents; a document without a grade has 0. A
    negative grade counts as 0.
    """
    ideal = _gain(sorted(grades.values(), reverse=True)[:depth])
    return _gain([grades.get(document, 0.0) for document in ranking[:depth]]) / ideal if ideal else 0.0


def _gain(grades: Sequence[float]) -> float:
    return math.fsum(max(grade, 0.0) / math.log2(rank + 2) for rank, grade in enumerate(grades))


def recall(ranking: Sequence[str], grades: Mapping[str, float], depth: int) -> float:
    """The share of the relevant documents (grade > 0) among the first ``depth``; 0.0 if there is none."""
    relevant = {document for document, grade in grades.items() if grade > 0}
    return len(relevant.intersection(ranking[:depth])) / len(relevant) if relevant else 0.0
