"""The student command: what it makes, when it does nothing, and one clear line for all that is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import UserError
from offline_teacher.store.writer import seal_recipe
from student_train import engine, main
from student_train.engine import World
from tests.student_train.tiny_run import make_run, make_store, make_teacher

STEPS = 13  # two epochs of 50 sequences in batches of 8


@pytest.fixture(scope="session")
def world() -> World:
    """This process as the only rank; what a launcher would have set is not left behind for others."""
    before = dict(os.environ)
    started = engine.start_world()
    os.environ.clear()
    os.environ.update(before)
    return started


@pytest.fixture
def alone(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(engine, "start_world", lambda: world)
    monkeypatch.setattr(World, "close", lambda self: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    return world


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    make_run(root)
    return root


@pytest.fixture
def run_dir(original: Path, tmp_path: Path) -> Path:
    """A fresh copy of teacher, stores and recipe."""
    shutil.copytree(original, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(original), str(tmp_path / "run")))
    return tmp_path / "run"


def command(root: Path, *overrides: str) -> int:
    return main.run(main.parse(["--recipe", str(root / "recipe.yaml"), *overrides]))


def student(root: Path) -> Path:
    return root / "runs" / "tiny" / "student"


def history(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (student(root) / "history.jsonl").read_text().splitlines()]


def logged(root: Path) -> list[dict[str, Any]]:
    return [line for line in history(root) if "loss" in line]


# --- what it makes ------------------------------------------------------------------------------------------


def test_a_run_from_start_to_model(alone: World, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

    assert command(run_dir) == 0
    shown = capsys.readouterr().out
    assert "trained" in shown
    assert shown.rstrip().endswith(str(student(run_dir) / "model"))
    model_dir = student(run_dir) / "model"
    assert type(AutoModel.from_pretrained(model_dir)).__name__ == "DistilBertModel"
    assert len(AutoTokenizer.from_pretrained(model_dir)) == 96
    assert len(pipeline("fill-mask", model=str(model_dir))("w1 [MASK] w2")) == 5
    weights = AutoModelForMaskedLM.from_pretrained(model_dir).state_dict()
    assert all(w.dtype == torch.float32 for w in weights.values())
    card = (model_dir / "README.md").read_text()
    for word in ("pipeline_tag: fill-mask", "xxh3-128:", "kl_t2", "exact", "13 steps"):
        assert word in card
    lines = logged(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    (validated,) = (line for line in history(run_dir) if "validation_kl_t1" in line)
    measures = ("kl_t1", "kl_t2", "mlm_loss", "mlm_accuracy", "teacher_mlm_loss", "agreement", "cosine")
    assert set(validated) == {"step", *(f"validation_{name}" for name in measures)}


def test_a_finished_student_is_left_alone(
    alone: World, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(run_dir)
    before = {path: path.stat().st_mtime_ns for path in student(run_dir).rglob("*")}
    monkeypatch.setattr(engine, "start_world", lambda: pytest.fail("nothing is to be started"))
    assert command(run_dir, "train.micro_batch_size=4") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in student(run_dir).rglob("*")}


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
    from student_train.trainer import Trainer

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
    from student_train.trainer import Stopped, Trainer

    count = Trainer._count

    def signalled(self: Trainer, *rest: Any) -> None:
        count(self, *rest)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_count", signalled)
    with pytest.raises(Stopped):
        command(run_dir)
    assert (student(run_dir) / "checkpoints" / "step-00000006").is_dir()
    assert not (student(run_dir) / "model").exists()
    monkeypatch.setattr(Trainer, "_count", count)
    assert command(run_dir) == 0
    assert [line["step"] for line in logged(run_dir)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("store", "overrides", "target"),
    [
        ({"hidden_states": "int8"}, [], "exact"),
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
        ({}, ["train.kl_positions=masked"], "exact"),
        ({}, ["student.hidden_size=8", "student.init=random"], "exact"),
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
    section = {
        "hidden_states": "store.hidden_states=",
        "positions": "store.positions=",
        "top_k": "store.top_k=",
    }
    stored = [f"{section[name]}{value}" for name, value in store.items()]
    assert command(tmp_path, *stored, *overrides, "train.epochs=1") == 0
    assert re.search(rf"soft targets\s+{target}\s", capsys.readouterr().out)
    assert all(line["loss"] > 0 for line in logged(tmp_path))


# --- what is wrong ------------------------------------------------------------------------------------------


def shards(root: Path) -> list[Path]:
    return sorted((root / "runs" / "tiny" / "store" / "shards").glob("*.arrow"))


def nothing(root: Path) -> None: ...


def no_recipe(root: Path) -> None:
    (root / "recipe.yaml").unlink()


def no_store(root: Path) -> None:
    shutil.rmtree(root / "runs" / "tiny" / "store")


def store_of(**store: Any) -> Callable[[Path], None]:
    def rebuild(root: Path) -> None:
        no_store(root)
        make_store(
            root / "runs" / "tiny" / "store", make_teacher(root / "teacher"), root / "teacher", **store
        )

    return rebuild


def half_a_manifest(root: Path) -> None:
    path = root / "runs" / "tiny" / "store" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-30])


def flipped_shards(root: Path) -> None:
    for path in shards(root):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))


def flipped_teacher_config(root: Path) -> None:
    path = root / "runs/tiny/store/teacher/config.json"
    text = path.read_text()
    assert '"pad_token_id": 0' in text
    path.write_text(text.replace('"pad_token_id": 0', '"pad_token_id": 8'))


def changed_recipe_of_a_store(root: Path) -> None:
    seal_recipe(str(root))
    path = root / "recipe.yaml"
    path.write_text(path.read_text() + "\n")


def shards_gone(root: Path) -> None:
    for path in shards(root):
        path.unlink()


def another_vocabulary(root: Path) -> None:
    make_teacher(root / "teacher", vocab_size=120)


def no_weights(root: Path) -> None:
    (root / "teacher" / "model.safetensors").unlink()


def no_validation(root: Path) -> None:
    shutil.rmtree(root / "runs" / "tiny" / "validation_store")


def other_validation(root: Path) -> None:
    no_validation(root)
    path = root / "runs" / "tiny" / "validation_store"
    make_store(path, make_teacher(root / "other", seed=1), root / "other", sequences=9, replicas=1, seed=1)


def output_below_a_file(root: Path) -> None:
    (root / "runs" / "tiny" / "student").write_text("in the way")


def deepspeed_json(text: str) -> Callable[[Path], None]:
    return lambda root: (root / "ds.json").write_text(text) and None


def begun(*overrides: str, then: Callable[[Path], None] = nothing) -> Callable[[Path], None]:
    def begin(root: Path) -> None:
        command(root, "train.epochs=1", *overrides)
        then(root)

    return begin


def all_checkpoints_damaged(root: Path) -> None:
    shutil.rmtree(student(root) / "model")
    for path in (student(root) / "checkpoints").glob("*/weights.safetensors"):
        path.write_bytes(b"")


BAD: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    "no recipe": (no_recipe, [], ["recipe.yaml"]),
    "unknown key": (nothing, ["train.lerning_rate=1"], ["lerning_rate", "learning_rate"]),
    "wrong type": (nothing, ["train.batch_size=many"], ["train.batch_size"]),
    "out of range": (nothing, ["train.epochs=0"], ["epochs"]),
    "not an override": (nothing, ["train"], ["train"]),
    "batch not divisible": (nothing, ["train.batch_size=7"], ["batch_size", "micro_batch_size"]),
    "no loss": (nothing, ["train.alpha_ce=0", "train.alpha_mlm=0", "train.alpha_cos=0"], ["no loss"]),
    "no store": (no_store, [], ["tiny/store"]),
    "store incomplete": (store_of(finish=False), [], ["tiny/store", "incomplete"]),
    "manifest damaged": (half_a_manifest, [], ["manifest.json"]),
    "shards damaged": (flipped_shards, [], ["r000-0000000", "verify"]),
    "teacher's configuration damaged": (flipped_teacher_config, [], ["teacher/config.json", "verify"]),
    "a store's own recipe changed": (changed_recipe_of_a_store, [], ["recipe.yaml", "digest", "recipe.json"]),
    "shards gone": (shards_gone, [], ["r000-0000000"]),
    "teacher of another vocabulary": (another_vocabulary, [], ["vocab_size 120", "96"]),
    "teacher without weights": (no_weights, [], ["teacher.model"]),
    "deeper than its teacher": (nothing, ["student.layers=last:5"], ["last:5", "2 layers"]),
    "no such layer": (nothing, ["student.layers=[0, 7]"], ["layer 7"]),
    "width and heads": (nothing, ["student.hidden_size=9", "student.init=random"], ["hidden_size", "heads"]),
    "exact without hidden states": (
        store_of(hidden_states="none"),
        ["train.soft_targets=exact", "train.alpha_cos=0"],
        ["train.soft_targets", "hidden states"],
    ),
    "cosine without hidden states": (
        store_of(hidden_states="none"),
        [],
        ["train.alpha_cos", "hidden states"],
    ),
    "topk without top-k": (store_of(top_k=0), ["train.soft_targets=topk"], ["train.soft_targets", "top-k"]),
    "temperature not declared": (
        nothing,
        ["train.soft_targets=topk", "train.temperature=3"],
        ["train.temperature: 3", "[1.0, 2.0]"],
    ),
    "all positions of a masked store": (store_of(positions="masked"), [], ["kl_positions", "masked"]),
    "loss not finite": (
        nothing,
        ["train.learning_rate=1e30", "train.warmup_ratio=0", "train.checkpoint_every=1"],
        ["step 1", "not a finite number", "sequences", "checkpoints/step-00000001"],
    ),
    "loss not finite at stage 2": (
        nothing,
        ["train.learning_rate=1e30", "train.warmup_ratio=0", "train.zero_stage=2", "train.dtype=bfloat16"],
        ["not a finite number", "no checkpoint was written yet"],
    ),
    "output in the way": (output_below_a_file, [], ["tiny/student"]),
    "output on an object store": (nothing, ["output=s3://bucket/runs"], ["s3://bucket"]),
    "no DeepSpeed JSON": (nothing, ["train.deepspeed_config=absent.json"], ["absent.json"]),
    "DeepSpeed JSON is not JSON": (
        deepspeed_json("{"),
        ["train.deepspeed_config={root}/ds.json"],
        ["ds.json"],
    ),
    "DeepSpeed JSON contradicts": (
        deepspeed_json('{"gradient_clipping": 1}'),
        ["train.deepspeed_config={root}/ds.json"],
        ["gradient_clipping is 1", "train.max_grad_norm"],
    ),
    "float16 where it cannot be": (nothing, ["train.dtype=float16"], ["float16", "bfloat16"]),
    "other settings than begun with": (
        begun(),
        ["train.epochs=1", "train.seed=1"],
        ["(train.seed: 0 -> 1)"],
    ),
    "another store than begun with": (
        begun(then=store_of(sequences=40)),
        ["train.epochs=1"],
        ["store: 'xxh3-128:"],
    ),
    "no valid checkpoint": (
        begun(then=all_checkpoints_damaged),
        ["train.epochs=1"],
        ["no valid checkpoint is left"],
    ),
    "no validation store": (no_validation, ["corpus.validation_path=held-out.txt"], ["validation_store"]),
    "validation store of another teacher": (other_validation, [], ["validation_store", "teacher"]),
}


def test_there_are_enough_kinds_of_bad_input() -> None:
    assert len(BAD) >= 25


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(
    alone: World, run_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    prepare, overrides, named = BAD[name]
    prepare(run_dir)
    with pytest.raises(UserError) as raised:
        command(run_dir, *(override.replace("{root}", str(run_dir)) for override in overrides))
    line = str(raised.value)
    assert "\n" not in line
    for part in named:
        assert part in line
    assert not (student(run_dir) / "model").exists() or "begun" in name


def test_two_trainers_of_one_student(alone: World, run_dir: Path) -> None:
    import fcntl

    student(run_dir).mkdir()
    with (student(run_dir) / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is at work on it"):
            command(run_dir)


def test_more_ranks_than_samples(alone: World, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "start_world", lambda: World(0, 51, torch.device("cpu")))
    with pytest.raises(UserError, match="51 ranks for a store of 50 sequences"):
        command(run_dir)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_that_another_program_has(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as taken:
        port = taken.getsockname()[1]
        for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"--master_port: another program has port {port}"):
            engine.start_world()


# --- the launcher -------------------------------------------------------------------------------------------


@pytest.fixture
def launched() -> Iterator[list[subprocess.Popen]]:
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.end_to_end
@pytest.mark.timeout(600)
def test_two_ranks_killed_and_started_again(
    run_dir: Path, root_dir: Path, launched: list[subprocess.Popen]
) -> None:
    """SIGKILL to the whole launcher once a checkpoint is there; then the same command, and it is finished.

    In the directory of torch's extensions lies the lock of a build of DeepSpeed's operator that was killed.
    """
    port = engine._free_port()
    lock = run_dir / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    script = [
        str(root_dir / "student_train" / "main.py"),
        "--recipe",
        str(run_dir / "recipe.yaml"),
        "train.epochs=10",
    ]
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    arguments = [deepspeed, "--num_accelerators", "2", "--master_port", str(port), *script]
    quiet: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "cwd": run_dir,
        "env": {**os.environ, "TORCH_EXTENSIONS_DIR": str(run_dir / "extensions")},
    }
    first = subprocess.Popen(arguments, start_new_session=True, **quiet)
    launched.append(first)
    checkpoints = student(run_dir) / "checkpoints"
    while not (checkpoints.is_dir() and any(checkpoints.glob("step-*"))):
        assert first.poll() is None, first.communicate()[0]
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (student(run_dir) / "model").exists()
    again = subprocess.run(arguments, **quiet)
    assert again.returncode == 0, again.stdout[-3000:]
    assert [line["step"] for line in logged(run_dir)] == list(range(1, 64))
    wrong = subprocess.run([sys.executable, *script, "train.seed=1"], **quiet)
    assert wrong.returncode == 2
    assert wrong.stdout.count("error: ") == 1
    assert "Traceback" not in wrong.stdout


def test_a_rank_takes_its_share_of_the_cores(root_dir: Path) -> None:
    """Torch, imported before that, would start a thread on every core in each rank."""
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
        [sys.executable, "-c", script], cwd=root_dir, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "1"], done.stderr
