"""The browser page: its folder, and, where Node and Chromium are, what it does in a browser."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluation.main import main
from evaluation.web import page_bundle
from evaluation.web.golden import SENTENCES
from evaluation.web.site import RUNTIMES, SITE
from infra.cpu.native import user_cache
from infra.errors import UserError
from tests.evaluation.families import family_recipe, save_store
from tests.evaluation.test_export import fine_tuned

WORDS = (
    "the",
    "light",
    "##house",
    "##s",
    "was",
    "built",
    "in",
    "by",
    "two",
    "sisters",
    "kept",
    "lamp",
    "film",
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def encoder_of_pieces(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small BERT with a tokenizer of BERT's kind."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    directory = tmp_path_factory.mktemp("pieces")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?.,[]"
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    torch.manual_seed(0)
    BertForMaskedLM(
        BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=64, max_position_embeddings=128)
    ).save_pretrained(directory)  # fmt: skip
    return str(directory)


@pytest.fixture(scope="module")
def page() -> Path:
    """The built page; the test is skipped where it cannot be built, for example without network."""
    try:
        return page_bundle.built_page()
    except UserError as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def folder(encoder_of_pieces: str, page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with a task of each kind, SQuAD with a teacher."""
    base = tmp_path_factory.mktemp("site")
    output = base / "site"
    models = {name: fine_tuned(encoder_of_pieces, name, base / name) for name in ("SQuAD", "SST-2", "STS-B")}
    for task, more in {
        "SQuAD": ["--teacher", models["SQuAD"]],
        "SST-2": ["--labels", "bad,good"],
        "STS-B": [],
    }.items():
        assert (
            main(["export", "--web", "--model", models[task], "--task", task, "--output", str(output), *more])
            == 0
        )
    assert (
        main(["export", "--web", "--model", encoder_of_pieces, "--task", "Similar", "--output", str(output)])
        == 0
    )
    return output


