"""Question answering by spans of a text: SQuAD 1.1, and 2.0, where some questions have no answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from evaluation.kinds.base import TEACHER_LOGITS, TOKEN_COUNTS, Kind, Metric, Predict, kl
from evaluation.measures import resampling
from evaluation.measures.model_outputs import Answers
from evaluation.measures.squad import answer_exact, answer_f1
from evaluation.tasks import answer_spans
from evaluation.tasks.task import Split, Task

if TYPE_CHECKING:
    import torch

    from evaluation.tasks.encoded import Encoded, Targets


class Spans(Kind):
    name = "spans"
    per_token = True
    auto_class = "AutoModelForQuestionAnswering"
    label_type, output_type = pa.list_(pa.string()), pa.string()
    metrics = ("exact_match", "f1")

    def head_config(self, task: Task) -> dict[str, Any]:
        return {"num_labels": 2}  # the logits of start and end

    def encode(self, tokenizer: Any, task: Task, split: Split, length: int) -> Encoded:
        return answer_spans.encode(tokenizer, split.questions, length).encoded

    def loss(self, output: Any, targets: Targets) -> torch.Tensor:
        """Returns the mean of the cross-entropies of the start and the end position."""
        from torch.nn import functional

        start = functional.cross_entropy(output.start_logits.float(), targets["start"])
        return (start + functional.cross_entropy(output.end_logits.float(), targets["end"])) / 2

    def soft_loss(self, output: Any, targets: Targets, temperature: float) -> torch.Tensor:
        """Returns the mean of the KLs of the start and the end position; padding is masked out."""
        import torch

        width = output.start_logits.shape[1]  # the teacher's logits are padded to the data's longest row
        padding = torch.arange(width, device=output.start_logits.device) >= targets[TOKEN_COUNTS][:, None]
        sides = (output.start_logits.float(), output.end_logits.float())
        student_logits = [logits.masked_fill(padding, -1e4) for logits in sides]
        teacher_logits = targets[TEACHER_LOGITS][:, :, :width].masked_fill(padding[:, None], -1e4)
        start, end = (kl(student_logits[side], teacher_logits[:, side], temperature) for side in (0, 1))
        return (start + end) / 2

    def select_outputs(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        """Returns the logits of start and end, [B, 2, L]."""
        import torch

        return torch.stack([output.start_logits, output.end_logits], dim=1)

    def output_shape(self, task: Task, length: int) -> tuple[int, ...]:
        return (2, length)

    def answers(self, predict: Predict, tokenizer: Any, task: Task, split: Split, length: int) -> Answers:
        windows = answer_spans.encode(tokenizer, split.questions, length)
        texts = answer_spans.best_answers(windows, predict(windows.encoded), split.questions, task.no_answer)
        return Answers([question.answers for question in split.questions], texts, split.ids)

    def weighted_metrics(self, task: Task, answers: Answers) -> Mapping[str, Metric]:
        predicted_and_correct = list(zip(answers.outputs, answers.labels, strict=True))
        functions = {"exact_match": answer_exact, "f1": answer_f1}
        scored = {
            name: [functions[name](*pair, task.no_answer) for pair in predicted_and_correct]
            for name in task.metrics
        }
        return {name: partial(resampling.average, np.asarray(values)) for name, values in scored.items()}

    def all_finite(self, outputs: Sequence[str]) -> bool:
        return True  # answers are texts
