"""Kinds with one output for a text or a pair of texts: classification, several labels, regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from evaluation.kinds.kind import TEACHER, Kind, Metric, Predict
from evaluation.measures import resampling
from evaluation.measures.answers import Answers
from evaluation.measures.metrics import METRICS, class_counts, f1_of, macro_f1_of, of_sums
from evaluation.tasks.task import Split, Task
from infra.control_tokens import tokenize

if TYPE_CHECKING:
    import torch

    from evaluation.finetuning.training import Encoded, Targets


class TextKind(Kind):
    """A text or a pair of texts, with one row of logits."""

    def encode(self, tokenizer: Any, task: Task, split: Split, length: int) -> Encoded:
        from evaluation.finetuning.training import Encoded

        columns = [list(column) for column in zip(*split.texts, strict=True)]
        output = tokenize(tokenizer, *columns, truncation=True, max_length=length)
        targets = {} if split.labels is None else {"label": split.labels}
        return Encoded(output["input_ids"], output["token_type_ids"], targets)

    def answers(self, predict: Predict, tokenizer: Any, task: Task, split: Split, length: int) -> Answers:
        outputs = np.stack(predict(self.encode(tokenizer, task, split, length)))
        return Answers(split.labels, self.flat(outputs), split.ids)

    def flat(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs as predictions hold them, of logits [n, C]."""
        return outputs

    def outputs_of(self, column: list[Any]) -> np.ndarray:
        return np.asarray(column, np.float32)


class Classification(TextKind):
    name = "classification"
    label_type, output_type = pa.int64(), pa.list_(pa.float32())
    metrics = ("accuracy", "f1", "macro_f1", "matthews")

    def head(self, task: Task) -> dict[str, Any]:
        return classes_of(task) | {"problem_type": "single_label_classification"}

    def loss(self, output: Any, targets: Targets) -> torch.Tensor:
        from torch.nn import functional

        return functional.cross_entropy(output.logits.float(), targets["label"])

    def soft_loss(self, output: Any, targets: Targets, temperature: float) -> torch.Tensor:
        from evaluation.finetuning.distillation import kl

        return kl(output.logits.float(), targets[TEACHER], temperature)

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        return outputs.argmax(axis=1)

    def score(self, task: Task, answers: Answers) -> dict[str, float]:
        predicted, one = self.decide(answers.outputs), np.ones((len(answers), 1))
        return {
            name: METRICS[name](predicted, answers.labels)
            if name in METRICS
            else float(self._metric(name, task, predicted, answers.labels)(one)[0])
            for name in task.metrics
        }

    def resampled(self, task: Task, answers: Answers) -> Mapping[str, Metric]:
        predicted = self.decide(answers.outputs)
        return {name: self._metric(name, task, predicted, answers.labels) for name in task.metrics}

    def _metric(self, name: str, task: Task, predicted: np.ndarray, labels: np.ndarray) -> Metric:
        if name != "macro_f1":
            return partial(resampling.METRICS[name], predicted, labels)
        classes = np.arange(len(task.labels))
        counts = class_counts(predicted[:, None] == classes, labels[:, None] == classes)
        return partial(of_sums, macro_f1_of, counts)

    def labels_of(self, column: list[Any]) -> np.ndarray:
        return np.asarray(column, np.int64)


class MultiLabel(TextKind):
    """Any number of the labels; one of them is predicted where its logit is above 0."""

    name = "multilabel"
    label_type, output_type = pa.list_(pa.int8()), pa.list_(pa.float32())
    metrics = ("micro_f1", "macro_f1", "exact_match")

    def head(self, task: Task) -> dict[str, Any]:
        return classes_of(task) | {"problem_type": "multi_label_classification"}

    def loss(self, output: Any, targets: Targets) -> torch.Tensor:
        from torch.nn import functional

        logits = output.logits.float()
        return functional.binary_cross_entropy_with_logits(logits, targets["label"].to(logits.dtype))

    def soft_loss(self, output: Any, targets: Targets, temperature: float) -> torch.Tensor:
        """T^2 times the mean over labels of the KL between two yes-or-no distributions."""
        from torch.nn import functional

        student, teacher = output.logits.float() / temperature, targets[TEACHER] / temperature
        soft = teacher.sigmoid()
        cross = functional.binary_cross_entropy_with_logits(student, soft)
        own = functional.binary_cross_entropy_with_logits(teacher, soft)
        return temperature**2 * (cross - own)

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        return (outputs > 0).astype(np.int8)

    def resampled(self, task: Task, answers: Answers) -> Mapping[str, Metric]:
        predicted, labels = self.decide(answers.outputs) > 0, answers.labels > 0
        counts = class_counts(predicted, labels)
        together = counts.reshape(len(counts), 3, -1).sum(axis=2)
        whole = (predicted == labels).all(axis=1).astype(np.float64)
        every: dict[str, Metric] = {
            "micro_f1": partial(of_sums, f1_of, together),
            "macro_f1": partial(of_sums, macro_f1_of, counts),
            "exact_match": partial(resampling.average, whole),
        }
        return {name: every[name] for name in task.metrics}

    def labels_of(self, column: list[Any]) -> np.ndarray:
        return np.asarray(column, np.int8)


class Regression(TextKind):
    name = "regression"
    label_type, output_type = pa.float32(), pa.float32()
    metrics = ("pearson", "spearman")

    def head(self, task: Task) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def loss(self, output: Any, targets: Targets) -> torch.Tensor:
        from torch.nn import functional

        return functional.mse_loss(output.logits.float().squeeze(-1), targets["label"])

    def soft_loss(self, output: Any, targets: Targets, temperature: float) -> torch.Tensor:
        from torch.nn import functional

        return functional.mse_loss(output.logits.float(), targets[TEACHER])

    def shape(self, task: Task, length: int) -> tuple[int, ...]:
        return (1,)

    def flat(self, outputs: np.ndarray) -> np.ndarray:
        return outputs[:, 0]

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        return outputs

    def score(self, task: Task, answers: Answers) -> dict[str, float]:
        return {name: METRICS[name](answers.outputs, answers.labels) for name in task.metrics}

    def resampled(self, task: Task, answers: Answers) -> Mapping[str, Metric]:
        return {
            name: partial(resampling.METRICS[name], answers.outputs, answers.labels) for name in task.metrics
        }

    def labels_of(self, column: list[Any]) -> np.ndarray:
        return np.asarray(column, np.float32)


def classes_of(task: Task) -> dict[str, Any]:
    labels: Sequence[str] = task.labels
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
