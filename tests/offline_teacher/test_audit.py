"""``verify`` and ``--repair``: what is refused and moves nothing, what is found, what is made again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from infra import storage
from infra.errors import UserError
from infra.locks import exclusive
from offline_teacher.cluster.task_work import TaskWorker
from offline_teacher.main import main
from offline_teacher.store.damage import move_damaged
from offline_teacher.store.index import TaskIndex
from offline_teacher.store.manifest import Manifest
from offline_teacher.store.reader import Store, open_store
from offline_teacher.verification import audit, deep, repair, rerun
from offline_teacher.verification.audit import Audit, damaged
from tests.offline_teacher.local_pool import LocalPool, make
from tests.offline_teacher.stores import contents
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text

TASK = "e000-p00000-0001"


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "Pool", LocalPool)
    monkeypatch.setattr("os.cpu_count", lambda: 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose store is complete, masked by frequency, with held-out text."""
    directory = tmp_path_factory.mktemp("audit")
    text, model = write_text(directory / "text.txt", 40), save_bert(directory / "model")
    held_out = write_text(directory / "held_out.txt", 10, seed=1)
    path = write_recipe(
        directory,
        text,
        model,
        corpus={"path": [str(text)], "validation_path": [str(held_out)]},
        masking={"sampling": "frequency"},
        teacher={"dtype": "float32"},
    )
    make(path)
    return path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of the store, to be damaged."""
    shutil.copytree(made.parent / "runs/tiny/store", tmp_path / "store")
    return tmp_path / "store"


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def flip(path: Path, offset: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if offset is None else offset] ^= 16
    path.write_bytes(data)


def first_shard(store: Path) -> Path:
    return min((store / "shards/train" / TASK).glob("*.arrow"))


def again(made: Path, store: Path, *overrides: str) -> Store:
    """The pass, over the store."""
    return make(made, f"store.path={store}", *overrides)


def mend(made: Path, store: Path, *overrides: str) -> int:
    return main(["verify", str(store), "--repair", "--recipe", str(made), *overrides])


# --- refused, and nothing moved ---


def test_what_is_no_store_is_refused_and_left_alone(made: Path, tmp_path: Path) -> None:
    """A model's own directory, beside things a store has directories for: nothing of it is the store's."""
    place = tmp_path / "work"
    shutil.copytree(made.parent / "model", place / "teacher")
    for name in ("sequences/dna.fasta", "shards/of_glass.txt", "notes.txt"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("mine")
    before = everything(tmp_path)
    for more in ([], ["--repair", "--recipe", str(made)]):
        with pytest.raises(
            UserError, match=r"is not a store: it has no manifest\.json, no spec\.json, no task"
        ):
            main(["verify", str(place), *more])
    assert everything(tmp_path) == before


def test_a_store_of_format_1_is_refused(made: Path, tmp_path: Path) -> None:
    for name in ("declaration.json", "manifest.json", "shards/r000-0000000.arrow"):
        path = tmp_path / "old" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    words = r"old is of format 1, .*: make it again with the teacher pass, in another place"
    old = str(tmp_path / "old")
    for command in (["verify", old], ["verify", old, "--repair", "--recipe", str(made)], ["inspect", old]):
        with pytest.raises(UserError, match=words):
            main(command)
    with pytest.raises(UserError, match=words):
        again(made, tmp_path / "old")
    (tmp_path / "old/manifest.json").unlink()
    with pytest.raises(UserError, match=words):
        main(["verify", old])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("masking.seed=4", "masking.seed: 0 -> 4"),
        ("teacher.dtype=bfloat16", "teacher.dtype: 'float32' -> 'bfloat16'"),
        ("store.top_k=4", "store.top_k: 5 -> 4"),
        ("teacher.model=/nowhere", "no directory /nowhere"),
    ],
)
@pytest.mark.parametrize("name", ["shard", "sequences/train/part-00000.arrow", "manifest.json", "spec.json"])
def test_a_wrong_recipe_moves_nothing(
    made: Path, store: Path, tmp_path: Path, changed: str, words: str, name: str
) -> None:
    flip(first_shard(store) if name == "shard" else store / name)
    before = everything(tmp_path)
    if name == "spec.json" and "nowhere" not in changed:
        words = "none of its tasks is of this recipe"
    with pytest.raises(UserError, match=words):
        mend(made, store, changed)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["sequences/train/part-00000.arrow", "manifest.json", "spec.json"])
def test_sequences_are_not_moved_where_there_is_no_text(
    made: Path, store: Path, tmp_path: Path, name: str
) -> None:
    flip(store / name)
    before = everything(tmp_path)
    with pytest.raises(UserError, match="matches no file"):
        mend(made, store, "corpus.path=/nowhere/*.txt")
    assert everything(tmp_path) == before


def test_sequences_are_not_moved_where_the_text_is_another(made: Path, store: Path, tmp_path: Path) -> None:
    """Of the same size, so that nothing but reading it tells."""
    other = tmp_path / "other.txt"
    text = (made.parent / "text.txt").read_text()
    other.write_text(text.replace("bab", "dod"))
    assert other.read_text() != text
    flip(store / "sequences/train/part-00000.arrow")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="part 0 of the train text .* was made of other text"):
        mend(made, store, f"corpus.path={other}")
    assert everything(tmp_path) == before


def test_the_pass_refuses_text_that_changed_under_it(made: Path, store: Path, tmp_path: Path) -> None:
    """An unfinished store whose text is rewritten, in the same size: tasks of two texts must not mix."""
    other = tmp_path / "other.txt"
    other.write_text((made.parent / "text.txt").read_text().replace("bab", "dod"))
    (store / "manifest.json").unlink()
    (store / f"tasks/train/{TASK}.json").unlink()
    with pytest.raises(UserError, match=r"part 0 .* made of other text, .*restore it, or choose another"):
        again(made, store, f"corpus.path={other}")


def test_foreign_directories_are_refused_before_anything_is_moved(made: Path, store: Path) -> None:
    (store / "mine").mkdir()
    (store / "mine/notes.txt").write_text("mine")
    (store / "shards/train/link").symlink_to("/nowhere")
    before = everything(store)
    with pytest.raises(UserError, match="mine is a directory where none belongs"):
        mend(made, store)
    assert everything(store) == before
    shutil.rmtree(store / "mine")
    (store / "mine").mkdir()
    assert mend(made, store) == 0
    assert not (store / "mine").exists()
    assert not (store / "shards/train/link").is_symlink()


def test_two_at_once_are_refused(made: Path, store: Path) -> None:
    before = contents(store)
    flip(first_shard(store))
    wrong = everything(store)
    with exclusive(str(store)):
        for work in (again, mend):
            with pytest.raises(UserError, match="another process is at work on it"):
                work(made, store)
        assert everything(store) == wrong
    assert mend(made, store) == 0
    assert contents(store) == before


def test_a_recipe_is_needed(store: Path, tmp_path: Path) -> None:
    flip(first_shard(store))
    (store / "recipe.yaml").unlink()
    before = everything(tmp_path)
    for more in (["--repair"], ["--rerun", "1"]):
        if more == ["--rerun", "1"]:
            flip(first_shard(store))  # whole again: a rerun needs that
        with pytest.raises(UserError, match=r"recipe\.yaml is missing: give the recipe .* --recipe FILE"):
            main(["verify", str(store), *more])
    flip(first_shard(store))
    assert everything(tmp_path) == before


# --- made again ---


DAMAGE = {
    "a shard": lambda store: flip(first_shard(store)),
    "no shard": lambda store: first_shard(store).unlink(),
    "a shard cut off": lambda store: os.truncate(first_shard(store), 100),
    "an index": lambda store: flip(store / f"tasks/train/{TASK}.json"),
    "no index": lambda store: (store / f"tasks/train/{TASK}.json").unlink(),
    "a part": lambda store: flip(store / "sequences/train/part-00000.arrow"),
    "counts": lambda store: flip(store / "sequences/train/part-00000.counts.arrow"),
    "index of a part": lambda store: flip(store / "sequences/train/part-00000.json"),
    "no part": lambda store: (store / "sequences/validation/part-00000.json").unlink(),
    "manifest": lambda store: flip(store / "manifest.json"),
    "no manifest": lambda store: (store / "manifest.json").unlink(),
    "spec": lambda store: flip(store / "spec.json"),
    "no spec": lambda store: (store / "spec.json").unlink(),
    "weights": lambda store: flip(store / "teacher/model.safetensors", -3),
    "configuration": lambda store: flip(store / "teacher/config.json"),
    "no tokenizer": lambda store: (store / "tokenizer/tokenizer.json").unlink(),
    "a file more": lambda store: (store / "tokenizer/more.json").write_text("{}"),
    "a shard more": lambda store: (first_shard(store).parent / "x.arrow").write_text(""),
    "a part more": lambda store: (store / "sequences/train/notes.txt").write_text("mine"),
    "held-out shard": lambda store: flip(min((store / "shards/validation").rglob("*.arrow"))),
}


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_same_store_made_again(
    made: Path, store: Path, damage: str, manifest: bool
) -> None:
    before = contents(store)
    DAMAGE[damage](store)
    if not manifest:
        (store / "manifest.json").unlink(missing_ok=True)
    assert main(["verify", str(store)]) == 3
    assert mend(made, store) == 0
    assert contents(store) == before
    assert main(["verify", str(store)]) == 0


def test_everything_at_once(made: Path, store: Path) -> None:
    before = contents(store)
    for damage in ("spec", "manifest", "a shard", "a part", "an index", "no tokenizer", "weights"):
        DAMAGE[damage](store)
    assert mend(made, store) == 0
    assert contents(store) == before


@pytest.mark.parametrize("damage", ["a shard", "an index", "a part more", "weights"])
def test_what_needs_no_text_is_made_again_without_it(made: Path, store: Path, damage: str) -> None:
    before = contents(store)
    DAMAGE[damage](store)
    assert mend(made, store, "corpus.path=/nowhere/*.txt") == 0
    assert contents(store) == before


@pytest.mark.parametrize("damage", ["a part", "counts", "index of a part", "an index"])
def test_damage_of_an_unfinished_store_is_not_built_upon(made: Path, store: Path, damage: str) -> None:
    """The pass goes on where the manifest is missing, and refuses what is damaged by name."""
    before = contents(store)
    (store / "manifest.json").unlink()
    (store / "tasks/train/e000-p00000-0000.json").unlink()  # so that there is a task to compute
    DAMAGE[damage](store)
    if damage == "index of a part":  # the part is built again
        again(made, store)
    else:
        with pytest.raises(UserError, match=r"is damaged .*verify .*store --repair"):
            again(made, store)
        assert not (store / "manifest.json").exists()
        assert mend(made, store) == 0
    assert contents(store) == before


def test_foreign_files_do_not_get_into_a_manifest(made: Path, store: Path) -> None:
    before = contents(store)
    (store / "manifest.json").unlink()
    (store / "tokenizer/more.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer/more\.json is foreign"):
        again(made, store)
    assert mend(made, store) == 0
    assert contents(store) == before
    assert (store.parent / "store.damaged/tokenizer/more.json").read_text() == "{}"


def test_a_manifest_of_other_tasks_is_made_again(made: Path, store: Path) -> None:
    """As a driver leaves it that makes a task again, with other last bits, and dies before the manifest."""
    before = contents(store)
    manifest = Manifest.from_bytes((store / "manifest.json").read_bytes())
    train = replace(manifest.splits["train"], tasks=manifest.splits["train"].tasks[::-1])
    other = Manifest(manifest.spec, manifest.files, {**manifest.splits, "train": train})
    (store / "manifest.json").write_bytes(other.to_bytes())
    assert main(["verify", str(store)]) == 3
    again(made, store)
    assert contents(store) == before


def test_a_store_called_dot(made: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store)
    before, shard = contents(store), first_shard(store)
    flip(shard)
    assert main(["verify", ".", "--repair", "--recipe", str(made)]) == 0
    assert contents(store) == before
    assert (store.parent / "store.damaged" / shard.relative_to(store)).exists()
    assert main(["verify", "."]) == 0


def test_a_store_on_a_file_system_of_its_own(
    made: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    before, shard = contents(store), first_shard(store)
    flip(shard)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        assert len(move_damaged(str(store), damaged(Audit(str(store))))) == 3  # index, shard, manifest
    assert (store.parent / "store.damaged" / shard.relative_to(store)).exists()
    again(made, store)
    assert contents(store) == before


def test_an_unfinished_store_is_finished_by_repair(made: Path, store: Path) -> None:
    before = contents(store)
    (store / "manifest.json").unlink()
    for index in (store / "tasks/train").glob("*.json"):
        index.unlink()
    assert mend(made, store) == 0
    assert contents(store) == before


def test_a_finished_store_is_only_read(made: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again(made, store)  # the recipe is this one's
    monkeypatch.setattr(storage, "publish_bytes", lambda path, data: pytest.fail(f"{path} was written"))
    again(made, store)


def test_another_activation_is_another_teacher(made: Path, store: Path, tmp_path: Path) -> None:
    shutil.copytree(made.parent / "model", tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match=r"architecture\.hidden_act: 'gelu' -> 'relu'"):
        again(made, store, f"teacher.model={tmp_path / 'model'}")


# --- rerun ---


def whole(store: Path) -> list[str]:
    """What ``verify --rerun`` of all tasks finds."""
    asked = Audit(str(store), rerun=100)
    return [str(finding) for finding in audit.compared(asked)]


def test_a_rerun_in_the_same_environment_compares_bytes(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert whole(store) == []
    told = capsys.readouterr().out
    assert "tasks compared byte for byte" in told
    assert "another environment" not in told
    _other_last_bits(monkeypatch, 1)
    found = whole(store)
    assert found
    assert all("gives other numbers in the same environment" in line for line in found)


@pytest.mark.parametrize(("steps", "within"), [(1, True), (4096, False)])
def test_a_rerun_in_another_environment_compares_within_a_tolerance(
    made: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    steps: int,
    within: bool,
) -> None:
    """The store is one that a GPU made; its numbers differ in their last bits, or by more."""
    _made_by(store, "NVIDIA H100")
    _other_last_bits(monkeypatch, steps)
    before = everything(store)
    code = main(["verify", str(store), "--rerun", "100", "--repair", "--recipe", str(made)])
    assert code == (0 if within else 3)
    told = capsys.readouterr().out
    assert "compared within the tolerance of another environment (device 'NVIDIA H100' -> 'cpu')" in told
    assert ("off by" in told) != within
    assert everything(store) == before  # such a difference is never repaired
    assert not store.with_name("store.damaged").exists()


def test_text_and_masks_are_exact_in_every_environment(
    made: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _made_by(store, "NVIDIA H100")
    original = rerun.read_rows

    def one_label_changed(*arguments: object) -> dict[str, np.ndarray]:
        columns = original(*arguments)  # type: ignore[arg-type]
        return {**columns, "masked_labels": columns["masked_labels"] + (columns["masked_labels"] > 0)}

    monkeypatch.setattr(rerun, "read_rows", one_label_changed)
    assert any("column masked_labels" in line for line in whole(store))


def _made_by(store: Path, device: str) -> None:
    """Changes what the indices say of the environment, and the manifest with them."""
    manifest = Manifest.from_bytes((store / "manifest.json").read_bytes())
    splits = {}
    for split, record in manifest.splits.items():
        tasks = []
        for path in sorted((store / f"tasks/{split}").glob("*.json")):
            index = TaskIndex.from_bytes(path.read_bytes())
            data = replace(index, environment={**index.environment, "device": device}).to_bytes()
            path.write_bytes(data)
            tasks.append(storage.digest_bytes(data))
        splits[split] = replace(record, tasks=tuple(tasks))
    (store / "manifest.json").write_bytes(Manifest(manifest.spec, manifest.files, splits).to_bytes())


def _other_last_bits(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The teacher's hidden states come out some float16 steps larger."""
    original = TaskWorker.columns

    def columns(self: TaskWorker, *arguments: object) -> Iterator[dict[str, np.ndarray]]:
        for piece in original(self, *arguments):  # type: ignore[arg-type]
            bits = piece["hidden_states"].view(np.int16)
            changed = np.where(bits != 0, bits + np.int16(steps), bits).view(np.float16)
            yield {**piece, "hidden_states": changed}

    monkeypatch.setattr(TaskWorker, "columns", columns)


