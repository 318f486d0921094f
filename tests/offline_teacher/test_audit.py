"""``verify`` and ``--repair``: what is refused and moves nothing, what is found, what is made again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from offline_teacher.audit import check
from offline_teacher.capture_pass import run_pass
from offline_teacher.shard_work import ShardWorker

from infra import storage
from infra.errors import UserError
from infra.locks import exclusive
from infra.recipe import load_recipe
from offline_teacher import audit
from offline_teacher.cluster import Pool
from offline_teacher.main import main
from offline_teacher.source import find_source
from offline_teacher.store.manifest import Manifest
from offline_teacher.store.reader import Store, open_store
from offline_teacher.store.verify import set_aside_damaged
from tests.offline_teacher.stores import contents
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text


class LocalPool(Pool):
    """A worker in this process, instead of Ray's."""

    def __enter__(self) -> LocalPool:
        self.worker = ShardWorker(self.recipe, "cpu")
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, items, done, waiting, set_aside=None):  # type: ignore[no-untyped-def]
        for item in items:
            done(item, getattr(self.worker, item.method)(*item.arguments))
        return []


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offline_teacher.repair.Pool", LocalPool)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose store is complete."""
    directory = tmp_path_factory.mktemp("audit")
    text, model = write_text(directory / "text.txt", 60), save_bert(directory / "model")
    path = write_recipe(directory, text, model, teacher={"dtype": "float32"})
    recipe = load_recipe(str(path))
    with LocalPool(recipe) as pool:
        run_pass(recipe, find_source(recipe), recipe.store_dir, pool)
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
    return min((store / "shards").glob("*.arrow"))


def test_what_is_no_store_is_refused_and_left_alone(made: Path, tmp_path: Path) -> None:
    """A model's own directory, beside things a store has directories for: nothing of it is the store's."""
    place = tmp_path / "work"
    shutil.copytree(made.parent / "model", place / "teacher")
    for name in ("sequences/dna.fasta", "shards/of_glass.txt", "notes.txt"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("mine")
    before = everything(tmp_path)
    for more in ([], ["--repair", "--recipe", str(made)]):
        with pytest.raises(UserError, match="is not a store: it has no manifest.json, no declaration.json"):
            main(["verify", str(place), *more])
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("masking.seed=4", "masking.seed: 0 -> 4"),
        ("teacher.dtype=bfloat16", "teacher.dtype: 'float32' -> 'bfloat16'"),
        ("store.top_k=4", "store.top_k: 5 -> 4"),
        ("teacher.model=/nowhere", "no directory /nowhere"),
    ],
)
@pytest.mark.parametrize("damage", ["shard", "sequences", "manifest"])
def test_a_wrong_recipe_moves_nothing(
    made: Path, store: Path, tmp_path: Path, changed: str, words: str, damage: str
) -> None:
    damaged = {
        "shard": first_shard(store),
        "sequences": store / "sequences/part-00000.arrow",
        "manifest": store / "manifest.json",
    }
    flip(damaged[damage])
    before = everything(tmp_path)
    with pytest.raises(UserError, match=words):
        main(["verify", str(store), "--repair", "--recipe", str(made), changed])
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["sequences/part-00000.arrow", "manifest.json"])
def test_sequences_are_not_moved_where_there_is_no_text(
    made: Path, store: Path, tmp_path: Path, name: str
) -> None:
    flip(store / name)
    before = everything(tmp_path)
    with pytest.raises(UserError, match="matches no file"):
        main(["verify", str(store), "--repair", "--recipe", str(made), "corpus.path=/nowhere/*.txt"])
    assert everything(tmp_path) == before


def test_a_shard_is_made_again_without_the_text(made: Path, store: Path) -> None:
    before = contents(store)
    flip(first_shard(store))
    assert main(["verify", str(store), "--repair", "--recipe", str(made), "corpus.path=/nowhere/*.txt"]) == 0
    assert contents(store) == before


@pytest.mark.parametrize("changed", ["masking.seed=4", "store.top_k=4", "sequences.length=12"])
def test_a_rerun_of_another_recipe_is_refused(made: Path, store: Path, changed: str) -> None:
    with pytest.raises(UserError, match=f"was made differently .*{changed.partition('=')[0]}"):
        main(["verify", str(store), "--rerun", "1", "--recipe", str(made), changed])


def test_a_rerun_by_a_gpu_that_is_not_there(made: Path, store: Path) -> None:
    recipe = load_recipe(str(made), ["teacher.gpus_per_worker=1"])
    with pytest.raises(UserError, match=r"teacher\.gpus_per_worker: there is no GPU here"):
        list(audit.rerun_shards(open_store(str(store)), recipe, 1))


