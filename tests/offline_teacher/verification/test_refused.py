"""``verify --repair`` and the pass refuse what they should, and move nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.files.locks import exclusive
from offline_teacher.main import main
from tests.offline_teacher.stores import contents
from tests.offline_teacher.verification.damage import (
    TASK,
    again,
    everything,
    first_shard,
    flip,
    run_repair,
)


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
            UserError, match=r"is not a store: it has no manifest\.json, no spec\.json and no finished task"
        ):
            main(["verify", str(place), *more])
    assert everything(tmp_path) == before


def test_a_store_of_format_1_is_refused(made: Path, tmp_path: Path) -> None:
    for name in ("declaration.json", "manifest.json", "shards/r000-0000000.arrow"):
        path = tmp_path / "old" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    words = r"old is of format 1, .*: make it again with the teacher pass, under another store.path"
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
        words = "none of its tasks was made with this recipe"
    with pytest.raises(UserError, match=words):
        run_repair(made, store, changed)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["sequences/train/part-00000.arrow", "manifest.json", "spec.json"])
def test_sequences_are_not_moved_where_there_is_no_text(
    made: Path, store: Path, tmp_path: Path, name: str
) -> None:
    flip(store / name)
    before = everything(tmp_path)
    with pytest.raises(UserError, match="matches no file"):
        run_repair(made, store, "corpus.path=/nowhere/*.txt")
    assert everything(tmp_path) == before


def test_sequences_are_not_moved_where_the_text_is_another(made: Path, store: Path, tmp_path: Path) -> None:
    """Of the same size, so that nothing but reading it tells."""
    other = tmp_path / "other.txt"
    text = (made.parent / "text.txt").read_text()
    other.write_text(text.replace("bab", "dod"))
    assert other.read_text() != text
    flip(store / "sequences/train/part-00000.arrow")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="the text of part 0 of train has changed since"):
        run_repair(made, store, f"corpus.path={other}")
    assert everything(tmp_path) == before


def test_the_pass_refuses_text_that_changed_under_it(made: Path, store: Path, tmp_path: Path) -> None:
    """An unfinished store whose text is rewritten, in the same size: tasks of two texts must not mix."""
    other = tmp_path / "other.txt"
    other.write_text((made.parent / "text.txt").read_text().replace("bab", "dod"))
    (store / "manifest.json").unlink()
    (store / f"tasks/train/{TASK}.json").unlink()
    with pytest.raises(
        UserError, match=r"part 0 .* has changed since .*: restore the text, or choose another"
    ):
        again(made, store, f"corpus.path={other}")


def test_foreign_directories_are_refused_before_anything_is_moved(made: Path, store: Path) -> None:
    (store / "mine").mkdir()
    (store / "mine/notes.txt").write_text("mine")
    (store / "shards/train/link").symlink_to("/nowhere")
    before = everything(store)
    with pytest.raises(UserError, match="mine is a directory where none belongs"):
        run_repair(made, store)
    assert everything(store) == before
    shutil.rmtree(store / "mine")
    (store / "mine").mkdir()
    assert run_repair(made, store) == 0
    assert not (store / "mine").exists()
    assert not (store / "shards/train/link").is_symlink()


def test_two_at_once_are_refused(made: Path, store: Path) -> None:
    before = contents(store)
    flip(first_shard(store))
    wrong = everything(store)
    with exclusive(str(store)):
        for work in (again, run_repair):
            with pytest.raises(UserError, match="another process is at work on it"):
                work(made, store)
        assert everything(store) == wrong
    assert run_repair(made, store) == 0
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


def test_another_activation_is_another_teacher(made: Path, store: Path, tmp_path: Path) -> None:
    shutil.copytree(made.parent / "model", tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match=r"architecture\.hidden_act: 'gelu' -> 'relu'"):
        again(made, store, f"teacher.model={tmp_path / 'model'}")
