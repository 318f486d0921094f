"""How far the student's vector of a text is from its teacher's: for students of sentence encoders."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def embedding_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over texts of 1 - cos(s, t) + |s - t|^2 / |t|^2, of vectors [n, D]; float32 scalar.

    The cosine is what texts are compared by; the squared distance, relative to the teacher's length, puts the
    student into the teacher's own space, so that its vectors of queries meet the teacher's of documents.
    """
    student, teacher = student.float(), teacher.float()
    angle = 1 - functional.cosine_similarity(student, teacher, dim=1)
    length = teacher.square().sum(1).clamp_min(1e-12)
    return (angle + (student - teacher).square().sum(1) / length).sum()
