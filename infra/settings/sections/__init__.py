"""Every setting of a recipe: one module and one frozen dataclass per section, a docstring below each field.

All sections are in this folder, not beside their stages, because every command validates the whole recipe (a
typo in ``train`` must be found before the teacher pass, not after it) and no stage may import another.

A field declared with ``fingerprinted`` changes the result, and must stay the same when a run is resumed. A
field declared with ``unfingerprinted`` changes only speed or location, and may differ.
"""

from infra.settings.sections.corpus import Corpus, CorpusSource, DocumentUnit
from infra.settings.sections.evaluation import Evaluation, Require
from infra.settings.sections.fields import Precision, grid_values, is_name, require
from infra.settings.sections.masking import Masking
from infra.settings.sections.sequences import MAX_LENGTH, Sequences
from infra.settings.sections.store import Store
from infra.settings.sections.student import Student
from infra.settings.sections.teacher import Teacher
from infra.settings.sections.tracking import Tracking
from infra.settings.sections.train import SOFT_TARGETS, TERMS, Phase, StoreNeeds, Train, Variant

__all__ = [
    "MAX_LENGTH", "SOFT_TARGETS", "TERMS", "Corpus", "CorpusSource", "DocumentUnit", "Evaluation",
    "Masking", "Phase", "Precision", "Require", "Sequences", "Store", "StoreNeeds", "Student", "Teacher",
    "Tracking", "Train", "Variant", "grid_values", "is_name", "require",
]  # fmt: skip
