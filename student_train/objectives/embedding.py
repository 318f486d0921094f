"""The distance between the student's and the teacher's vector of a text, for students of sentence
encoders."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def embedding_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over texts of 1 - cos(s, t) + |s - t|^2 / |t|^2, of vectors [n, D]; float32 scalar.

    Texts are compared by the cosine. The squared distance, relative to the teacher's squared length, also
    pulls the student's vectors to the teacher's, so that queries of the student can be compared with
    documents of the teacher.
    """
    student, teacher = student.float(), teacher.float()
    angle = 1 - functional.cosine_similarity(student, teacher, dim=1)
    length = teacher.square().sum(1).clamp_min(1e-12)
    return (angle + (student - teacher).square().sum(1) / length).sum()
