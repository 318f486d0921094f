"""A folder with pages of several tasks, served on this machine and visited in headless Chromium."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.main import main
from evaluation.web import page_bundle
from infra.cpu.native import user_cache
from infra.errors import UserError
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
