"""Checkpoints are written whole; the newest valid one is loaded; damage is named; no silent fresh start."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infra.errors import UserError
from student_train.engine import checkpoint_format
from student_train.engine.checkpoint_format import RunState, load_newest, newest_fingerprint, save


def facts(step: int) -> RunState:
    return RunState(
        step=step,
        samples_seen=step * 8,
        optimizer_step=step,
        loss_scaler={},
        samples_digest="0" * 32,
        fingerprint={"store": "xxh3-128:0"},
        tracking_run=None,
    )


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: {
            "a.weight": torch.randn(5, 3, generator=generator),
            "a.bias": torch.randn(5, generator=generator),
        }
        for name in checkpoint_format.TENSORS
    }


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A directory with checkpoints of steps 100 and 200."""
    for step in (100, 200):
        save(str(tmp_path), facts(step), tensors(step), keep=2)
    return tmp_path


def test_what_is_saved_comes_back(two: Path) -> None:
    found = load_newest(str(two))
    assert found is not None
    assert found.run_state == facts(200)
    for kind, named in tensors(200).items():
        assert {name: t.tolist() for name, t in found.tensors[kind].items()} == {
            name: t.tolist() for name, t in named.items()
        }


def test_only_the_newest_are_kept(two: Path) -> None:
    save(str(two), facts(300), tensors(300), keep=2)
    assert sorted(os.listdir(two)) == ["step-00000200", "step-00000300"]


def test_no_directory_and_an_empty_one_mean_a_fresh_start(tmp_path: Path) -> None:
    assert load_newest(str(tmp_path / "absent")) is None
    assert load_newest(str(tmp_path)) is None


def test_a_save_cut_short_is_not_a_checkpoint(tmp_path: Path) -> None:
    draft = tmp_path / ".tmp-0123"
    draft.mkdir()
    (draft / "weights.safetensors").write_bytes(b"half")
    assert load_newest(str(tmp_path)) is None
    assert os.listdir(tmp_path) == []


def test_a_save_that_fails_leaves_the_others(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_format, "save_file", full)
    with pytest.raises(UserError, match="step-00000300.*No space left"):
        save(str(two), facts(300), tensors(300), keep=2)
    assert sorted(os.listdir(two)) == ["step-00000100", "step-00000200"]


# --- damage -------------------------------------------------------------------------------------------------


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def flip(name: str, where: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[int((len(data) - 1) * where)] ^= 4
        (path / name).write_bytes(bytes(data))

    return damage


def gone(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def grown(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).write_bytes((path / name).read_bytes() + b"\0")

    return damage


def replaced(name: str, data: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).write_bytes(data)

    return damage


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a directory")


def other_weights(path: Path) -> None:
    save_file(tensors(1)["weights"], path / "weights.safetensors")


def of_the_step_before(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step-00000100", path)


def edited_step(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "step": 201}))


def swapped_moments(path: Path) -> None:
    (path / "exp_avg.safetensors").rename(path / "x")
    (path / "exp_avg_sq.safetensors").rename(path / "exp_avg.safetensors")
    (path / "x").rename(path / "exp_avg_sq.safetensors")


STATE, WEIGHTS, FIRST, SECOND = (
    "state.json",
    "weights.safetensors",
    "exp_avg.safetensors",
    "exp_avg_sq.safetensors",
)
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"{name} gone": (gone(name), f"has no {name}") for name in (STATE, WEIGHTS, FIRST, SECOND)},
    **{f"{name} empty": (cut(name, 0), f"empty {name}") for name in (STATE, WEIGHTS, FIRST, SECOND)},
    **{f"{name} cut": (cut(name, 0.6), name) for name in (STATE, WEIGHTS, FIRST, SECOND)},
    **{f"{name} grown": (grown(name), name) for name in (STATE, WEIGHTS, SECOND)},
    **{
        f"{name} flipped at {at}": (flip(name, at), name)
        for name in (STATE, WEIGHTS, FIRST)
        for at in (0, 0.5, 1)
    },
    "nothing in it": (emptied, f"has no {STATE}"),
    "a file": (a_file, "not a directory"),
    "state is a list": (replaced(STATE, b"[]\n"), STATE),
    "state is null": (replaced(STATE, b"null\n"), STATE),
    "state of zeros": (replaced(STATE, bytes(300)), STATE),
    "step edited": (edited_step, "digest"),
    "weights of another run": (other_weights, WEIGHTS),
    "moments swapped": (swapped_moments, "exp_avg"),
    "another step under this name": (of_the_step_before, "which is not the step in its name"),
}


def test_there_are_enough_kinds_of_damage() -> None:
    assert len(DAMAGE) >= 20


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    two: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, named = DAMAGE[name]
    damage(two / "step-00000200")
    found = load_newest(str(two))
    assert found is not None
    assert found.run_state.step == 100
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "step-00000200" in warning
    assert named in warning
    assert sorted(os.listdir(two)) == ["step-00000100", "step-00000200.damaged-1"]


def test_the_fingerprint_is_of_the_newest_state_that_can_be_read(two: Path) -> None:
    assert newest_fingerprint(str(two)) == facts(2).fingerprint
    for name in sorted(two.iterdir(), reverse=True):
        (name / "state.json").unlink()
        found = newest_fingerprint(str(two))
    assert found is None
    assert newest_fingerprint(str(two / "absent")) is None


def test_the_newest_gone_entirely_leaves_the_one_before(two: Path) -> None:
    shutil.rmtree(two / "step-00000200")
    found = load_newest(str(two))
    assert found is not None
    assert found.run_state.step == 100


def test_all_damaged_is_an_error_now_and_on_the_next_start(two: Path) -> None:
    for step in ("step-00000100", "step-00000200"):
        (two / step / WEIGHTS).unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="no valid checkpoint is left.*step-00000200.damaged-1"):
            load_newest(str(two))


def test_the_same_step_damaged_twice_is_kept_twice(two: Path) -> None:
    (two / "step-00000200" / WEIGHTS).unlink()
    load_newest(str(two))
    save(str(two), facts(200), tensors(200), keep=2)
    (two / "step-00000200" / STATE).unlink()
    load_newest(str(two))
    assert {"step-00000200.damaged-1", "step-00000200.damaged-2"} <= set(os.listdir(two))


def test_another_format_is_not_damage(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_format, "FORMAT_VERSION", 2)
    with pytest.raises(UserError, match="checkpoint format 1, this version reads 2"):
        load_newest(str(two))
    assert (two / "step-00000200").is_dir()
