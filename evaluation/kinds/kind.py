"""The interface of a kind of task: one object a kind, all of them in ``table.KINDS``.

torch and transformers are imported within the methods that compute, so that reading and scoring need neither.

Axes: n examples, B rows of a batch, L tokens of the longest one, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from evaluation.measures.answers import Answers
from evaluation.tasks.task import Split, Task

if TYPE_CHECKING:
    import torch

    from evaluation.finetuning.training import Encoded, Targets

Metric = Callable[[np.ndarray], np.ndarray]
"""Weights of the examples, float64 [n, R] -> the metric [R], as fractions."""

TEACHER, TOKENS = "teacher", "tokens"
"""Targets of a second distillation: logits float32 [B, ...]; the number of real tokens int64 [B]."""


class Kind:
    """Base of all kinds, with what most of them do."""

    name: ClassVar[str]
    trained: ClassVar[bool] = True
    """Whether a model is fine-tuned. If not, one run is enough, because the seed changes nothing."""
    device: ClassVar[bool] = True
    """Whether fine-tuned models are exported for devices."""
    of_tokens: ClassVar[bool] = False
    """Whether outputs belong to tokens, so that a teacher must have the student's vocabulary."""
    family: ClassVar[str] = "AutoModelForSequenceClassification"
    """The class of ``transformers`` that has the head."""
    label_type: ClassVar[pa.DataType]
    output_type: ClassVar[pa.DataType]
    """Types of the columns ``label`` and ``output`` in a file of predictions."""
    metrics: ClassVar[tuple[str, ...]]
    """The metrics that a task can choose; the first one is the default score."""

    def head(self, task: Task) -> dict[str, Any]:
        """Entries of the model's configuration that its head needs."""
        return {}

    def encode(self, tokenizer: Any, task: Task, split: Split, length: int) -> Encoded:
        """Token ids of at most ``length`` tokens, with the labels as targets where the split has any."""
        raise NotImplementedError

    def loss(self, output: Any, targets: Targets) -> torch.Tensor:
        """The mean over a batch of the loss on the labels."""
        raise NotImplementedError

    def soft_loss(self, output: Any, targets: Targets, temperature: float) -> torch.Tensor:
        """The mean over a batch of the loss on a teacher's logits (``targets[TEACHER]``)."""
        raise NotImplementedError

    def read(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        """A batch's logits [B, ...] from the model's output; an axis of L keeps the padding."""
        return output.logits

    def shape(self, task: Task, length: int) -> tuple[int, ...]:
        """The shape of the logits of one row of ``length`` tokens, without padding."""
        return (max(1, len(task.labels)),)

    def answers(self, predict: Predict, tokenizer: Any, task: Task, split: Split, length: int) -> Answers:
        """The model's answers to a split. ``predict`` gives the logits of encoded rows, one array a row."""
        raise NotImplementedError

    def decide(self, outputs: Any) -> Any:
        """What the model's outputs mean, see ``evaluation.measures.predictions``."""
        raise NotImplementedError

    def score(self, task: Task, answers: Answers) -> dict[str, float]:
        """The task's metrics of a labelled split, as fractions."""
        weights = np.ones((len(answers), 1))
        return {name: float(metric(weights)[0]) for name, metric in self.resampled(task, answers).items()}

    def resampled(self, task: Task, answers: Answers) -> Mapping[str, Metric]:
        """The same metrics as functions of weighted examples."""
        raise NotImplementedError

    def require_finite(self, outputs: Any) -> bool:
        """Whether all outputs are finite."""
        return bool(np.isfinite(outputs).all())

    def to_arrow(self, values: Any) -> Sequence[Any]:
        """Labels or outputs as pyarrow takes them."""
        return list(values)

    def labels_of(self, column: list[Any]) -> Any:
        """The labels in a column of a file of predictions."""
        return column

    def outputs_of(self, column: list[Any]) -> Any:
        return column


Predict = Callable[["Encoded"], list[np.ndarray]]
"""Encoded rows -> the output of each, as ``Kind.read`` gives it, float32."""
