"""The demo's teacher: what is shipped is what the program made, and the program still does what it did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM

from infra.demo.inputs import TEACHER
from infra.demo.make_teacher import (
    DOCUMENTS,
    RECORD,
    TEXT_SEED,
    build_tokenizer,
    held_out_loss,
    new_model,
    tokenized_documents,
    train,
)

STEPS = 8
RECORDED = json.loads((TEACHER / RECORD).read_text())


def test_tokenizer_is_the_shipped_one_byte_for_byte(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (TEACHER / file.name).read_bytes()


def test_shipped_teacher_has_the_recorded_loss_on_held_out_text() -> None:
    teacher = BertForMaskedLM.from_pretrained(TEACHER, dtype=torch.float32)
    loss = held_out_loss(teacher)
    assert loss == pytest.approx(RECORDED["held_out_loss"], abs=2e-3)


def test_the_program_begins_as_it_did() -> None:
    """Its first losses are those of the run that made the shipped weights, up to rounding."""
    rows = tokenized_documents(TEXT_SEED, DOCUMENTS)
    losses = train(new_model(rows), rows, STEPS)
    assert losses == pytest.approx(RECORDED["first_losses"][:STEPS], abs=2e-3)
