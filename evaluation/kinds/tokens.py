"""Token classification: every word gets a tag, and whole entities are scored.

A word's tag is predicted at its first token; loss and predictions ignore its other tokens. Words that are cut
off at the model's maximal length get the tag ``O``, so truncation lowers the score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from evaluation.kinds.base import TEACHER_LOGITS, Kind, Metric, Predict, kl
from evaluation.kinds.texts import class_config
from evaluation.measures.entities import entity_counts
from evaluation.measures.metrics import f1_of, of_sums, precision_of, recall_of
from evaluation.measures.model_outputs import Answers
from evaluation.tasks.examples import OUTSIDE
from evaluation.tasks.task import Split, Task
from infra.control_tokens import tokenize

if TYPE_CHECKING:
    import torch

    from evaluation.tasks.encoded import Encoded, Targets

NO_LABEL = -100
"""Label of tokens that the loss ignores."""


class Tokens(Kind):
    name = "tokens"
    exportable = False
    per_token = True
    auto_class = "AutoModelForTokenClassification"
    label_type, output_type = pa.list_(pa.int64()), pa.list_(pa.list_(pa.float32()))
    metrics = ("entity_f1", "entity_precision", "entity_recall")

    def head_config(self, task: Task) -> dict[str, Any]:
        return class_config(task)

    def encode(self, tokenizer: Any, task: Task, split: Split, length: int) -> Encoded:
        from evaluation.tasks.encoded import Encoded

        output = self._tokenize(tokenizer, split, length)
        rows = self._positions(split, output)
        targets = {}
        if split.labels is not None:
            width = max(map(len, output["input_ids"]))
            targets["label"] = np.full((len(rows), width), NO_LABEL, np.int64)
            for row, (firsts, tags) in enumerate(zip(rows, split.labels, strict=True)):
                kept = firsts >= 0
                targets["label"][row, firsts[kept]] = tags[kept]
        return Encoded(output["input_ids"], output["token_type_ids"], targets)

    def _tokenize(self, tokenizer: Any, split: Split, length: int) -> Any:
        texts = [" ".join(words) for words in split.texts]
        return tokenize(tokenizer, texts, truncation=True, max_length=length, return_offsets_mapping=True)

    def _positions(self, split: Split, output: Any) -> list[np.ndarray]:
        offsets = (np.asarray(row, np.int64).reshape(-1, 2) for row in output["offset_mapping"])
        return [_first_tokens(*pair) for pair in zip(split.texts, offsets, strict=True)]

    def loss(self, output: Any, targets: Targets) -> torch.Tensor:
        from torch.nn import functional

        labels = targets["label"][:, : output.logits.shape[1]].flatten()
        logits = output.logits.float().flatten(0, 1)
        return functional.cross_entropy(logits, labels, ignore_index=NO_LABEL)

    def soft_loss(self, output: Any, targets: Targets, temperature: float) -> torch.Tensor:
        width = output.logits.shape[1]
        labelled = targets["label"][:, :width] != NO_LABEL
        return kl(output.logits.float()[labelled], targets[TEACHER_LOGITS][:, :width][labelled], temperature)

    def output_shape(self, task: Task, length: int) -> tuple[int, ...]:
        return (length, len(task.labels))

    def answers(self, predict: Predict, tokenizer: Any, task: Task, split: Split, length: int) -> Answers:
        logits = predict(self.encode(tokenizer, task, split, length))
        rows = self._positions(split, self._tokenize(tokenizer, split, length))
        outside = task.labels.index(OUTSIDE)
        outputs = []
        for firsts, row in zip(rows, logits, strict=True):
            values = row[np.maximum(firsts, 0)].astype(np.float32)
            values[firsts < 0] = np.arange(len(task.labels)) == outside
            outputs.append(values)
        return Answers(split.labels, outputs, split.ids)

    def decide(self, outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [row.argmax(axis=1) for row in outputs]

    def weighted_metrics(self, task: Task, answers: Answers) -> Mapping[str, Metric]:
        names = np.asarray(task.labels)
        pairs = zip(self.decide(answers.outputs), answers.labels, strict=True)
        counts = np.asarray([entity_counts(names[tags], names[gold]) for tags, gold in pairs], np.float64)
        metrics = {"entity_f1": f1_of, "entity_precision": precision_of, "entity_recall": recall_of}
        return {name: partial(of_sums, metrics[name], counts) for name in task.metrics}

    def to_arrow(self, values: Sequence[np.ndarray]) -> list[Any]:
        return [list(row) for row in values]

    def labels_from_arrow(self, column: list[Any]) -> list[np.ndarray]:
        return [np.asarray(row, np.int64) for row in column]

    def outputs_from_arrow(self, column: list[Any]) -> list[np.ndarray]:
        return [np.asarray(row, np.float32) for row in column]


def _first_tokens(words: Sequence[str], offsets: np.ndarray) -> np.ndarray:
    """Returns the position of each word's first token, int64 [words]; -1 for a word that was cut off.

    ``offsets``: int64 [L, 2], where each token begins and ends in the words joined by spaces; (0, 0) for
    special tokens.
    """
    lengths = np.asarray([len(word) for word in words], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    firsts = np.full(len(words), -1, np.int64)
    real = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    owners = np.searchsorted(starts, offsets[real, 1] - 1, side="right") - 1
    for token, owner in zip(real[::-1], owners[::-1], strict=True):
        if offsets[token, 0] < starts[owner] + lengths[owner]:
            firsts[owner] = token
    return firsts
