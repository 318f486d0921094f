"""``masking``: which tokens are hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infra.settings.sections.fields import added, check_at_least, fingerprinted, require


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Which tokens the teacher and the student must predict."""

    probability: float | None = fingerprinted(None)
    """Share of the maskable tokens that are masked in every sequence, rounded up; 0: masking is off.
    None: 0.15 for a teacher with a masked-LM head, else 0."""
    sampling: Literal["uniform", "frequency"] = fingerprinted("uniform")
    """Distribution of the masked tokens. ``frequency``: with a probability proportional to count^-smoothing
    of the token (DistilBERT, XLM)."""
    smoothing: float = fingerprinted(0.7)
    """Exponent for ``sampling: frequency``."""
    whole_word: bool = fingerprinted(False)
    replacement: Literal["bert", "mask"] = added("bert")
    """What replaces a masked token. ``bert``: [MASK] for 80 % of them, a random token for 10 %, and 10 % keep
    their token. ``mask``: always [MASK]."""
    epochs: int = fingerprinted(1)
    """R: number of times that the corpus is masked and passed through the teacher."""
    seed: int = fingerprinted(0)

    def __post_init__(self) -> None:
        share = self.probability
        require(share is None or 0 <= share <= 0.5, f"probability: must be 0 to 0.5, not {share}")
        require(1 <= self.epochs <= 1000, f"epochs: must be 1 to 1000, not {self.epochs}")
        repeats = f"{self.epochs} passes over text that is not masked would all be the same"
        require(share != 0 or self.epochs == 1, f"epochs: {repeats}; set epochs: 1")
        check_at_least(self, 0, "smoothing")
        require(0 <= self.seed < 2**63, f"seed: must be 0 to 2^63 - 1, not {self.seed}")
