"""The student command: what it writes, when it does nothing, and how it resumes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from infra import console
from infra.errors import UserError
from student_train.data.reading import Samples
from student_train.engine import checkpoint_format
from student_train.engine import world as worlds
from student_train.engine.world import World
from student_train.student.model import StudentModel
from student_train.trainer import Stopped, Trainer
from tests.conftest import ROOT
from tests.student_train import tiny_run
from tests.student_train.tiny_run import (
    command,
    history,
    logged,
    make_run,
    make_teacher,
    student,
    validated,
    weights,
)

STEPS = 13  # two epochs of 50 sequences in batches of 8


def test_a_run_from_start_to_model(alone: World, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

    assert command(run_dir) == 0
    shown = capsys.readouterr().out
    assert "student tiny/student: trained" in shown
    assert shown.rstrip().endswith(str(student(run_dir) / "model"))
    model_dir = student(run_dir) / "model"
    assert type(AutoModel.from_pretrained(model_dir)).__name__ == "DistilBertModel"
    assert len(AutoTokenizer.from_pretrained(model_dir)) == 96
    assert len(pipeline("fill-mask", model=str(model_dir))("w6 [MASK] w7")) == 5
    weights = AutoModelForMaskedLM.from_pretrained(model_dir).state_dict()
    assert all(w.dtype == torch.float32 for w in weights.values())
    card = (model_dir / "README.md").read_text()
    for word in ("pipeline_tag: fill-mask", "xxh3-128:", "kl_t2", "exact", "13 steps"):
        assert word in card
    lines = logged(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    measures = ("kl_t1", "kl_t2", "mlm_loss", "mlm_accuracy", "teacher_mlm_loss", "agreement", "cosine")
    assert set(validated(run_dir)) == set(measures)


def test_a_finished_student_is_left_alone(
    alone: World, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(run_dir)
    before = {path: path.stat().st_mtime_ns for path in student(run_dir).rglob("*")}
    monkeypatch.setattr(worlds, "start_world", lambda: pytest.fail("nothing is to be started"))
    assert command(run_dir, "train.micro_batch_size=4") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in student(run_dir).rglob("*")}


def test_a_store_may_move(alone: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student depends on the store's digest, not on its path."""
    command(run_dir)
    moved = run_dir / "elsewhere"
    (run_dir / "runs" / "tiny" / "store").rename(moved)
    monkeypatch.setattr(worlds, "start_world", lambda: pytest.fail("nothing is to be started"))
    assert command(run_dir, f"store.path={moved}") == 0


def test_a_damaged_model_is_published_again(alone: World, run_dir: Path) -> None:
    command(run_dir)
    weights = student(run_dir) / "model" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    command(run_dir)
    assert weights.read_bytes() == good
    assert len(logged(run_dir)) == STEPS


