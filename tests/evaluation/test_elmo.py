from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation.devices import elmo


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> elmo.Elmo:
    for name, value in (("CELLS", 16), ("SIZE", 8), ("FILTERS", ((1, 3), (3, 5)))):
        monkeypatch.setattr(elmo, name, value)
    return elmo.build()


def test_size_as_published() -> None:
    """93.6 M, the "Original" model of https://allenai.org/allennlp/software/elmo."""
    with torch.device("meta"):
        model = elmo.Elmo()
    assert round(elmo.parameters(model) / 1e6, 1) == 93.6
    lstm = model.directions.get_submodule("0.1")
    assert (lstm.hidden_size, lstm.proj_size) == (4096, 512)


def test_the_label_says_that_the_weights_are_random() -> None:
    assert "random weights" in elmo.LABEL


def test_words_are_spelled_in_bytes() -> None:
    (batch,) = elmo.batches([("ab", "c é"), ("x" * 90,)], 2, max_words=3)
    ids = batch["input_ids"]
    assert ids.shape == (2, 3, 50)
    assert ids[0, 0].tolist() == [258, 97, 98, 259] + [260] * 46
    assert ids[0, 2, :5].tolist() == [258, 0xC3, 0xA9, 259, 260]
    assert ids[1, 0].tolist() == [258, *[120] * 48, 259]
    assert (ids[1, 1:] == 260).all()
    assert ids.max() < elmo.CHARACTERS


def test_every_word_sees_every_other_one(small: elmo.Elmo) -> None:
    (batch,) = elmo.batches([("a film is fine",)], 1, max_words=16)
    changed = batch["input_ids"].copy()
    changed[0, 1, 1] += 1
    with torch.inference_mode():
        first, second = (elmo.runner(small)({"input_ids": ids}) for ids in (batch["input_ids"], changed))
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert first.shape == (1, 4, 16)
    moved = (first - second).abs()[0]
    assert (moved.amax(dim=1) > 0).all()
    assert (moved[0, :8] == 0).all()  # the forward direction has not read the second word yet
    assert (moved[3, 8:] == 0).all()  # nor the backward one, coming from the end


def test_rows_are_cut_and_batched() -> None:
    found = elmo.batches([("a b c",)] * 5, 2, max_words=2)
    assert [batch["input_ids"].shape[:2] for batch in found] == [(2, 2), (2, 2), (1, 2)]
    assert all(batch["input_ids"].dtype == np.int64 for batch in found)
