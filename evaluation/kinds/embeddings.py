"""Task kinds that score a model's text embeddings without fine-tuning: similarity and retrieval.

A text's embedding is the mean of its tokens' last hidden states, or the first token's last hidden state
(``pooling: cls``). Two embeddings are compared by their cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from evaluation.kinds.base import Kind, Metric, Predict
from evaluation.kinds.texts import Regression
from evaluation.measures import resampling
from evaluation.measures.model_outputs import Answers
from evaluation.measures.ranking import ndcg, recall
from evaluation.tasks.task import Split, Task
from infra.control_tokens import tokenize

if TYPE_CHECKING:
    import torch


RETRIEVED = 100
"""Number of documents in each query's ranking."""


class Embedding(Kind):
    """Base class of kinds that compare embeddings."""

    fine_tuned = False
    exportable = False
    auto_class = "AutoModel"

    def select_outputs(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        """Returns both poolings, float32 [B, 2, D]: the mean over tokens, and the first token's state."""
        import torch

        states = output.last_hidden_state.float()
        weights = mask.to(states.dtype)[..., None]
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
        return torch.stack([mean, states[:, 0]], dim=1)

    def embeddings(
        self, predict: Predict, tokenizer: Any, task: Task, texts: Sequence[str], length: int
    ) -> np.ndarray:
        """Returns the texts' embeddings with unit L2 norm, float32 [n, D]."""
        from evaluation.tasks.encoded import Encoded

        output = tokenize(tokenizer, list(texts), truncation=True, max_length=length)
        rows = predict(Encoded(output["input_ids"], output["token_type_ids"]))
        pooled = np.stack([row[0 if task.pooling == "mean" else 1] for row in rows])
        return pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)


class Similarity(Embedding, Regression):
    name = "similarity"
    metrics = ("spearman", "pearson")

    def head_config(self, task: Task) -> dict[str, Any]:
        return {}

    def answers(self, predict: Predict, tokenizer: Any, task: Task, split: Split, length: int) -> Answers:
        columns = zip(*split.texts, strict=True)
        first, second = (self.embeddings(predict, tokenizer, task, texts, length) for texts in columns)
        return Answers(split.labels, (first * second).sum(axis=1), split.ids)


class Retrieval(Embedding):
    name = "retrieval"
    label_type = pa.list_(pa.struct([("id", pa.string()), ("grade", pa.float32())]))
    output_type = pa.list_(pa.struct([("id", pa.string()), ("score", pa.float32())]))
    metrics = ("ndcg_10", "recall_100")
    version = 1

    def answers(self, predict: Predict, tokenizer: Any, task: Task, split: Split, length: int) -> Answers:
        """Ranks the documents for each query. A document with the query's id is left out, as in BEIR's
        evaluation, unless it is judged: in sets such as ArguAna queries are documents, too."""
        ids = np.asarray(list(split.corpus))
        documents = self.embeddings(predict, tokenizer, task, list(split.corpus.values()), length)
        queries = self.embeddings(predict, tokenizer, task, [text for (text,) in split.texts], length)
        rankings = []
        for name, judged, query in zip(split.ids, split.labels, queries, strict=True):
            scores = documents @ query
            if name not in judged:
                scores[ids == name] = -np.inf
            best = np.argsort(-scores, kind="stable")[:RETRIEVED]
            rankings.append([(str(ids[row]), float(scores[row])) for row in best if scores[row] > -np.inf])
        return Answers(split.labels, rankings, split.ids)

    def decide(self, outputs: Sequence[Sequence[tuple[str, float]]]) -> list[list[str]]:
        return [[document for document, _ in ranking] for ranking in outputs]

    def weighted_metrics(self, task: Task, answers: Answers) -> Mapping[str, Metric]:
        metrics = {"ndcg_10": partial(ndcg, depth=10), "recall_100": partial(recall, depth=100)}
        pairs = list(zip(self.decide(answers.outputs), answers.labels, strict=True))
        scored = {name: [metrics[name](*pair) for pair in pairs] for name in task.metrics}
        return {name: partial(resampling.average, np.asarray(values)) for name, values in scored.items()}

    def all_finite(self, outputs: Sequence[Sequence[tuple[str, float]]]) -> bool:
        return all(np.isfinite(score) for ranking in outputs for _, score in ranking)

    def to_arrow(self, values: Sequence[Any]) -> list[Any]:
        if isinstance(values[0], Mapping):
            return [[{"id": name, "grade": grade} for name, grade in row.items()] for row in values]
        return [[{"id": name, "score": score} for name, score in row] for row in values]

    def labels_from_arrow(self, column: list[Any]) -> list[dict[str, float]]:
        return [{entry["id"]: entry["grade"] for entry in row} for row in column]

    def outputs_from_arrow(self, column: list[Any]) -> list[list[tuple[str, float]]]:
        return [[(entry["id"], entry["score"]) for entry in row] for row in column]
