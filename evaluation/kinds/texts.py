"""Task kinds with one output per text or pair: classification, multi-label classification, regression."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from evaluation.kinds.base import TEACHER_LOGITS, Kind, Metric, Predict, kl
from evaluation.measures import resampling
from evaluation.measures.metrics import METRICS, class_counts, f1_of, macro_f1_of, of_sums
from evaluation.measures.model_outputs import Answers
from evaluation.tasks.task import Split, Task
from infra.control_tokens import tokenize

if TYPE_CHECKING:
    import torch

    from evaluation.tasks.encoded import Encoded, Targets


class TextKind(Kind):
    """Base class of kinds whose examples are texts or pairs; the model gives one logit vector for each."""

    label_dtype: ClassVar[type]

    def encode(self, tokenizer: Any, task: Task, split: Split, length: int) -> Encoded:
        from evaluation.tasks.encoded import Encoded

        columns = [list(column) for column in zip(*split.texts, strict=True)]
        output = tokenize(tokenizer, *columns, truncation=True, max_length=length)
        targets = {} if split.labels is None else {"label": split.labels}
        return Encoded(output["input_ids"], output["token_type_ids"], targets)

    def answers(self, predict: Predict, tokenizer: Any, task: Task, split: Split, length: int) -> Answers:
        outputs = np.stack(predict(self.encode(tokenizer, task, split, length)))
        return Answers(split.labels, self.to_stored(outputs), split.ids)

    def to_stored(self, outputs: np.ndarray) -> np.ndarray:
        """Converts logits [n, C] to the outputs in a file of predictions."""
        return outputs

    def labels_from_arrow(self, column: list[Any]) -> np.ndarray:
        return np.asarray(column, self.label_dtype)

    def outputs_from_arrow(self, column: list[Any]) -> np.ndarray:
        return np.asarray(column, np.float32)


class Classification(TextKind):
    name = "classification"
    label_dtype, label_type, output_type = np.int64, pa.int64(), pa.list_(pa.float32())
    metrics = ("accuracy", "f1", "macro_f1", "matthews")

    def head_config(self, task: Task) -> dict[str, Any]:
        return class_config(task) | {"problem_type": "single_label_classification"}

    def loss(self, output: Any, targets: Targets) -> torch.Tensor:
        from torch.nn import functional

        return functional.cross_entropy(output.logits.float(), targets["label"])

    def soft_loss(self, output: Any, targets: Targets, temperature: float) -> torch.Tensor:
        return kl(output.logits.float(), targets[TEACHER_LOGITS], temperature)

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        return outputs.argmax(axis=1)

    def score(self, task: Task, answers: Answers) -> dict[str, float]:
        predicted, weights = self.decide(answers.outputs), np.ones((len(answers), 1))
        return {
            name: METRICS[name](predicted, answers.labels)
            if name in METRICS
            else float(self._metric(name, task, predicted, answers.labels)(weights)[0])
            for name in task.metrics
        }

    def weighted_metrics(self, task: Task, answers: Answers) -> Mapping[str, Metric]:
        predicted = self.decide(answers.outputs)
        return {name: self._metric(name, task, predicted, answers.labels) for name in task.metrics}

    def _metric(self, name: str, task: Task, predicted: np.ndarray, labels: np.ndarray) -> Metric:
        if name != "macro_f1":
            return partial(resampling.METRICS[name], predicted, labels)
        classes = np.arange(len(task.labels))
        counts = class_counts(predicted[:, None] == classes, labels[:, None] == classes)
        return partial(of_sums, macro_f1_of, counts)


class MultiLabel(TextKind):
    """An example has any number of labels. A label is predicted if its logit is above 0."""

    name = "multilabel"
    label_dtype, label_type, output_type = np.int8, pa.list_(pa.int8()), pa.list_(pa.float32())
    metrics = ("micro_f1", "macro_f1", "exact_match")

    def head_config(self, task: Task) -> dict[str, Any]:
        return class_config(task) | {"problem_type": "multi_label_classification"}

    def loss(self, output: Any, targets: Targets) -> torch.Tensor:
        from torch.nn import functional

        logits = output.logits.float()
        return functional.binary_cross_entropy_with_logits(logits, targets["label"].to(logits.dtype))

    def soft_loss(self, output: Any, targets: Targets, temperature: float) -> torch.Tensor:
        """Returns T^2 KL(teacher || student) of the labels' Bernoulli distributions, averaged over all.

        The KL is the cross-entropy of teacher and student minus the teacher's entropy.
        """
        from torch.nn import functional

        student, teacher = output.logits.float() / temperature, targets[TEACHER_LOGITS] / temperature
        soft_labels = teacher.sigmoid()
        cross_entropy = functional.binary_cross_entropy_with_logits(student, soft_labels)
        entropy = functional.binary_cross_entropy_with_logits(teacher, soft_labels)
        return temperature**2 * (cross_entropy - entropy)

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        return (outputs > 0).astype(np.int8)

    def weighted_metrics(self, task: Task, answers: Answers) -> Mapping[str, Metric]:
        predicted, labels = self.decide(answers.outputs) > 0, answers.labels > 0
        counts = class_counts(predicted, labels)
        metrics: dict[str, Metric] = {
            "micro_f1": partial(of_sums, f1_of, counts.reshape(len(counts), 3, -1).sum(axis=2)),
            "macro_f1": partial(of_sums, macro_f1_of, counts),
            "exact_match": partial(resampling.average, (predicted == labels).all(axis=1)),
        }
        return {name: metrics[name] for name in task.metrics}


class Regression(TextKind):
    name = "regression"
    label_dtype, label_type, output_type = np.float32, pa.float32(), pa.float32()
    metrics = ("pearson", "spearman")

    def head_config(self, task: Task) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def loss(self, output: Any, targets: Targets) -> torch.Tensor:
        from torch.nn import functional

        return functional.mse_loss(output.logits.float().squeeze(-1), targets["label"])

    def soft_loss(self, output: Any, targets: Targets, temperature: float) -> torch.Tensor:
        from torch.nn import functional

        return functional.mse_loss(output.logits.float(), targets[TEACHER_LOGITS])

    def output_shape(self, task: Task, length: int) -> tuple[int, ...]:
        return (1,)

    def to_stored(self, outputs: np.ndarray) -> np.ndarray:
        return outputs[:, 0]

    def score(self, task: Task, answers: Answers) -> dict[str, float]:
        return {name: METRICS[name](answers.outputs, answers.labels) for name in task.metrics}

    def weighted_metrics(self, task: Task, answers: Answers) -> Mapping[str, Metric]:
        values = answers.outputs, answers.labels
        return {name: partial(resampling.METRICS[name], *values) for name in task.metrics}


def class_config(task: Task) -> dict[str, Any]:
    """Returns the entries of a model's configuration that name the task's classes."""
    names = dict(enumerate(task.labels))
    ids = {label: number for number, label in names.items()}
    return {"num_labels": len(names), "id2label": names, "label2id": ids}