@pytest.fixture(scope="module")
def browser() -> Path:
    """The page's sources with the packages of its own tests."""
    npm = shutil.which("npm")
    if npm is None or CHROMIUM is None:
        pytest.skip("Node or Chromium is not installed")
    sources = [*page_bundle.source_files(), *sorted((page_bundle.SOURCES / "tests").iterdir())]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:32]
    target = user_cache() / f"page-tests-{digest}"
    if not (target / "ready").exists():
        for path in sources:
            copy = target / path.relative_to(page_bundle.SOURCES)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        if subprocess.run(command, cwd=target, capture_output=True).returncode:
            pytest.skip("the page's packages cannot be installed here")
        (target / "ready").touch()
    return target


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Any]:
    servers = []

    def start(directory: Path) -> str:
        handler = functools.partial(_Quiet, directory=str(directory))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def visit(browser: Path, serve: Any) -> Any:
    def visited(directory: Path, step: str, query: str = "") -> dict[str, Any]:
        command = ["node", "tests/visit.mjs", serve(directory), str(CHROMIUM), step, query]
        done = subprocess.run(command, cwd=browser, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        assert found["foreign"] == []
        assert found["errors"] == []
        return found

    return visited


@pytest.mark.parametrize("task", ["SQuAD", "SQuAD&model=teacher", "SST-2", "STS-B", "Similar"])
def test_the_page_computes_what_python_does(task: str, folder: Path, visit: Any) -> None:
    found = visit(folder, "selftest", f"task={task}")
    assert found["report"]["examples"] >= 3
    assert found["report"]["differences"] == []
    assert found["processor"] == "cpu"
    assert [name for name in found["asked"] if "gpu" in name] == []


@pytest.mark.parametrize("task", ["SQuAD", "STS-B", "Similar"])
def test_a_graphics_processor_computes_what_python_does(task: str, folder: Path, visit: Any) -> None:
    found = _with_graphics(visit, folder, "selftest", task)
    assert found["processor"] == "gpu"
    assert found["report"]["differences"] == []
    assert "Computed by: the graphics processor (WebGPU)" in found["figures"]
    assert [name for name in found["asked"] if name.startswith(RUNTIMES["cpu"])] == []


def test_without_a_graphics_processor_the_processor_computes(folder: Path, visit: Any) -> None:
    found = visit(folder, "first", "task=SQuAD&processor=cpu")
    assert "Computed by: the processor (WebAssembly)" in found["figures"]


def test_a_graphics_processor_that_answers_otherwise_is_not_used(
    folder: Path, visit: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "site"
    shutil.copytree(folder, copy)
    with changed_golden(copy) as examples:
        examples[0]["span"]["score"] += 0.01
    found = _with_graphics(visit, copy, "first", "SQuAD")
    assert found["processor"] == "cpu"
    assert found["answer"]
    assert "Done in" in found["status"]
    assert any("failed: its answers are not Python's" in line for line in found["figures"])


def test_a_graphics_processor_whose_runtime_fails_is_not_used(
    folder: Path, visit: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "site"
    shutil.copytree(folder, copy)
    _cut(copy / RUNTIMES["gpu"])
    found = _with_graphics(visit, copy, "first", "SQuAD")
    assert found["processor"] == "cpu"
    assert found["answer"]
    assert "Done in" in found["status"]
    assert any("failed: runtime-gpu.wasm.gz is damaged" in line for line in found["figures"])


def _with_graphics(visit: Any, directory: Path, step: str, task: str) -> dict[str, Any]:
    """A visit with Chromium's emulated graphics processor; skips the test if this Chromium has none."""
    found: dict[str, Any] = visit(directory, step, f"task={task}&processor=gpu")
    if not found["adapter"]:
        pytest.skip("this Chromium emulates no graphics processor")
    return found


@contextlib.contextmanager
def changed_golden(site: Path) -> Iterator[list[dict[str, Any]]]:
    """The expected examples of the first model, to be changed in place; the folder stays consistent."""
    content = json.loads((site / SITE).read_text())
    about = content["tasks"][0]["models"][0]["golden"]
    golden = json.loads(gzip.decompress((site / about["path"]).read_bytes()))
    yield golden["examples"]
    data = gzip.compress(json.dumps(golden).encode())
    (site / about["path"]).write_bytes(data)
    about |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (site / SITE).write_text(json.dumps(content))


def test_the_self_test_finds_what_is_different(folder: Path, visit: Any, tmp_path: Path) -> None:
    """Each kind of expected value is changed in one example."""
    copy = tmp_path / "site"
    shutil.copytree(folder, copy)
    with changed_golden(copy) as (first, second, third, fourth, fifth, *_):
        first["ids"][0][1] += 1
        second["span"]["first"] += 1
        third["span"]["text"] += "."
        fourth["span"]["score"] += 0.01
        fifth["span"]["noAnswer"] -= 0.01
    found = visit(copy, "selftest")["report"]["differences"]
    expected = [[0, "ids"], [1, "span"], [2, "answer"], [3, "score"], [4, "no answer"]]
    assert [[one["example"], one["what"]] for one in found] == expected


def test_the_page_works_without_a_network_after_the_first_visit(folder: Path, visit: Any) -> None:
    found = visit(folder, "offline")
    assert found["refused"]
    assert found["offline"] == found["online"]


@pytest.mark.parametrize("task", ["SQuAD", "SST-2", "Similar"])
def test_everybody_can_use_the_page(task: str, folder: Path, visit: Any) -> None:
    assert visit(folder, "accessibility", f"task={task}")["violations"] == []


@pytest.mark.parametrize("task", ["SQuAD", "STS-B"])
def test_hostile_texts_get_an_answer_or_a_message(task: str, folder: Path, visit: Any) -> None:
    found = visit(folder, "hostile", f"task={task}")["found"]
    assert {one["state"] for one in found.values()} == {"ready"}
    assert "first" in found["empty"]["answer"]


def test_a_megabyte_of_text_can_be_stopped(folder: Path, visit: Any) -> None:
    found = visit(folder, "large")
    assert found["characters"] == 1_000_000
    assert "Reading part" in found["during"]
    assert found["stopped"] == "Stopped."


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda site: (site / SITE).unlink(), "site.json is missing"),
        (lambda site: (site / SITE).write_text("{"), "site.json is damaged"),
        (lambda site: (site / "models/SQuAD/student/model.int8.onnx").unlink(), "model.int8.onnx is missing"),
        (lambda site: _flip(site / "models/SQuAD/student/model.int8.onnx"), "model.int8.onnx is damaged"),
        (lambda site: _cut(site / "models/SQuAD/student/model.int8.onnx"), "model.int8.onnx is damaged"),
        (lambda site: _flip(site / "models/SQuAD/student/tokenizer.json.gz"), "tokenizer.json.gz is damaged"),
        (lambda site: _cut(site / "runtime.wasm.gz"), "runtime.wasm.gz is damaged"),
    ],
)
def test_a_damaged_folder_is_named(damage: Any, says: str, folder: Path, visit: Any, tmp_path: Path) -> None:
    copy = tmp_path / "site"
    shutil.copytree(folder, copy)
    damage(copy)
    found = visit(copy, "message")
    assert found["state"] == "error"
    assert says in found["status"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_the_folder_says_what_it_holds(folder: Path) -> None:
    site = json.loads((folder / SITE).read_text())
    assert [task["name"] for task in site["tasks"]] == ["SQuAD", "SST-2", "STS-B", "Similar"]
    assert [model["role"] for model in site["tasks"][0]["models"]] == ["student", "teacher"]
    assert site["tasks"][1]["models"][0]["labels"] == ["bad", "good"]
    stored = [
        model[key]
        for task in site["tasks"]
        for model in task["models"]
        for key in ("graph", "tokenizer", "golden")
    ]
    for file in [*site["runtimes"].values(), *stored]:
        data = (folder / file["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    policy = (folder / "index.html").read_text()
    assert "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'" in policy


@pytest.mark.parametrize("script", ["test", "check"])
def test_the_page_passes_its_own_tests_and_types(script: str, browser: Path) -> None:
    done = subprocess.run(["npm", "run", script], cwd=browser, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_recipe_brings_all_its_fine_tuned_models(
    encoder_of_pieces: str, page: Path, toy_data: str, tmp_path: Path
) -> None:
    recipe, scores = tmp_path / "recipe.yaml", tmp_path / "runs" / "small" / "evaluation" / "scores"
    recipe.write_text(
        json.dumps(
            {
                "name": "small",
                "output": str(tmp_path / "runs"),
                "store": {"path": str(tmp_path / "store")},
                "evaluation": {"tasks": ["SST-2"], "data": toy_data, "max_length": 40},
            }
        )
    )
    command = [
        "export",
        "--web",
        "--recipe",
        str(recipe),
        "--output",
        str(tmp_path / "out"),
        "--compared",
        "2",
    ]
    with pytest.raises(UserError, match="no fine-tuned models for the page yet"):
        main(command)
    for role in ("student", "teacher"):
        fine_tuned(encoder_of_pieces, "SST-2", scores / role / "SST-2" / "model")
    assert main(command) == 0
    (task,) = json.loads((tmp_path / "out" / SITE).read_text())["tasks"]
    assert [(model["role"], model["length"], model["texts"]) for model in task["models"]] == [
        ("student", 40, 1),
        ("teacher", 40, 1),
    ]
    golden = (tmp_path / "out" / task["models"][0]["golden"]["path"]).read_bytes()
    assert len(json.loads(gzip.decompress(golden))["examples"]) == len(SENTENCES) + 2


def test_an_evaluation_brings_its_page(
    encoder_of_pieces: str, page: Path, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """First without Node, then with it."""
    recipe = family_recipe(
        tmp_path, save_store(tmp_path / "store", encoder_of_pieces), data=toy_data, references=(),
        max_steps=1, export_web=True,
    )  # fmt: skip
    path, directory = tmp_path / "recipe.yaml", Path(recipe.evaluation_dir)
    path.write_text(recipe.to_yaml())
    for name in ("half", "tiny"):
        shutil.copytree(encoder_of_pieces, Path(recipe.run(name).directory) / "model")
    with monkeypatch.context() as without:
        without.setattr(page_bundle, "user_cache", lambda: tmp_path)
        without.setattr(page_bundle, "shutil", SimpleNamespace(which=lambda name: None))
        assert main(["--recipe", str(path)]) == 0
    assert "note: no page for browsers: export --web: Node is not installed" in capsys.readouterr().out
    assert "web/index.html" not in (directory / "report.html").read_text()
    (directory / "report.json").unlink()
    assert main(["--recipe", str(path)]) == 0
    assert 'href="web/index.html"' in (directory / "report.html").read_text()
    (task,) = json.loads((directory / "web" / SITE).read_text())["tasks"]
    assert [model["role"] for model in task["models"]] == ["half", "tiny", "teacher"]


def test_node_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, encoder_of_pieces: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(page_bundle, "user_cache", lambda: tmp_path)
    monkeypatch.setattr(page_bundle.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="Node is not installed"):
        main(["export", "--web", "--model", encoder_of_pieces, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out" / SITE).exists()


def test_a_tokenizer_that_the_page_lacks_is_refused(page: Path, encoder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="BertNormalizer"):
        main(["export", "--web", "--model", encoder, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out" / SITE).exists()


def test_the_lock_file_names_packages_by_their_content_and_no_registry() -> None:
    packages = json.loads((page_bundle.SOURCES / "package-lock.json").read_text())["packages"]
    assert len(packages) > 10
    for name, package in packages.items():
        assert "resolved" not in package, name
        assert not name or package["integrity"].startswith("sha512-"), name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "x", "--labels", "a,b"], "--labels: goes with --web"),
        (["--model", "x", "--recipe", "y"], "either --model DIR or"),
        (["--web", "--model", "x", "--vocabulary", "9"], "--vocabulary: give --task and --data"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        main(["export", *arguments, "--output", "out"])
