"""The registry of task kinds: name -> the object that implements the kind (docs/extending.md)."""

from __future__ import annotations

from evaluation.kinds.base import Kind
from evaluation.kinds.embeddings import Retrieval, Similarity
from evaluation.kinds.spans import Spans
from evaluation.kinds.texts import Classification, MultiLabel, Regression
from evaluation.kinds.tokens import Tokens
from evaluation.tasks.task import Task

_KINDS = (Classification(), MultiLabel(), Regression(), Tokens(), Spans(), Similarity(), Retrieval())
KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}


def kind_of(task: Task) -> Kind:
    """Returns the object that implements the task's kind."""
    return KINDS[task.kind]