def test_bytes_are_compared_not_numbers() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert (audit._bytes_by_row(zeros) != audit._bytes_by_row(-zeros)).any(axis=1).all()


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("teacher/mlm_head.safetensors", -3),
        ("sequences/part-00000.arrow", None),
        ("sequences/part-00000.counts.arrow", None),
        ("sequences/token_counts.arrow", None),
    ],
)
def test_damage_of_an_unfinished_store_is_not_sealed(
    made: Path, store: Path, name: str, offset: int | None
) -> None:
    """Where the manifest is missing the pass goes on: the head is written anew, the rest refused by name."""
    before = contents(store)
    (store / "manifest.json").unlink()
    flip(store / name, offset)
    if name.startswith("teacher"):
        assert _run_again(made, store) is not None
    else:
        with pytest.raises(UserError, match=f"{name} is damaged"):
            _run_again(made, store)
        assert not (store / "manifest.json").exists()
        assert main(["verify", str(store), "--repair", "--recipe", str(made)]) == 0
    assert contents(store) == before


@pytest.mark.parametrize("name", ["sequences/index.json", "sequences/part-00000.json"])
@pytest.mark.parametrize("manifest", ["missing", "damaged", "whole"])
def test_damaged_books_of_the_sequences(made: Path, store: Path, name: str, manifest: str) -> None:
    before = contents(store)
    path = store / name
    path.write_text(path.read_text().replace('"tokens": ', '"tokens": 1'))
    if manifest == "missing":
        (store / "manifest.json").unlink()
    elif manifest == "damaged":
        flip(store / "manifest.json")
    assert main(["verify", str(store)]) != 0
    assert main(["verify", str(store), "--repair", "--recipe", str(made)]) == 0
    assert contents(store) == before


def test_foreign_files_do_not_get_into_a_manifest(made: Path, store: Path) -> None:
    before = contents(store)
    (store / "manifest.json").unlink()
    (store / "tokenizer/more.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer/more\.json is foreign"):
        _run_again(made, store)
    assert main(["verify", str(store), "--repair", "--recipe", str(made)]) == 0
    assert contents(store) == before
    assert (store.parent / "store.damaged/tokenizer/more.json").read_text() == "{}"


def test_a_directory_does_not_get_into_a_manifest(made: Path, store: Path) -> None:
    (store / "manifest.json").unlink()
    (store / "sequences/mine").mkdir()
    for work in (_run_again, _repair):
        with pytest.raises(UserError, match="sequences/mine is no file, and nothing of a store"):
            work(made, store)


def test_a_damaged_declaration_of_an_unfinished_store(made: Path, store: Path) -> None:
    before = contents(store)
    (store / "manifest.json").unlink()
    flip(store / "declaration.json")
    with pytest.raises(UserError, match=r"declaration\.json .*verify .*store --repair"):
        _run_again(made, store)
    assert main(["verify", str(store), "--repair", "--recipe", str(made)]) == 0
    assert contents(store) == before


def test_a_manifest_of_other_shards_is_made_again(made: Path, store: Path) -> None:
    """As a driver leaves it that makes a shard again, with other last bits, and dies before the manifest."""
    before = contents(store)
    manifest = Manifest.from_bytes((store / "manifest.json").read_bytes())
    other = Manifest(manifest.declaration, manifest.shard_digests[::-1], manifest.files)
    (store / "manifest.json").write_bytes(other.to_bytes())
    assert _run_again(made, store) is not None
    assert contents(store) == before


def test_a_head_that_is_gone_is_written(made: Path, store: Path) -> None:
    before = contents(store)
    (store / "teacher/mlm_head.safetensors").unlink()
    assert _run_again(made, store) is not None
    assert contents(store) == before


def test_two_at_once_are_refused(made: Path, store: Path) -> None:
    before = contents(store)
    flip(first_shard(store))
    damaged = everything(store)
    with exclusive(str(store)):
        for work in (_run_again, _repair):
            with pytest.raises(UserError, match="another process is at work on it"):
                work(made, store)
        assert everything(store) == damaged
    _repair(made, store)
    assert contents(store) == before


def test_quarantine_of_a_store_called_dot(made: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store)
    before = contents(store)
    flip(first_shard(store))
    assert main(["verify", ".", "--repair", "--recipe", str(made)]) == 0
    assert contents(store) == before
    assert (store.parent / "store.damaged/shards" / first_shard(store).name).exists()
    assert main(["verify", "."]) == 0


def test_foreign_directories_are_refused_before_anything_is_moved(made: Path, store: Path) -> None:
    (store / "mine").mkdir()
    (store / "mine/notes.txt").write_text("mine")
    (store / "shards/link").symlink_to("/nowhere")
    before = everything(store)
    with pytest.raises(UserError, match="mine is a directory where none belongs"):
        _repair(made, store)
    assert everything(store) == before
    shutil.rmtree(store / "mine")
    (store / "mine").mkdir()
    _repair(made, store)
    assert not (store / "mine").exists()
    assert not (store / "shards/link").is_symlink()


