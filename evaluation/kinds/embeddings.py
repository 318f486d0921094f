"""Kinds that use a model's text vectors as they are, without fine-tuning: similarity and retrieval.

A vector is the mean of the last hidden states of a text's tokens, or that of its first token (``pooling:
cls``). Two vectors are compared by their cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from evaluation.kinds.kind import Kind, Metric, Predict
from evaluation.kinds.texts import Regression
from evaluation.measures import resampling
from evaluation.measures.answers import Answers
from evaluation.measures.ranking import ndcg, recall
from evaluation.tasks.task import Split, Task
from infra.control_tokens import tokenize

if TYPE_CHECKING:
    import torch


RETRIEVED = 100
"""Documents that are kept of each query's ranking."""


class Embedding(Kind):
    trained = False
    device = False
    family = "AutoModel"

    def read(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        """float32 [B, 2, D]: the mean state of a text's tokens, and the first token's."""
        import torch

        states = output.last_hidden_state.float()
        weights = mask.to(states.dtype)[..., None]
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
        return torch.stack([mean, states[:, 0]], dim=1)

    def vectors(
        self, predict: Predict, tokenizer: Any, task: Task, texts: Sequence[str], length: int
    ) -> np.ndarray:
        """Unit vectors, float32 [n, D]."""
        from evaluation.finetuning.training import Encoded

        output = tokenize(tokenizer, list(texts), truncation=True, max_length=length)
        rows = predict(Encoded(output["input_ids"], output["token_type_ids"]))
        found = np.stack([row[0 if task.pooling == "mean" else 1] for row in rows])
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


class Similarity(Embedding, Regression):
    name = "similarity"
    metrics = ("spearman", "pearson")

    def head(self, task: Task) -> dict[str, Any]:
        return {}

    def answers(self, predict: Predict, tokenizer: Any, task: Task, split: Split, length: int) -> Answers:
        first, second = (
            self.vectors(predict, tokenizer, task, column, length)
            for column in zip(*split.texts, strict=True)
        )
        return Answers(split.labels, (first * second).sum(axis=1), split.ids)


class Retrieval(Embedding):
    name = "retrieval"
    label_type = pa.list_(pa.struct([("id", pa.string()), ("grade", pa.float32())]))
    output_type = pa.list_(pa.struct([("id", pa.string()), ("score", pa.float32())]))
    metrics = ("ndcg_10", "recall_100")

    def answers(self, predict: Predict, tokenizer: Any, task: Task, split: Split, length: int) -> Answers:
        ids = np.asarray(list(split.corpus))
        documents = self.vectors(predict, tokenizer, task, list(split.corpus.values()), length)
        queries = self.vectors(predict, tokenizer, task, [text for (text,) in split.texts], length)
        found = []
        for query in queries:
            scores = documents @ query
            best = np.argsort(-scores, kind="stable")[:RETRIEVED]
            found.append([(str(ids[place]), float(scores[place])) for place in best])
        return Answers(split.labels, found, split.ids)

    def decide(self, outputs: Sequence[Sequence[tuple[str, float]]]) -> list[list[str]]:
        return [[document for document, _ in ranking] for ranking in outputs]

    def resampled(self, task: Task, answers: Answers) -> Mapping[str, Metric]:
        every = {"ndcg_10": partial(ndcg, depth=10), "recall_100": partial(recall, depth=100)}
        pairs = list(zip(self.decide(answers.outputs), answers.labels, strict=True))
        return {
            name: partial(resampling.average, np.asarray([every[name](*pair) for pair in pairs]))
            for name in task.metrics
        }

    def require_finite(self, outputs: Sequence[Sequence[tuple[str, float]]]) -> bool:
        return all(np.isfinite(score) for ranking in outputs for _, score in ranking)

    def to_arrow(self, values: Sequence[Any]) -> list[Any]:
        if isinstance(values[0], Mapping):
            return [[{"id": name, "grade": grade} for name, grade in row.items()] for row in values]
        return [[{"id": name, "score": score} for name, score in row] for row in values]

    def labels_of(self, column: list[Any]) -> list[dict[str, float]]:
        return [{entry["id"]: entry["grade"] for entry in row} for row in column]

    def outputs_of(self, column: list[Any]) -> list[list[tuple[str, float]]]:
        return [[(entry["id"], entry["score"]) for entry in row] for row in column]
