"""The base class of task kinds. Each kind is one object in ``registry.KINDS``.

torch and transformers are imported within the methods that compute, so that reading and scoring need neither.
docs/extending.md lists all places that a new kind touches.

Axes: n examples, B rows of a batch, L tokens of the batch's longest row, C classes, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from evaluation.measures.model_outputs import Answers
from evaluation.tasks.task import Split, Task

if TYPE_CHECKING:
    import torch

    from evaluation.tasks.encoded import Encoded, Targets

Metric = Callable[[np.ndarray], np.ndarray]
"""(weights of the examples, float64 [n, R]) -> the metric for each resample, float64 [R], as a fraction."""

TEACHER_LOGITS, TOKEN_COUNTS = "teacher", "tokens"
"""Names of the targets of a second distillation: logits float32 [B, ...]; tokens per row, int64 [B]."""


class Kind:
    """Base class of all kinds. Its methods are the defaults that fit most kinds."""

    name: ClassVar[str]
    fine_tuned: ClassVar[bool] = True
    """Whether models are fine-tuned. If not, no result depends on the seed, so each model has one run."""
    version: ClassVar[int] = 0
    """Increase it if the predictions of this kind alone change; its jobs then run again."""
    exportable: ClassVar[bool] = True
    """Whether fine-tuned models of this kind are exported for devices."""
    per_token: ClassVar[bool] = False
    """Whether outputs are per token. A teacher must then have the student's vocabulary."""
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    """Name of the class in ``transformers`` that loads a model with the head of this kind."""
    label_type: ClassVar[pa.DataType]
    """Type of the column ``label`` in a file of predictions."""
    output_type: ClassVar[pa.DataType]
    """Type of the column ``output`` in a file of predictions."""
    metrics: ClassVar[tuple[str, ...]]
    """Names of the metrics that a task can choose; the first one is the default score."""

    def head_config(self, task: Task) -> dict[str, Any]:
        """Returns the entries of the model's configuration that describe the task's head."""
        return {}

    def encode(self, tokenizer: Any, task: Task, split: Split, length: int) -> Encoded:
        """Returns the examples as rows of at most ``length`` tokens, with the labels, if any, as targets."""
        raise NotImplementedError

    def loss(self, output: Any, targets: Targets) -> torch.Tensor:
        """Returns the loss on the labels, the mean over a batch. ``output``: of the model's forward."""
        raise NotImplementedError

    def soft_loss(self, output: Any, targets: Targets, temperature: float) -> torch.Tensor:
        """Returns the loss on ``targets[TEACHER_LOGITS]``, the mean over a batch."""
        raise NotImplementedError

    def select_outputs(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        """Returns a batch's outputs, [B, ...], usually the logits; an axis of L includes the padding.

        ``output``: of the model's forward. ``mask``: [B, L], 1 for tokens and 0 for padding.
        """
        return output.logits

    def output_shape(self, task: Task, length: int) -> tuple[int, ...]:
        """Returns the shape of the outputs for one row of ``length`` tokens, without padding."""
        return (max(1, len(task.labels)),)

    def answers(self, predict: Predict, tokenizer: Any, task: Task, split: Split, length: int) -> Answers:
        """Returns the model's answers to a split. ``length``: the largest number of tokens of a row."""
        raise NotImplementedError

    def decide(self, outputs: Any) -> Any:
        """Converts outputs to decisions, such as class ids; ``evaluation.kinds.predictions`` lists them."""
        return outputs

    def score(self, task: Task, answers: Answers) -> dict[str, float]:
        """Returns the task's metrics on a labelled split, as fractions."""
        weights, metrics = np.ones((len(answers), 1)), self.weighted_metrics(task, answers)
        return {name: float(metric(weights)[0]) for name, metric in metrics.items()}

    def weighted_metrics(self, task: Task, answers: Answers) -> Mapping[str, Metric]:
        """Returns the metrics of ``score`` as functions of the examples' weights."""
        raise NotImplementedError

    def all_finite(self, outputs: Any) -> bool:
        return all(np.isfinite(output).all() for output in outputs)

    def to_arrow(self, values: Any) -> Sequence[Any]:
        """Converts labels or outputs to the Python values that pyarrow takes."""
        return list(values)

    def labels_from_arrow(self, column: list[Any]) -> Any:
        """Converts the column ``label`` of a file of predictions to the labels of ``Answers``."""
        return column

    def outputs_from_arrow(self, column: list[Any]) -> Any:
        """Converts the column ``output`` of a file of predictions to the outputs of ``Answers``."""
        return column


Predict = Callable[["Encoded"], list[np.ndarray]]
"""Encoded rows -> one float32 array per row, as ``Kind.select_outputs`` returns it."""


def kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [B, C], the mean over B."""
    from torch.nn import functional

    p, q = (functional.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return temperature**2 * functional.kl_div(q, p, reduction="batchmean", log_target=True)
