"""Initial weights of a student that is narrower than its teacher: slices of the teacher's matrices.

Each layer writes the same hidden dimensions that the next one reads. The kept hidden dimensions are those in
which the word embeddings vary most. Each layer keeps the attention dimensions and the feed-forward neurons
whose weights have the largest norms. No weight is scaled. docs/student.md compares this with other choices.

Axes: D hidden size, I feed-forward width, H heads, d = D / H dimensions per head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offline_teacher.families import family_of
from offline_teacher.families.family import Family
from offline_teacher.models.students import require_slices, student_weights, widths

Index = Tensor
"""Numbers of the rows or columns to keep: int64 [kept], ascending."""


def starting_weights(
    student: Any, teacher: Any, weights: Mapping[str, Tensor], layers: Sequence[int]
) -> dict[str, Tensor]:
    """Returns a student's initial weights: the teacher's ``layers``, sliced to the student's widths.

    ``student`` and ``teacher`` are configurations; ``weights`` are the teacher's `weights.named_weights`.
    Raises UserError if the student's attention heads cannot be cut out of the teacher's.
    """
    unsliced = student_weights(teacher, weights, layers)
    teacher = family_of(teacher).config(teacher)
    require_slices(student, teacher)
    if widths(student) == widths(teacher):
        return unsliced
    return sliced_weights(student, unsliced, teacher.num_attention_heads)


def sliced_weights(student: Any, weights: Mapping[str, Tensor], teacher_heads: int) -> dict[str, Tensor]:
    """Returns the tensors of a narrower student. ``student`` is its configuration.

    ``weights``: of `students.student_weights`, with the student's names and the teacher's widths.
    """
    family = family_of(student)
    slices = _Slices(family, family.config(student), weights, teacher_heads)
    return {name: slices.apply(name, tensor) for name, tensor in weights.items()}


class _Slices:
    """The indices that a student keeps on each axis of each tensor."""

    def __init__(
        self, family: Family, student: Any, weights: Mapping[str, Tensor], teacher_heads: int
    ) -> None:
        self.family = family
        embeddings = weights[f"{family.prefix}.{family.words}.weight"]  # [V, D]
        self.teacher_width = embeddings.shape[1]
        self.hidden = _largest(embeddings.var(0), student.hidden_size)
        self.layer_prefix = f"{family.prefix}.{family.layers}."
        self.layers = [
            self._layer_slices(f"{self.layer_prefix}{number}.", student, weights, teacher_heads)
            for number in range(student.num_hidden_layers)
        ]

    def _layer_slices(
        self, prefix: str, student: Any, weights: Mapping[str, Tensor], teacher_heads: int
    ) -> tuple[Index, Index, int]:
        """Returns the attention dimensions (of D) and neurons (of I) that a layer keeps; the teacher's I."""
        width = self.teacher_width
        matrices = {
            name.removeprefix(prefix): weight
            for name, weight in weights.items()
            if name.startswith(prefix) and weight.ndim == 2
        }
        projections = [matrices.pop(f"{path}.weight") for path in self.family.projections]
        output = next(matrix for matrix in matrices.values() if matrix.shape == (width, width))
        feed_forward = [matrix for matrix in matrices.values() if matrix.shape != output.shape]
        # Importance: the product of the norms of all weight vectors that belong to a dimension or neuron.
        importance = torch.cat(projections).norm(dim=1).view(3, width).prod(0) * output.norm(dim=0)
        norms = [matrix.norm(dim=1 if matrix.shape[1] == width else 0) for matrix in feed_forward]
        count = min(map(len, norms))  # the first matrix of a gated layer has 2 I rows: values, then gates
        neuron_importance = math.prod(norm.view(-1, count).prod(0) for norm in norms)
        choose = _rotary_dimensions if self.family.rotary else _attention_dimensions
        attention = choose(importance, teacher_heads, student.num_attention_heads, student.hidden_size)
        kept_neurons = getattr(student, self.family.own_name("intermediate_size"))
        return attention, _largest(neuron_importance, kept_neurons), count

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        for axis, index in enumerate(self._indices(name, tensor)):
            tensor = tensor if index is None else tensor.index_select(axis, index)
        return tensor.contiguous()

    def _indices(self, name: str, tensor: Tensor) -> Sequence[Index | None]:
        """Returns the indices to keep on each axis of a tensor; None stands for the whole axis."""
        width = self.teacher_width
        if not name.startswith(self.layer_prefix):
            return [self.hidden if size == width else None for size in tensor.shape]
        number, _, parameter = name.removeprefix(self.layer_prefix).partition(".")
        (attention, neurons, teacher_neurons), module = self.layers[int(number)], parameter.rpartition(".")[0]
        if module in self.family.projections:
            return [_repeated(attention, width, len(tensor)), self.hidden][: tensor.ndim]
        if tensor.shape == (width, width):
            return [self.hidden, attention]
        return [
            self.hidden if size == width else _repeated(neurons, teacher_neurons, size)
            for size in tensor.shape
        ]


def _attention_dimensions(importance: Tensor, teacher_heads: int, heads: int, width: int) -> Index:
    """Returns the ``width`` attention dimensions to keep, given the importance of each of the teacher's D.

    Keeps whole heads if the student's are as wide as the teacher's, else equally many dimensions of each.
    """
    by_head = importance.view(teacher_heads, -1)  # [H, d]
    teacher_size, size = by_head.shape[1], width // heads  # dimensions per head
    if size == teacher_size:
        kept_heads = _largest(by_head.sum(1), heads)
        return torch.cat([torch.arange(size) + int(head) * size for head in kept_heads])
    offsets = torch.arange(heads) * teacher_size
    return torch.cat([_largest(row, size) + offset for row, offset in zip(by_head, offsets, strict=True)])


def _rotary_dimensions(importance: Tensor, teacher_heads: int, heads: int, width: int) -> Index:
    """Like ``_attention_dimensions``, for rotary positions.

    These rotate dimensions i and i + d / 2 of a head together, with frequency base^(-2 i / d). So both
    dimensions of a pair are kept, and the kept pairs have about the frequencies of a student's smaller head.
    """
    teacher_size, size = len(importance) // teacher_heads, width // heads  # dimensions per head
    if size == teacher_size:
        return _attention_dimensions(importance, teacher_heads, heads, width)
    first = torch.arange(size // 2) * teacher_size // size
    in_head = torch.cat([first, first + teacher_size // 2])
    return (torch.arange(heads)[:, None] * teacher_size + in_head).flatten()


def _repeated(index: Index, size: int, length: int) -> Index:
    """Returns ``index`` for each of the sections of ``size`` rows of an axis with ``length`` rows."""
    return torch.cat([index + start for start in range(0, length, size)])


def _largest(values: Tensor, count: int) -> Index:
    """Returns the positions of the ``count`` largest values, ascending."""
    return values.topk(count).indices.sort().values