@pytest.mark.parametrize("changed", ["masking.seed=4", "store.top_k=4", "sequences.length=12"])
def test_a_rerun_of_another_recipe_is_refused(made: Path, store: Path, changed: str) -> None:
    with pytest.raises(
        UserError, match=f"was made differently .*{changed.partition('=')[0]}|made differently"
    ):
        main(["verify", str(store), "--rerun", "1", "--recipe", str(made), changed])


def test_bytes_are_compared_not_numbers() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert [row for _, row, _ in rerun.compare_bytes({"x": zeros}, {"x": -zeros})] == [0]
    assert list(rerun.compare_bytes({"x": zeros}, {"x": zeros.copy()})) == []


# --- deep ---


def test_deep_needs_to_know_the_teachers_format(store: Path) -> None:
    opened = open_store(str(store))
    for found in ({}, {"recipe": 3}, {"recipe": {"teacher": {"dtype": "float8"}}}):
        spec = replace(opened.spec, fingerprint={**opened.fingerprint, "recipe": None, **found})
        with pytest.raises(UserError, match=r"--deep needs recipe\.teacher\.dtype"):
            list(deep.deep_check(Store(str(store), spec, opened.manifest), 1))


def test_deep_says_how_much_it_compared(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def compared(*more: str) -> int:
        assert main(["verify", str(store), "--deep", *more]) == 0
        words = capsys.readouterr().out.replace(",", "").split()
        assert words[0] == "deep:"
        return int(words[1])

    tokens = sum(split.tokens for split in open_store(str(store)).splits.values())
    tasks = len(list((store / "tasks").rglob("*.json")))
    assert compared("--deep-positions", "3") == 3 * tasks
    assert compared("--deep-positions", "all") == tokens


@pytest.mark.parametrize("column", ["topk_logits", "topk_ids", "logsumexp"])
@pytest.mark.parametrize("replay_layers", [0, 1])
def test_deep_finds_numbers_that_are_possible_but_of_another_sample(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, replay_layers: int
) -> None:
    """Every digest is right; the numbers of a column belong to the next sample."""
    store = _store(made, tmp_path, replay_layers)
    assert list(deep.deep_check(store, 64)) == []
    original = deep.read_rows

    def shifted(*arguments: object) -> dict[str, np.ndarray]:
        columns = original(*arguments)  # type: ignore[arg-type]
        return {**columns, column: np.roll(columns[column], 1, axis=0)}

    monkeypatch.setattr(deep, "read_rows", shifted)
    found = list(deep.deep_check(store, 64))
    assert {finding.column for finding in found} >= {column}


def _store(made: Path, tmp_path: Path, replay_layers: int) -> Store:
    """The store of a teacher whose distributions differ from sample to sample."""
    values = yaml.safe_load(made.read_text())
    model = save_bert(tmp_path / "sharp", seed=2, scale=1.0)
    values["teacher"]["model"] = str(model)
    values["output"] = str(tmp_path / "runs")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return make(path, f"store.replay_layers={replay_layers}", "store.hidden_states=float16")
