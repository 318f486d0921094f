"""A micro-batch's positions, labels and counts against a naive enumeration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from student_train.data.collate import NO_LABEL, collate

COLUMNS = {
    "token_count": np.array([4, 2], np.uint16),
    "input_ids": np.array([[5, 6, 7, 8], [9, 3, 0, 0]], np.uint16),
    "masked_positions": np.array([[1, 3], [0, -1]], np.int16),
    "masked_labels": np.array([[16, 18], [19, 0]], np.uint16),
}


def test_positions_that_are_real_count() -> None:
    batch = collate(COLUMNS, masked_only=False, bfloat16=False, weight=1.0)
    assert batch.positions is not None
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.labels.tolist() == [NO_LABEL, 16, NO_LABEL, 18, 19, NO_LABEL]
    assert batch.masked_in_positions.tolist() == [1, 3, 4]
    assert (batch.tokens, batch.masked, batch.no_padding, len(batch)) == (6, 3, False, 2)
    assert batch.recorded_positions is batch.positions
    assert batch.input_ids.dtype == torch.int64


def test_masked_positions_alone() -> None:
    batch = collate(COLUMNS, masked_only=True, bfloat16=False, weight=1.0)
    assert batch.positions is not None
    assert batch.recorded_positions is not None
    assert batch.positions.tolist() == [1, 3, 4]
    assert batch.recorded_positions.tolist() == [0, 1, 2]
    assert batch.labels.tolist() == [16, 18, 19]
    assert batch.masked_in_positions.tolist() == [0, 1, 2]


def test_without_padding_nothing_is_picked() -> None:
    full = {name: values[:1] for name, values in COLUMNS.items()}
    batch = collate(full, masked_only=False, bfloat16=False, weight=1.0)
    assert batch.no_padding
    assert batch.positions is None
    assert batch.recorded_positions is None
    assert batch.labels.tolist() == [NO_LABEL, 16, NO_LABEL, 18]


def test_text_that_is_not_masked() -> None:
    text = {name: COLUMNS[name] for name in ("token_count", "input_ids")}
    batch = collate(text, masked_only=False, bfloat16=False, weight=1.0)
    assert (batch.tokens, batch.masked, batch.masked_in_positions.tolist()) == (6, 0, [])
    assert set(batch.labels.tolist()) == {NO_LABEL}


def test_a_dummy_counts_for_nothing() -> None:
    batch = collate(COLUMNS, masked_only=False, bfloat16=False, weight=0.0)
    assert (batch.weight, batch.tokens, batch.masked) == (0.0, 0, 0)


@pytest.mark.parametrize("bfloat16", [True, False])
def test_columns_of_the_teacher(bfloat16: bool) -> None:
    states = torch.randn(2, 4, 3).bfloat16()
    columns = COLUMNS | {
        "hidden_states": states.view(torch.int16).numpy().view(np.uint16)
        if bfloat16
        else states.half().numpy(),
        "topk_ids": np.arange(16, dtype=np.uint16).reshape(2, 4, 2),
    }
    batch = collate(columns, masked_only=False, bfloat16=bfloat16, weight=1.0)
    assert batch.hidden_states is not None
    assert batch.hidden_states.dtype == (torch.bfloat16 if bfloat16 else torch.float16)
    assert torch.equal(batch.hidden_states.float(), states.float())
    assert batch.topk_ids is not None
    assert batch.topk_ids.dtype == torch.int64
    moved = batch.to("cpu")
    assert moved.hidden_states is not None
    assert torch.equal(moved.hidden_states, batch.hidden_states)
    assert moved.labels.tolist() == batch.labels.tolist()
