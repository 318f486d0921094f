"""A folder with pages of several tasks, served on this machine and visited in headless Chromium."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.main import main
from evaluation.web import page_bundle
from infra.errors import UserError
from tests.evaluation.test_export import fine_tuned
from tests.evaluation.web.browser import Missing, page_tests, served
from tests.evaluation.web.browser import visit as visited_by

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
    try:
        return page_tests()
    except Missing as problem:
        pytest.skip(str(problem))


@pytest.fixture
def visit(browser: Path) -> Iterator[Any]:
    with contextlib.ExitStack() as servers:

        def visited(directory: Path, step: str, query: str = "") -> dict[str, Any]:
            found = visited_by(browser, servers.enter_context(served(directory)), step, query)
            assert found["foreign"] == []
            assert found["errors"] == []
            return found

        yield visited