def test_a_resumed_run_logs_the_same_as_an_uninterrupted_one(
    alone: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(run_dir)
    whole = logged(run_dir)
    shutil.rmtree(student(run_dir))
    count = Trainer._count

    def dies_once(self: Trainer, *rest: Any) -> None:
        count(self, *rest)
        if self.step == 7:
            monkeypatch.setattr(Trainer, "_count", count)
            raise RuntimeError("killed")

    monkeypatch.setattr(Trainer, "_count", dies_once)
    with pytest.raises(RuntimeError, match="killed"):
        command(run_dir)
    with (student(run_dir) / "history.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a line cut short by the death
    command(run_dir)
    kept = ("step", "loss", "kl", "mlm", "cosine", "gradient_norm", "learning_rate", "samples")
    assert [[line[k] for k in kept] for line in logged(run_dir)] == [
        [line[k] for k in kept] for line in whole
    ]


def test_a_signal_finishes_the_step_saves_and_stops(
    alone: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Trainer._count
    monkeypatch.setattr(console, "_received", [])

    def signalled(self: Trainer, *rest: Any) -> None:
        count(self, *rest)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_count", signalled)
    with pytest.raises(Stopped):
        command(run_dir)
    assert console._received == [signal.SIGTERM, signal.SIGINT]  # of which main makes the exit code
    assert (student(run_dir) / "checkpoints" / "step-00000006").is_dir()
    assert not (student(run_dir) / "model").exists()
    monkeypatch.setattr(Trainer, "_count", count)
    assert command(run_dir) == 0
    assert [line["step"] for line in logged(run_dir)] == list(range(1, STEPS + 1))


def test_times_that_are_logged(alone: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of each step that waited for input; checkpoints and validation do not count as training."""
    ticks = itertools.count()

    def clock() -> float:
        return float(next(ticks))

    def busy(self: Trainer) -> dict[str, float]:
        return {"kl_t1": sum(clock() for _ in range(100))}

    monkeypatch.setattr(
        "student_train.trainer.time", SimpleNamespace(perf_counter=clock, monotonic=lambda: 0.0)
    )
    monkeypatch.setattr(Trainer, "_validate", busy)
    monkeypatch.setattr(Trainer, "save", busy)
    command(run_dir, "train.validate_every=1", "train.checkpoint_every=1")
    # A step reads the clock five times. It waits between two readings of three that it takes.
    assert {line["input_wait"] for line in logged(run_dir)} == {1 / 3}
    assert min(line["tokens_per_second"] for line in logged(run_dir)[:-1]) >= 8 * 3 / 3


def test_checkpoints_by_time(alone: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints by minutes, without a rule by steps; then by steps, without minutes."""
    saved: list[int] = []
    save = Trainer.save

    def noted(self: Trainer) -> None:
        saved.append(self.step)
        save(self)

    monkeypatch.setattr(Trainer, "save", noted)
    minutes = itertools.count()
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: 60.0 * next(minutes))
    monkeypatch.setattr("student_train.engine.checkpoint_schedule.time", clock)
    command(run_dir, "train.checkpoint_every=0", "train.checkpoint_minutes=3")
    # Every step reads the clock once, and so does a checkpoint.
    assert saved == [3, 6, 9, 12, 13]
    names = sorted(path.name for path in (student(run_dir) / "checkpoints").iterdir())
    assert names == ["step-00000012", "step-00000013"]
    shutil.rmtree(student(run_dir))
    saved.clear()
    command(run_dir, "train.checkpoint_every=5", "train.checkpoint_minutes=0")
    assert saved == [5, 10, 13]


def test_a_checkpoint_that_cannot_be_written_ends_the_training(
    alone: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread writes checkpoints, so the error is raised at the next checkpoint or at the end."""
    monkeypatch.setattr(
        checkpoint_format, "save_file", lambda *_: (_ for _ in ()).throw(OSError("no space left"))
    )
    with pytest.raises(
        UserError, match=r"step-00000004: the checkpoint could not be written \(no space left\)"
    ):
        command(run_dir)
    assert len(logged(run_dir)) == 8
    assert not (student(run_dir) / "model").exists()


@pytest.mark.parametrize(
    ("store", "overrides", "target"),
    [
        ({"hidden_states": "int8"}, [], "exact"),
        ({"hidden_states": "bfloat16"}, [], "exact"),
        ({"hidden_states": "int8", "replay_layers": 1}, ["train.alpha_relation=1"], "exact"),
        ({"replay_layers": 2}, ["train.alpha_relation=1"], "exact"),
        ({"hidden_states": "none"}, ["train.alpha_cos=0"], "topk"),
        ({"top_k": 0}, [], "exact"),
        ({}, ["train.soft_targets=topk"], "topk"),
        ({}, ["train.alpha_ce=0"], "none"),
        ({"positions": "masked"}, ["train.kl_positions=masked"], "exact"),
        (
            {"positions": "masked", "hidden_states": "none"},
            ["train.kl_positions=masked", "train.alpha_cos=0"],
            "topk",
        ),
        ({"masked": 0}, ["train.alpha_mlm=0"], "exact"),
        ({}, ["train.kl_positions=masked"], "exact"),
        ({}, ["student.hidden_size=8", "student.init=random"], "exact"),
        ({}, ["train.dtype=bfloat16", "train.zero_stage=1"], "exact"),
    ],
)
def test_every_kind_of_store_and_target(
    alone: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    store: dict,
    overrides: list[str],
    target: str,
) -> None:
    make_run(tmp_path, **store)
    assert command(tmp_path, *overrides, "train.epochs=1") == 0
    assert re.search(rf"soft targets\s+{target}\s", capsys.readouterr().out)
    assert all(line["loss"] > 0 for line in logged(tmp_path))
    assert validated(tmp_path)["kl_t2"] > 0


def test_a_store_without_held_out_text_has_no_measures(alone: World, tmp_path: Path) -> None:
    make_run(tmp_path, held_out=0)
    assert command(tmp_path, "train.epochs=1") == 0
    assert all("loss" in line for line in history(tmp_path))
    assert "The store holds no held-out text." in (student(tmp_path) / "model" / "README.md").read_text()


def test_two_trainers_of_one_student(alone: World, run_dir: Path) -> None:
    import fcntl

    student(run_dir).mkdir(parents=True)
    with (student(run_dir) / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is at work on it"):
            command(run_dir)


def test_micro_batches_matter_by_dropout_alone(alone: World, run_dir: Path) -> None:
    """Without dropout, micro-batches only change rounding; with dropout, they change which units are
    dropped."""
    told: dict[tuple[float, int, int], list[list[float]]] = {}
    for dropout, size, again in ((0.0, 2, 0), (0.0, 8, 0), (0.3, 2, 0), (0.3, 8, 0), (0.3, 8, 1)):
        words = (f"student.dropout={dropout}", f"train.micro_batch_size={size}", "train.max_steps=3")
        command(run_dir, *words)
        told[dropout, size, again] = [[line["loss"], line["gradient_norm"]] for line in logged(run_dir)]
        shutil.rmtree(student(run_dir))
    assert told[0.0, 2, 0] == [pytest.approx(line, rel=1e-5) for line in told[0.0, 8, 0]]
    assert told[0.3, 2, 0][0] != pytest.approx(told[0.3, 8, 0][0], rel=1e-3)
    assert told[0.3, 8, 0] == told[0.3, 8, 1]


@pytest.mark.parametrize(("init", "initial"), [("teacher", "the teacher's"), ("random", "random numbers")])
def test_the_card_tells_of_longer_texts(alone: World, tmp_path: Path, init: str, initial: str) -> None:
    """The teacher has 20 position embeddings, and sequences have 12 tokens."""
    teacher = make_teacher(max_position_embeddings=20)
    with mock.patch.object(tiny_run, "make_teacher", return_value=teacher):
        make_run(tmp_path)
    command(tmp_path, "train.max_steps=1", f"student.init={init}")
    card = (student(tmp_path) / "model" / "README.md").read_text()
    assert f"position embeddings 12 to 19 are {initial}: no step trained them" in card


def test_the_card_tells_of_weight_decay(alone: World, tmp_path: Path) -> None:
    """Which also shrinks embeddings of positions that no step reaches."""
    teacher = make_teacher(max_position_embeddings=20)
    with mock.patch.object(tiny_run, "make_teacher", return_value=teacher):
        make_run(tmp_path)
    command(tmp_path, "train.max_steps=1", "train.weight_decay=0.1")
    card = (student(tmp_path) / "model" / "README.md").read_text()
    assert "12 to 19 are the teacher's, made smaller by weight decay: no step" in card


@pytest.mark.parametrize(
    "words",
    [
        ("train.alpha_ce=0", "train.alpha_cos=0"),
        ("train.kl_positions=masked", "train.alpha_cos=0", "train.dtype=bfloat16"),
        ("train.kl_positions=masked", "train.alpha_cos=0", "train.dtype=bfloat16", "train.zero_stage=2"),
    ],
)
def test_a_step_without_masked_tokens_changes_nothing(
    alone: World, run_dir: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss needs masked tokens, so the step has no gradient."""
    common = ("train.warmup_ratio=0", "student.dropout=0", "train.log_every=1")
    command(run_dir, "train.max_steps=1", *common, *words)
    learnt = weights(run_dir)
    gather = Samples.gather

    def without_masked(self: Samples, *arguments: Any, **named: Any) -> dict[str, Any]:
        found = dict(gather(self, *arguments, **named))
        return found | {"masked_positions": np.full_like(found["masked_positions"], -1)}

    monkeypatch.setattr(Samples, "gather", without_masked)
    unchanged = []
    for steps in (1, 3):
        shutil.rmtree(student(run_dir))
        assert command(run_dir, f"train.max_steps={steps}", *common, *words) == 0
        assert [line["loss"] for line in logged(run_dir)] == [0.0] * steps
        unchanged.append(weights(run_dir))
    assert all(torch.equal(unchanged[0][name], tensor) for name, tensor in unchanged[1].items())
    assert any(not torch.equal(learnt[name], tensor) for name, tensor in unchanged[0].items())


@pytest.mark.parametrize("scale", [{"loss_scale": 1024}, {"initial_scale_power": 0}])
def test_a_loss_scale_that_is_too_large_and_cannot_fall_ends_the_training(
    alone: World, run_dir: Path, scale: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed skips every step. The scale is constant, or already the lowest, which is 1."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    (run_dir / "ds.json").write_text(json.dumps({"fp16": scale}))
    words = (f"train.deepspeed_config={run_dir}/ds.json", "train.dtype=float16", "train.alpha_ce=1e9")
    with pytest.raises(UserError, match="the gradient is not a finite number"):
        command(run_dir, *words, "train.max_steps=3")
    assert not (student(run_dir) / "model").exists()


def test_a_refused_start_leaves_the_recipe_of_the_student(alone: World, run_dir: Path) -> None:
    command(run_dir, "train.max_steps=1")
    (student(run_dir) / "model.json").unlink()
    before = (student(run_dir) / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match=r"train.learning_rate: .* -> 0\.5"):
        command(run_dir, "train.max_steps=1", "train.learning_rate=0.5")
    assert (student(run_dir) / "recipe.yaml").read_bytes() == before


def test_a_model_that_the_disk_cannot_hold_is_one_line(
    alone: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: StudentModel, directory: str) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(StudentModel, "save", full)
    with pytest.raises(UserError, match="the model could not be written .*No space left"):
        command(run_dir, "train.max_steps=1")
    assert not (student(run_dir) / "model").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [(["--help"], 0, "--student NAME"), (["--recipe", "none.yaml"], 2, "error: none.yaml: no such file")],
)
def test_a_process_ends_without_the_interpreters_clean_up(
    words: list[str], code: int, told: str, tmp_path: Path
) -> None:
    """A thread of Gloo can abort Python's clean-up, and a finished training would exit with SIGABRT."""
    script = f"""
        import atexit, runpy, sys
        atexit.register(print, "cleaned up")
        sys.argv = ["main.py", *{words!r}]
        runpy.run_path({str(ROOT / "student_train" / "main.py")!r}, run_name="__main__")
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == code, ended.stderr
    assert told in ended.stdout + ended.stderr
    assert "cleaned up" not in ended.stdout
