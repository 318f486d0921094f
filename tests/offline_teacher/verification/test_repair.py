"""``verify`` finds damage, and ``--repair`` or the pass makes the same store again."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.files import storage
from offline_teacher.main import main
from offline_teacher.store.manifest import Manifest
from offline_teacher.verification.repair import move_damaged
from offline_teacher.verification.verify_command import VerifyOptions, find_damage
from tests.offline_teacher.stores import contents
from tests.offline_teacher.verification.damage import (
    DAMAGE,
    again,
    first_shard,
    flip,
    run_repair,
)


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
    assert run_repair(made, store) == 0
    assert contents(store) == before
    assert main(["verify", str(store)]) == 0


def test_everything_at_once(made: Path, store: Path) -> None:
    before = contents(store)
    for damage in ("spec", "manifest", "a shard", "a part", "an index", "no tokenizer", "weights"):
        DAMAGE[damage](store)
    assert run_repair(made, store) == 0
    assert contents(store) == before


@pytest.mark.parametrize("damage", ["a shard", "an index", "a part more", "weights"])
def test_what_needs_no_text_is_made_again_without_it(made: Path, store: Path, damage: str) -> None:
    before = contents(store)
    DAMAGE[damage](store)
    assert run_repair(made, store, "corpus.path=/nowhere/*.txt") == 0
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
        assert run_repair(made, store) == 0
    assert contents(store) == before


def test_foreign_files_do_not_get_into_a_manifest(made: Path, store: Path) -> None:
    before = contents(store)
    (store / "manifest.json").unlink()
    (store / "tokenizer/more.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer/more\.json is foreign"):
        again(made, store)
    assert run_repair(made, store) == 0
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
        assert (
            len(move_damaged(str(store), find_damage(VerifyOptions(str(store))))) == 3
        )  # index, shard, manifest
    assert (store.parent / "store.damaged" / shard.relative_to(store)).exists()
    again(made, store)
    assert contents(store) == before


def test_an_unfinished_store_is_finished_by_repair(made: Path, store: Path) -> None:
    before = contents(store)
    (store / "manifest.json").unlink()
    for index in (store / "tasks/train").glob("*.json"):
        index.unlink()
    assert run_repair(made, store) == 0
    assert contents(store) == before


def test_a_finished_store_is_only_read(made: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again(made, store)  # the recipe is this one's
    monkeypatch.setattr(storage, "publish_bytes", lambda path, data: pytest.fail(f"{path} was written"))
    again(made, store)