def test_a_store_on_a_file_system_of_its_own(
    made: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    before = contents(store)
    flip(first_shard(store))
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        problems = check(str(store))
        assert len(set_aside_damaged(str(store), problems)) == 2
    assert (store.parent / "store.damaged/shards" / first_shard(store.parent / "store.damaged").name).exists()
    assert _run_again(made, store) is not None
    assert contents(store) == before


@pytest.mark.parametrize("gone", [["sequences/index.json"], ["declaration.json"]])
@pytest.mark.parametrize("manifest", ["missing", "damaged"])
def test_files_that_are_gone_beside_the_manifest(
    made: Path, store: Path, gone: list[str], manifest: str
) -> None:
    before = contents(store)
    flip(store / "manifest.json") if manifest == "damaged" else (store / "manifest.json").unlink()
    for name in gone:
        (store / name).unlink()
    _repair(made, store)
    assert contents(store) == before


def test_without_manifest_and_declaration_the_shards_say_whose_they_are(made: Path, store: Path) -> None:
    before = contents(store)
    flip(store / "manifest.json")
    flip(store / "declaration.json")
    damaged = everything(store)
    with pytest.raises(UserError, match="none of its shards is of this recipe"):
        main(["verify", str(store), "--repair", "--recipe", str(made), "masking.seed=4"])
    assert everything(store) == damaged
    _repair(made, store)
    assert contents(store) == before


def _with_config(made: Path, tmp_path: Path, **changes: object) -> Path:
    """The recipe with a copy of its teacher, whose configuration says something else."""
    shutil.copytree(made.parent / "model", tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    recipe = yaml.safe_load(made.read_text())
    recipe["teacher"]["model"] = str(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml"


def test_a_run_does_not_touch_what_a_manifest_lists(made: Path, store: Path, tmp_path: Path) -> None:
    before = contents(store)
    assert _run_again(_with_config(made, tmp_path, hidden_dropout_prob=0.2), store) is not None
    assert contents(store) == before


def test_another_activation_is_another_teacher(made: Path, store: Path, tmp_path: Path) -> None:
    (store / "manifest.json").unlink()
    first_shard(store).unlink()
    with pytest.raises(UserError, match=r"architecture\.hidden_act: 'gelu' -> 'relu'"):
        _run_again(_with_config(made, tmp_path, hidden_act="relu"), store)


def test_sequences_are_not_moved_where_the_text_is_another(made: Path, store: Path, tmp_path: Path) -> None:
    other = write_text(tmp_path / "other.txt", 61, seed=3)
    flip(store / "sequences/part-00000.arrow")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="part 0 of .* was made of other text"):
        main(["verify", str(store), "--repair", "--recipe", str(made), f"corpus.path={other}"])
    assert everything(tmp_path) == before


def test_a_foreign_file_is_moved_without_the_text(made: Path, store: Path) -> None:
    before = contents(store)
    (store / "sequences/notes.txt").write_text("mine")
    assert main(["verify", str(store), "--repair", "--recipe", str(made), "corpus.path=/nowhere/*.txt"]) == 0
    assert contents(store) == before


def test_a_complete_store_is_only_read(made: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run_again(made, store) is not None  # the recipe is this one's
    monkeypatch.setattr(storage, "publish_bytes", lambda path, data: pytest.fail(f"{path} was written"))
    assert _run_again(made, store) is not None


def test_deep_needs_to_know_the_teachers_format(store: Path) -> None:
    reader = open_store(str(store))
    for fingerprint in ({}, {"recipe": 3}, {"recipe": {"teacher": {"dtype": "float8"}}}):
        other = replace(reader.manifest.declaration, fingerprint=fingerprint)
        manifest = Manifest(other, reader.manifest.shard_digests, reader.manifest.files)
        with pytest.raises(UserError, match="--deep needs recipe.teacher.dtype"):
            audit._teacher_dtype(Store(str(store), manifest))


def test_deep_says_how_much_it_compared(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: str) -> str:
        assert main(["verify", str(store), "--deep", *more]) == 0
        return capsys.readouterr().out.replace(",", "")

    *_, compared, of, recorded, _, _, _ = said("--deep-positions", "3").splitlines()[0].split()[:8]
    assert (of, int(compared)) == ("of", 3 * len(list((store / "shards").glob("*.arrow"))))
    assert f"{recorded} of {recorded} recorded" in said("--deep-positions", "all")


def _run_again(made: Path, store: Path) -> Manifest | None:
    recipe = load_recipe(str(made))
    with LocalPool(recipe) as pool:
        return run_pass(recipe, find_source(recipe), str(store), pool).manifest


def _repair(made: Path, store: Path) -> None:
    assert main(["verify", str(store), "--repair", "--recipe", str(made)]) == 0
    assert check(str(store)) == []
