"""Hostile directories and recipes, through the functions that read them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import stat
from pathlib import Path

import pytest
from offline_teacher.store.sealed import seal

from infra import storage
from infra.cache import Cache
from infra.errors import UserError
from infra.recipe import load_recipe
from infra.redaction import redact
from infra.remote import shown
from offline_teacher.store.manifest import Manifest
from offline_teacher.store.reader import Store, open_store
from offline_teacher.store.writer import read_declaration
from student_train.mirror import mirrored
from tests.store.synthetic import make_store

SECRET = "hunter2-not-for-logs"
MINIMAL = "name: x\ncorpus: {path: a.txt}\nteacher: {model: m}\n"


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "teacher/../../x", "shards/../../x", "teacher/a\x00b", "x/y"]
)
def test_a_manifest_name_cannot_leave_the_store(tmp_path: Path, name: str) -> None:
    manifest = make_store(str(tmp_path / "store")).manifest
    content = manifest.to_json()
    content["files"][name] = "xxh3-128:" + "0" * 32
    with pytest.raises(ValueError, match="is not a path of a store"):
        Manifest.from_bytes(seal(content))


@pytest.mark.parametrize("name", ["..", ".", "", "a/../b", "/a", "a//b", "a\\b", "a\nb"])
def test_join_stays_inside(name: str) -> None:
    for root in ("/data", "s3://bucket/key"):
        with pytest.raises(UserError, match="not the name of a file"):
            storage.join(root, name)


def test_a_pickle_in_place_of_a_store_file_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    store = make_store(str(tmp_path / "store"))
    data = pickle.dumps(Bomb(mark))
    head = "teacher/mlm_head.safetensors"
    for name in (head, "declaration.json", "manifest.json"):
        Path(store.root, name).write_bytes(data)
    files = {**store.manifest.files, head: storage.digest_bytes(data)}
    with pytest.raises(UserError, match="not a masked-LM head"):
        Store(store.root, dataclasses.replace(store.manifest, files=files)).head()
    with pytest.raises(UserError, match="manifest"):
        open_store(store.root)
    with pytest.raises(UserError, match="declaration"):
        read_declaration(store.root)
    assert not mark.exists()


def test_a_teacher_of_pickled_weights_is_refused(tmp_path: Path) -> None:
    from offline_teacher.teacher import load_teacher

    from infra.sections import Teacher
    from tests.offline_teacher.tiny_teacher import save_bert

    model = save_bert(tmp_path / "model")
    mark = tmp_path / "ran"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UserError, match="safetensors"):
        load_teacher(Teacher(model=str(model)), "cpu")
    assert not mark.exists()


def test_code_in_a_model_directory_is_not_run(tmp_path: Path) -> None:
    import json

    from offline_teacher.teacher import load_teacher

    from infra.sections import Teacher
    from tests.offline_teacher.tiny_teacher import save_bert

    model = save_bert(tmp_path / "model")
    mark = tmp_path / "ran"
    (model / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")
    config = json.loads((model / "config.json").read_text())
    names = ("AutoConfig", "AutoModelForMaskedLM", "AutoTokenizer")
    config["auto_map"] = dict.fromkeys(names, "modeling_evil.Evil")
    (model / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(UserError):
        load_teacher(Teacher(model=str(model)), "cpu")
    assert not mark.exists()


@pytest.mark.parametrize(
    "line",
    [
        "teacher: !!python/object/apply:os.system [touch ran]",
        "teacher: !!python/name:os.system",
        "a: &a [x, x]\nb: *a",
        "<<: {name: y}",
    ],
)
def test_yaml_is_plain_data(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(f"{MINIMAL}{line}\n")
    with pytest.raises(UserError):
        load_recipe("recipe.yaml")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "override",
    [
        f"tracking.uri=http://user:{SECRET}@server:5000",
        f"output=s3://key:{SECRET}@bucket/runs",
        f"corpus.path=s3://key:{SECRET}@bucket/*.txt",
    ],
)
def test_a_password_in_a_recipe_is_refused_and_not_repeated(tmp_path: Path, override: str) -> None:
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    with pytest.raises(UserError, match="password") as caught:
        load_recipe(str(tmp_path / "recipe.yaml"), [override])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{SECRET}@bucket/file",
        f"s3://bucket/file?X-Amz-Signature={SECRET}",
        f"gs://user:{SECRET}@bucket/file?token={SECRET}",
    ],
)
def test_credentials_of_urls_are_not_shown(url: str) -> None:
    assert SECRET not in shown(url)
    assert SECRET not in redact(url)


def test_unpublished_files_are_private(tmp_path: Path) -> None:
    with storage.publishing(str(tmp_path / "file")) as draft:
        assert stat.S_IMODE(os.stat(draft).st_mode) == 0o600


def test_caches_are_private(tmp_path: Path) -> None:
    cache = Cache(None, 1)
    assert stat.S_IMODE(os.stat(cache.directory).st_mode) == 0o700
    named = Cache(str(tmp_path / "cache"), 1)
    assert stat.S_IMODE(os.stat(named.directory).st_mode) == 0o700


def test_a_planted_directory_for_remote_students_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    planted = tmp_path / f"distillation-{os.getuid()}"
    planted.mkdir(mode=0o777)
    planted.chmod(0o777)
    with pytest.raises(UserError, match="not a private directory"), mirrored("s3://bucket/student", None):
        pass
    planted.rmdir()
    planted.symlink_to(tmp_path)
    with pytest.raises(UserError, match="not a private directory"), mirrored("s3://bucket/student", None):
        pass
