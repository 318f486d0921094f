"""Several real ranks: killed and started again, short of samples, with an error on one rank only."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.store import open_store
from student_train.data.order import SampleOrder
from student_train.engine.world import World, free_port
from student_train.trainer import Trainer
from tests.chaos.student import kill_tree
from tests.conftest import ROOT
from tests.starts import rank_environment
from tests.student_train.tiny_run import command, logged, make_phased_run, make_run, student, validated

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(600)]

SCRIPT = str(ROOT / "student_train" / "main.py")
SECONDS = 200
"""Ranks that take longer wait for each other for ever."""


@pytest.fixture
def launched() -> Iterator[list[subprocess.Popen]]:
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def start(
    launched: list[subprocess.Popen],
    root: Path,
    count: int,
    *words: str,
    script: tuple[str, ...] = (SCRIPT,),
    words_of_rank_1: tuple[str, ...] = (),
) -> list[subprocess.Popen]:
    """Starts ranks without a launcher, so that nothing ends them when one exits."""
    port = free_port()
    for rank in range(count):
        launched.append(
            subprocess.Popen(
                [
                    sys.executable,
                    *script,
                    "--recipe",
                    str(root / "recipe.yaml"),
                    *words,
                    *(words_of_rank_1 if rank == 1 else ()),
                ],  # fmt: skip
                env={**os.environ, **rank_environment(rank, count, port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    return launched[-count:]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Returns exit code, stdout and stderr of each rank."""
    told = [process.communicate(timeout=SECONDS) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


def ranks(
    launched: list[subprocess.Popen], root: Path, count: int, *words: str, script: tuple[str, ...] = (SCRIPT,)
) -> list[tuple[int, str, str]]:
    return finish(start(launched, root, count, *words, script=script))


def errors(text: str) -> list[str]:
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def flip_sample(store: Path, split: str, samples: int, number: int) -> None:
    """Flips a bit of the hidden states of sample ``number`` of the split's first batch."""
    opened = open_store(str(store))
    plan = opened.splits[split].plan
    locations = SampleOrder(plan, 0, samples, samples, window_batches=1).batch(0)
    block, row = int(locations.block[number]), int(locations.row[number])
    found = BlockReader(opened, split, ["hidden_states"]).rows(0, block, slice(row, row + 1))
    states = found["hidden_states"].tobytes()
    (shard,) = (f for f in (store / "shards" / split).rglob("*.arrow") if states in f.read_bytes())
    data = bytearray(shard.read_bytes())
    data[data.find(states) + len(states) // 2] ^= 1
    shard.write_bytes(bytes(data))


def test_fewer_held_out_sequences_than_ranks(
    alone: World, tmp_path: Path, launched: list[subprocess.Popen]
) -> None:
    """No rank waits for ever, and the measures are those of one rank."""
    make_run(tmp_path, held_out=2, recipe={"train": {"max_steps": 1}, "student": {"dropout": 0.0}})
    assert [code for code, *_ in ranks(launched, tmp_path, 3)] == [0, 0, 0]
    three, (line,) = validated(tmp_path), logged(tmp_path)
    assert 3 * line["tokens_per_second_per_rank"] == pytest.approx(line["tokens_per_second"])
    shutil.rmtree(student(tmp_path))
    command(tmp_path)
    assert three == pytest.approx(validated(tmp_path), rel=1e-5)


@pytest.mark.parametrize("split", ["train", pytest.param("validation", marks=pytest.mark.slow)])
def test_an_error_that_one_rank_sees_ends_all(
    tmp_path: Path, launched: list[subprocess.Popen], split: str
) -> None:
    """Only rank 1 reads the damaged sample. Rank 0 prints the error, and both exit with its code."""
    train = {"max_steps": 1, "batch_size": 2, "micro_batch_size": 2, "window_batches": 1}
    make_run(tmp_path, sequences=2, held_out=2, masking_epochs=1, recipe={"train": train})
    flip_sample(tmp_path / "runs" / "tiny" / "store", split, samples=2, number=1)
    (code, _, told), (other, _, silent) = ranks(launched, tmp_path, 2)
    assert (code, other) == (2, 2)
    (line,) = errors(told)
    assert f"shards/{split}/" in line
    assert "column hidden_states" in line
    assert errors(silent) == []
    assert not (student(tmp_path) / "model").exists()


HASTY = "from student_train import main\nmain.WAIT_SECONDS = 0.5\nmain.main()\n"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("store.path=/nowhere", "rank 1 on "),  # before the ranks are connected
        ("train.deepspeed_config=/nowhere.json", "/nowhere.json"),  # afterwards
    ],
)
def test_an_error_of_one_rank_before_the_training_is_printed(
    run_dir: Path, launched: list[subprocess.Popen], word: str, says: str
) -> None:
    """As if the machine of rank 1 lacked a directory. A launcher ends rank 0, which waits for rank 1."""
    script = ("-c", HASTY)
    first, second = start(launched, run_dir, 2, script=script, words_of_rank_1=(word,))
    _, text = second.communicate(timeout=SECONDS)
    assert second.returncode == 2
    if says.startswith("rank"):
        os.killpg(first.pid, signal.SIGKILL)
    else:
        _, text = first.communicate(timeout=SECONDS)
        assert first.returncode == 2
    (line,) = errors(text)
    assert says in line


