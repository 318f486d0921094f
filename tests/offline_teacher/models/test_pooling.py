"""One vector a text, as sentence-transformers' files say; what they cannot say here is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import UserError
from offline_teacher.models.pooling import Pooling, pool, read_pooling

MODULES = ["Transformer", "Pooling", "Normalize"]
PATHS = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
MEAN = {"word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
CLS = {"word_embedding_dimension": 8, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def write(directory: Path, pooled: Any, kinds: list[str] = MODULES, **files: Any) -> str:
    modules = [
        {"idx": i, "name": str(i), "path": PATHS[kind], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling/config.json").write_text(json.dumps(pooled))
    for name, content in {"modules": modules, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return str(directory)


def test_files_of_a_mean_and_of_the_first_token(tmp_path: Path) -> None:
    assert read_pooling(write(tmp_path, MEAN)) == Pooling("mean", normalise=True)
    found = read_pooling(
        write(
            tmp_path,
            CLS,
            MODULES[:2],
            config_sentence_transformers={"prompts": {"query": "query: "}, "default_prompt_name": "query"},
            sentence_bert_config={"max_seq_length": 256},
        )
    )
    assert found == Pooling("cls", False, {"query": "query: "}, "query", 256)
    newer = tmp_path / "newer"
    newer.mkdir()
    assert read_pooling(write(newer, {"pooling_mode": "mean"})) == Pooling("mean", normalise=True)


@pytest.mark.parametrize(
    ("pooled", "kinds", "files", "message"),
    [
        (MEAN, [*MODULES[:2], "Dense"], {}, "modules.json is Transformer, Pooling, Dense; supported are"),
        (MEAN, MODULES[:1], {}, "modules.json is Transformer; supported are"),
        (MEAN | CLS | {"pooling_mode_mean_tokens": True}, MODULES, {}, "pools by .*cls_token.*mean_tokens"),
        ({"pooling_mode_max_tokens": True}, MODULES, {}, "pools by pooling_mode_max_tokens"),
        ({"pooling_mode": "lasttoken"}, MODULES, {}, "pools by lasttoken"),
        ({}, MODULES, {}, "pools by nothing"),
        ([], MODULES, {}, "config.json cannot be read"),
        (MEAN, MODULES, {"modules": {}}, "modules.json cannot be read"),
        (MEAN, MODULES, {"modules": [{"type": 3, "path": ""}]}, "modules.json is 3; supported"),
        (MEAN, MODULES, {"modules": ["Transformer"]}, "modules.json is no list of modules"),
        (MEAN, MODULES, {"modules": [{"path": ""}]}, "modules.json is no list of modules"),
        (MEAN, MODULES, {"config_sentence_transformers": {"prompts": ["q: "]}}, "prompts is no mapping"),
        (MEAN, MODULES, {"sentence_bert_config": {"max_seq_length": "long"}}, "max_seq_length is 'long'"),
        (
            MEAN | {"include_prompt": False},
            MODULES,
            {"config_sentence_transformers": {"prompts": {"query": "q: "}}},
            "leaves the prompt out",
        ),
    ],
)
def test_other_poolings_are_one_line(
    pooled: Any, kinds: list[str], files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    directory = write(tmp_path, pooled, kinds, **files)
    with pytest.raises(UserError, match=message):
        read_pooling(directory)


def test_a_directory_without_the_files_is_one_line(tmp_path: Path) -> None:
    assert read_pooling(str(tmp_path)) is None
    directory = write(tmp_path, MEAN)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json cannot be read .*is it a sentence encoder\?"):
        read_pooling(directory)


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("normalise", [True, False])
def test_pooled_vectors_against_a_loop(mode: str, normalise: bool) -> None:
    torch.manual_seed(0)
    hidden, count = torch.randn(3, 7, 8), torch.tensor([7, 4, 1])
    found = pool(hidden.half(), count, Pooling(mode, normalise))  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    for row, states, real in zip(found, hidden.half().double(), count.tolist(), strict=True):
        vector = sum(states[:real]) / real if mode == "mean" else states[0]
        vector = vector / vector.square().sum().sqrt() if normalise else vector
        torch.testing.assert_close(row.double(), vector, rtol=1e-5, atol=1e-6)
    assert pool(hidden.double(), count, Pooling("mean", True)).dtype == torch.float64


def test_padded_states_may_be_anything() -> None:
    hidden = torch.full((1, 3, 2), torch.nan)
    hidden[:, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = pool(hidden, torch.tensor([2]), Pooling("mean", False))
    torch.testing.assert_close(found, torch.tensor([[2.0, 3.0]]))
