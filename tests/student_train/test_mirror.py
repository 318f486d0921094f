"""The mirror of a remote student; a local directory stands for the object store."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.files.locks import exclusive
from student_train.engine.checkpoint_format import newest_step
from student_train.mirror import INDEX, Mirror, mirrored


def write(root: str, name: str, text: str) -> None:
    path = Path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def contents(root: str) -> dict[str, str]:
    """Returns all files but those that are never copied."""
    files = [path for path in Path(root).rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(root)): path.read_text() for path in files}


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    for name in ("remote", "local", "other"):
        (tmp_path / name).mkdir()
    return Mirror(str(tmp_path / "remote"), str(tmp_path / "local"))


def test_what_is_pushed_is_what_another_machine_pulls(mirror: Mirror, tmp_path: Path) -> None:
    write(mirror.local, "checkpoints/step-00000001/weights.safetensors", "w")
    write(mirror.local, "checkpoints/step-00000001/state.json", "s")
    write(mirror.local, "history.jsonl", "one\n")
    mirror.push()
    write(mirror.local, "checkpoints/step-00000002/state.json", "t")
    os.remove(Path(mirror.local, "checkpoints/step-00000001/weights.safetensors"))
    write(mirror.local, "history.jsonl", "one\ntwo\n")
    mirror.push()
    other = Mirror(mirror.remote, str(tmp_path / "other"))
    other.pull()
    pulled = contents(other.local)
    assert pulled == contents(mirror.local)
    assert set(contents(mirror.remote)) == {*pulled, INDEX}


def test_an_unchanged_file_is_not_copied_again(mirror: Mirror) -> None:
    write(mirror.local, "model/config.json", "{}")
    mirror.push()
    before = os.stat(Path(mirror.remote, "model/config.json")).st_ino
    os.utime(Path(mirror.local, "model/config.json"), ns=(1, 1))
    mirror.push()
    assert os.stat(Path(mirror.remote, "model/config.json")).st_ino == before


def test_files_that_belong_here_alone_stay_here(mirror: Mirror) -> None:
    for name in (".lock", ".tmp-1/x", "checkpoints/step-00000001.damaged-1/state.json", ".tmp-2"):
        write(mirror.local, name, "x")
    mirror.push()
    assert set(contents(mirror.remote)) == {INDEX}


def test_a_removed_student_is_not_resumed_from_what_is_here(mirror: Mirror) -> None:
    write(mirror.local, "checkpoints/step-00000001/state.json", "s")
    mirror.pull()
    assert "checkpoints/step-00000001/state.json" not in contents(mirror.local)


def test_a_student_that_another_machine_started_over_replaces_what_is_here(
    mirror: Mirror, tmp_path: Path
) -> None:
    """This machine finished it; its remote directory was removed; another machine started it again."""
    for name in ("model.json", "model/config.json", "history.jsonl"):
        write(mirror.local, name, "of the first training")
    mirror.push()
    shutil.rmtree(mirror.remote)
    other = Mirror(mirror.remote, str(tmp_path / "other"))
    write(other.local, "history.jsonl", "of the second training")
    other.push()
    Mirror(mirror.remote, mirror.local).pull()
    assert contents(mirror.local) == {"history.jsonl": "of the second training"}


def test_an_empty_folder_of_a_checkpoint_does_not_stay(mirror: Mirror, tmp_path: Path) -> None:
    """It would count as a damaged checkpoint."""
    write(mirror.local, "checkpoints/step-00000300/state.json", "not pushed")
    other = Mirror(mirror.remote, str(tmp_path / "other"))
    write(other.local, "history.jsonl", "of another machine")
    other.push()
    Mirror(mirror.remote, mirror.local).pull()
    assert newest_step(f"{mirror.local}/checkpoints") is None


def test_what_could_not_be_pushed_is_kept(mirror: Mirror) -> None:
    write(mirror.local, "history.jsonl", "one")
    mirror.push()
    write(mirror.local, "checkpoints/step-00000009/state.json", "newer")
    Mirror(mirror.remote, mirror.local).pull()
    assert contents(mirror.local)["checkpoints/step-00000009/state.json"] == "newer"


def test_a_second_start_touches_no_file_of_a_training(mirror: Mirror) -> None:
    write(mirror.local, "history.jsonl", "one")
    mirror.push()
    with exclusive(mirror.local):
        write(mirror.local, "history.jsonl", "one, two")
        Mirror(mirror.remote, mirror.local).pull()
    assert contents(mirror.local) == {"history.jsonl": "one, two"}


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "a\\b", ""])
def test_a_listed_name_cannot_leave_the_directory(mirror: Mirror, name: str) -> None:
    write(mirror.remote, INDEX, json.dumps({"files": {name: "xxh3-128:" + "0" * 32}}))
    with pytest.raises(UserError, match="not the name of a file"):
        mirror.pull()


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": []}', '{"files": {"a": 1}}', "{"])
def test_a_damaged_index_is_one_clear_line(mirror: Mirror, content: str) -> None:
    write(mirror.remote, INDEX, content)
    with pytest.raises(UserError, match=INDEX):
        mirror.pull()


def test_a_local_output_has_no_mirror(tmp_path: Path) -> None:
    with mirrored(str(tmp_path), None) as mirror:
        assert mirror is None