@pytest.mark.slow
def test_one_student_of_several_fails_on_two_ranks(tmp_path: Path, launched: list[subprocess.Popen]) -> None:
    hot = {"train": {"learning_rate": 1e30, "warmup_ratio": 0.0}}
    make_run(tmp_path, recipe={"train": {"max_steps": 3}, "students": {"hot": hot, "good": {}}})
    (code, _, told), (other, _, silent) = ranks(launched, tmp_path, 2)
    assert (code, other) == (3, 3)
    assert len(errors(told)) == 2
    assert "error: not trained: hot; the other students are finished" in told
    assert errors(silent) == []
    assert (student(tmp_path, "good") / "model").is_dir()


def test_killed_and_started_again_with_other_numbers_of_ranks(
    alone: World, run_dir: Path, launched: list[subprocess.Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher and its two ranks are killed at a checkpoint; then one rank is killed; then two ranks
    finish, without a launcher.

    The samples are those of an uninterrupted run. The directory of torch's extensions holds the lock of a
    killed build of DeepSpeed's operator.
    """
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(run_dir / "extensions"))
    lock = run_dir / "extensions/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    words = ["train.epochs=4", "student.dropout=0"]
    command(run_dir, *words)
    reference = logged(run_dir)
    shutil.rmtree(student(run_dir))
    first = deepspeed(launched, run_dir, *words)
    checkpoints = student(run_dir) / "checkpoints"
    while not (checkpoints.is_dir() and any(checkpoints.glob("step-*"))):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    kill_tree(first)
    assert not (student(run_dir) / "model").exists()
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_validate", dies)
        with pytest.raises(RuntimeError, match="killed"):
            command(run_dir, *words, "train.validate_every=1")
    lock.touch()
    again = ranks(launched, run_dir, 2, *words)
    assert [code for code, *_ in again] == [0, 0], again
    assert [(line["step"], line["samples"]) for line in logged(run_dir)] == [
        (line["step"], line["samples"]) for line in reference
    ]
    assert [line["loss"] for line in logged(run_dir)] == pytest.approx(
        [line["loss"] for line in reference], rel=1e-3
    )


def dies(trainer: Trainer) -> None:
    """Kills the process instead of a validation, at the third step after a start."""
    trainer.validations = getattr(trainer, "validations", 0) + 1  # type: ignore[attr-defined]
    if trainer.validations == 3:  # type: ignore[attr-defined]
        raise RuntimeError("killed")


DIES = (
    "import os, signal\n"
    "from student_train import main\n"
    "from student_train.trainer import Trainer\n"
    "save = Trainer.save\n"
    "def dies(self):\n"
    "    save(self)\n"
    "    self.checkpoints.wait()\n"
    "    if self.step == int(os.environ['DIES_AT']):\n"
    "        os.kill(os.getpid(), signal.SIGKILL)\n"
    "Trainer.save = dies\n"
    "main.main()\n"
)
"""A rank that kills itself as soon as the checkpoint of a step is on disk."""


@pytest.mark.slow
def test_killed_in_and_between_phases(
    alone: World, tmp_path: Path, launched: list[subprocess.Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the first phase, at its end and in the second phase, each time with another number of ranks.
    The samples are those of an uninterrupted run."""
    make_phased_run(tmp_path, steps=4, more=3, checkpoint_every=1)
    command(tmp_path)
    reference = [(line["step"], line["samples"]) for line in logged(tmp_path)]
    shutil.rmtree(student(tmp_path))
    for step, count in ((2, 2), (4, 1), (5, 2), (0, 1)):
        monkeypatch.setenv("DIES_AT", str(step))
        codes = [code for code, *_ in ranks(launched, tmp_path, count, script=("-c", DIES))]
        assert codes == [-signal.SIGKILL if step else 0] * count
    assert [(line["step"], line["samples"]) for line in logged(tmp_path)] == reference


def deepspeed(launched: list[subprocess.Popen], root: Path, *words: str) -> subprocess.Popen:
    """Starts two ranks by the deepspeed launcher, as a user does."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    launcher += ["--master_port", str(free_port())]
    launched.append(
        subprocess.Popen(
            [*launcher, SCRIPT, "--recipe", str(root / "recipe.yaml"), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=root,
            start_new_session=True,
        )
    )
    return launched[-1]


def test_other_settings_end_a_real_command_in_one_line(alone: World, run_dir: Path) -> None:
    command(run_dir, "train.epochs=1")
    words = ["--recipe", str(run_dir / "recipe.yaml"), "train.epochs=1", "train.seed=1"]
    ended = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    (line,) = errors(ended.stderr)
    assert "(train.seed: 0 -> 1)" in line


def test_a_rank_takes_its_share_of_the_cores() -> None:
    """If torch were imported earlier, every rank would start a thread per core."""
    script = (
        "import sys\n"
        "from student_train import main, ranks\n"
        "def run(options):\n"
        "    early = 'torch' in sys.modules\n"
        "    ranks.share_cores()\n"
        "    import torch\n"
        "    print(early, torch.get_num_threads())\n"
        "main.run = run\n"
        "main.main(['--recipe', 'none'])\n"
    )
    cores = len(os.sched_getaffinity(0))
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"LOCAL_SIZE": str(cores)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "1"], done.stderr
