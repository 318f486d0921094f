"""Hostile directories and recipes, through the functions that read them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError
from infra.files import storage
from infra.files.cache import Cache
from infra.redaction import redact, without_secrets
from infra.settings.recipe_file import load_recipe
from offline_teacher.inputs.stored_teacher import stored_top
from offline_teacher.store.index import TaskIndex
from offline_teacher.store.manifest import Manifest
from offline_teacher.store.paths import CONFIG, POOLING, WEIGHTS
from offline_teacher.store.records import decode, encode
from offline_teacher.store.store import Store, open_store
from offline_teacher.store.unfinished import read_spec
from offline_teacher.verification.verify import verify
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
    "name",
    ["../x", "/etc/passwd", "teacher/../../x", "shards/../../x", "teacher/a\x00b", "x/y", "teacher/.x"],
)
def test_a_manifest_name_cannot_leave_the_store(tmp_path: Path, name: str) -> None:
    content = decode(make_store(str(tmp_path / "store")).manifest.to_bytes())
    content["files"][name] = "xxh3-128:" + "0" * 32
    with pytest.raises(ValueError, match="is not a path of a store"):
        Manifest.from_bytes(encode(content))


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/passwd", "x/y.arrow", "a" * 32, "A" * 32 + ".arrow"])
def test_a_shard_of_an_index_cannot_leave_the_store(tmp_path: Path, name: str) -> None:
    store = make_store(str(tmp_path / "store"))
    content = decode(min(Path(store.root, "tasks/train").glob("*.json")).read_bytes())
    content["shards"][0]["file"] = name
    with pytest.raises(ValueError, match="shards: file"):
        TaskIndex.from_bytes(encode(content))


def test_an_offset_of_an_index_cannot_leave_its_shard(tmp_path: Path) -> None:
    """Memory is mapped by these numbers; the author of the index wrote the manifest too."""
    store = make_store(str(tmp_path / "store"))
    path = min(Path(store.root, "tasks/train").glob("*.json"))
    whole = decode(path.read_bytes())
    size = whole["shards"][0]["bytes"]
    for start in (size, size - 8, -8, 2**40):
        shards = [{**whole["shards"][0], "start": start}, *whole["shards"][1:]]
        data = encode({**whole, "shards": shards})
        path.write_bytes(data)
        train = store.manifest.splits["train"]
        tasks = (storage.digest_bytes(data), *train.tasks[1:])
        splits = {**store.manifest.splits, "train": dataclasses.replace(train, tasks=tasks)}
        hostile = dataclasses.replace(store.manifest, splits=splits)
        with pytest.raises(UserError, match=r"is damaged: tasks/train/"):
            Store(store.root, store.spec, hostile).task_index("train", 0)


@pytest.mark.parametrize("name", ["..", ".", "", "a/../b", "/a", "a//b", "a\\b", "a\nb"])
def test_join_stays_inside(name: str) -> None:
    for root in ("/data", "s3://bucket/key"):
        with pytest.raises(UserError, match="not the name of a file"):
            storage.join(root, name)


def test_a_pickle_in_place_of_a_store_file_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    store = make_store(str(tmp_path / "store"))
    data = pickle.dumps(Bomb(mark))
    for name in (WEIGHTS, CONFIG):
        Path(store.root, name).write_bytes(data)
        files = {**store.manifest.files, name: storage.digest_bytes(data)}
        hostile = Store(store.root, store.spec, dataclasses.replace(store.manifest, files=files))
        with pytest.raises(UserError, match="store"):
            stored_top(hostile)
    names = [str(path) for path in Path(store.root).rglob("*") if path.is_file()]
    for name in names:
        Path(name).write_bytes(data)
    assert verify(store.root)
    for read in (open_store, read_spec):
        with pytest.raises(UserError, match="damaged"):
            read(store.root)
    assert not mark.exists()


def test_a_teacher_of_pickled_weights_is_refused(tmp_path: Path) -> None:
    from tests.offline_teacher.tiny_teacher import save_bert

    model = save_bert(tmp_path / "model")
    mark = tmp_path / "ran"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UserError, match="safetensors"):
        _load(model)
    assert not mark.exists()


def test_code_in_a_model_directory_is_not_run(tmp_path: Path) -> None:
    from tests.offline_teacher.tiny_teacher import save_bert

    model = save_bert(tmp_path / "model")
    mark = tmp_path / "ran"
    (model / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")
    config = json.loads((model / "config.json").read_text())
    names = ("AutoConfig", "AutoModelForMaskedLM", "AutoTokenizer")
    config["auto_map"] = dict.fromkeys(names, "modeling_evil.Evil")
    (model / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(UserError):
        _load(model)
    assert not mark.exists()


def test_code_that_a_sentence_encoder_names_is_not_run(tmp_path: Path) -> None:
    """modules.json names classes; only three are known, and none is imported by its name."""
    from offline_teacher.models.pooling import read_pooling

    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Pooling: pass\n")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "../../etc", "type": "evil.Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError):
        read_pooling(str(tmp_path))
    assert not mark.exists()


def test_code_that_a_store_names_is_not_run(tmp_path: Path) -> None:
    """A store's config.json may name classes of its own, and its pooling.json anything."""
    mark = tmp_path / "ran"
    store = make_store(str(tmp_path / "store"))
    (Path(store.root, "teacher") / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    config: dict[str, Any] = {"model_type": "bert", "auto_map": {"AutoModel": "evil.Evil"}, "hidden_size": 8}
    config |= {"vocab_size": 40, "num_attention_heads": 2, "num_hidden_layers": 1}
    hostile_files = {CONFIG: json.dumps(config).encode(), POOLING: b'["evil"]'}
    digests = dict(store.manifest.files)
    for name, data in hostile_files.items():
        Path(store.root, name).write_bytes(data)
        digests[name] = storage.digest_bytes(data)
    hostile = Store(store.root, store.spec, dataclasses.replace(store.manifest, files=digests))
    assert stored_top(hostile) is None  # its weights have no head
    with pytest.raises(UserError, match=r"teacher/pooling\.json holds no JSON object"):
        hostile.pooling()
    assert not mark.exists()


def _load(model: Path) -> None:
    """Everything that a pass reads of a teacher's directory."""
    from infra.settings.sections import Teacher
    from offline_teacher.inference.teacher import load_teacher
    from offline_teacher.sequences.tokenizer import load_tokenizer

    load_tokenizer(str(model))
    load_teacher(Teacher(model=str(model)), 1, True, "cpu")


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
    assert SECRET not in without_secrets(url)
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
