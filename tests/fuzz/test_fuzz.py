"""A few hundred damaged inputs of every reader; ``python -m tests.fuzz`` does a hundred thousand."""

from __future__ import annotations

import pytest

from tests.fuzz.readers import READERS
from tests.fuzz.run import fuzz


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_input_is_valid_or_refused_in_one_line(reader: str) -> None:
    outcome = fuzz(reader, 0, 300)
    assert outcome.findings == []
    assert outcome.valid + outcome.refused == 300
    if reader not in ("text", "jsonl"):  # a problem is counted: nothing to refuse
        assert outcome.refused > 30, "the damage is too small to mean anything"
