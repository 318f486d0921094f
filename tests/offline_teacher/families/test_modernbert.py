"""What is ModernBERT's own: windows, rotary positions, long sequences, and layers of two types."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from infra.errors import UserError
from offline_teacher.families import family_of
from offline_teacher.models.loading import load_model
from offline_teacher.models.replay import Replay
from offline_teacher.models.split import encoder_mask, lower_part
from offline_teacher.models.students import Shape, new_student, student_config, student_weights
from offline_teacher.models.weights import named_weights, top_weights
from tests.offline_teacher.families.tiny_models import batch, masked_lm, oracle

LONG = {"max_position_embeddings": 1024, "local_attention": 128}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_1024_positions_through_global_and_local_layers(n: int) -> None:
    """The top layer of four is a global one, the two below it have windows."""
    model = masked_lm("modernbert", **LONG)
    assert [kind[:4] for kind in model.config.layer_types] == ["full", "slid", "slid", "full"]
    ids, count = batch(1024, (1024, 700))
    expected = oracle(model, ids, count)
    h = lower_part(copy.deepcopy(model).double(), n)(ids, count)
    last = Replay(model.config, top_weights(model, n), n, torch.float64).last_hidden(h, count)
    real = torch.arange(1024) < count[:, None]
    torch.testing.assert_close(last[real], expected.last_hidden[real], rtol=0, atol=1e-10)


def test_a_window_of_a_whole_sequence_needs_no_mask() -> None:
    config = masked_lm("modernbert").config  # a window of 3 positions either way
    for length, masked in ((3, False), (4, False), (5, True)):
        mask = encoder_mask(config, None, length, torch.device("cpu"), torch.float32)
        assert mask["full_attention"] is None
        assert (mask["sliding_attention"] is not None) == masked
    near = mask["sliding_attention"][0, 0]
    assert not near[0, 4]
    assert not near[4, 0]
    assert near.sum() == 25 - 2


def test_rotary_positions_keep_their_precision() -> None:
    """Without `prepare` a conversion rounds the frequencies: far positions are turned by another angle."""
    model = masked_lm("modernbert", **LONG, hidden_size=256)
    config = model.config
    exact, plain = copy.deepcopy(model), copy.deepcopy(model)
    family_of(config).prepare(exact)
    position, x = torch.arange(1024)[None], torch.zeros(1, dtype=torch.bfloat16)
    for kind in ("full_attention", "sliding_attention"):
        wanted = model.model.rotary_emb(torch.zeros(1), position, kind)
        kept, rounded = (m.bfloat16().model.rotary_emb(x, position, kind) for m in (exact, plain))
        for ours, theirs in zip(kept, wanted, strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=2**-8)
        assert max(float((a - b).abs().max()) for a, b in zip(rounded, wanted, strict=True)) > 0.3


def test_every_model_that_is_made_keeps_float32_frequencies(tmp_path: Path) -> None:
    model = masked_lm("modernbert")
    model.save_pretrained(tmp_path)
    made = {
        "replay": Replay(model.config, top_weights(model, 1), 1),
        "student": new_student(student_config(model.config, (0, 1)), None, head=True),
        "loaded": load_model(str(tmp_path)),
    }
    for name, module in made.items():
        buffers = dict(module.bfloat16().named_buffers())
        frequencies = [buffer.dtype for key, buffer in buffers.items() if "inv_freq" in key]
        assert frequencies, name
        assert set(frequencies) == {torch.float32}, name


def test_a_student_keeps_the_types_of_its_layers() -> None:
    model = masked_lm("modernbert", num_hidden_layers=7)
    config = student_config(model.config, (0, 2, 3, 5), dropout=0.0)
    assert [kind[:4] for kind in config.layer_types] == ["full", "slid", "full", "slid"]
    student = new_student(
        config, student_weights(model.config, named_weights(model), (0, 2, 3, 5)), head=True
    )
    ids, count = batch()
    chosen = copy.deepcopy(model)
    chosen.model.layers = torch.nn.ModuleList([chosen.model.layers[layer] for layer in (0, 2, 3, 5)])
    expected, found = oracle(chosen, ids, count), oracle(student, ids, count)
    real = torch.arange(ids.shape[1]) < count[:, None]
    assert found.logits is not None
    assert expected.logits is not None
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=0, atol=1e-10)


def test_what_cannot_be_a_student_is_one_line() -> None:
    config = masked_lm("modernbert").config
    with pytest.raises(UserError, match="begins with layer 0, not 2: that layer alone has no norm"):
        student_config(config, (2, 3))
    with pytest.raises(UserError, match="12 over 4 attention heads is 3, an odd number"):
        student_config(config, (0, 3), Shape(hidden_size=12))


def test_padding_beyond_the_window_leaves_gradients_finite() -> None:
    config = student_config(masked_lm("modernbert").config, (0, 1), dropout=0.0)
    student = new_student(config, None, head=False)
    ids, count = batch()
    mask = encoder_mask(config, count, ids.shape[1], ids.device, torch.float32)
    assert mask["sliding_attention"].any(-1).all(), "every position sees something"
    student(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())
