"""Models of another family than BERT through the commands: positions, segment ids, rows without a token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from evaluation.candidates.models import Candidate, load_model, load_tokenizer
from evaluation.devices import export, latency
from evaluation.devices.export_files import FLOAT32
from evaluation.devices.latency_table import measure_latency
from evaluation.devices.onnx_model import open_session, run_session
from evaluation.finetuning.finetune import save
from evaluation.main import main
from evaluation.sources.catalogue import find_task
from infra.errors import UserError
from infra.settings.sections import Evaluation
from tests.evaluation.conftest import FILLER, WORDS, save_encoder, save_roberta, write_pairs, write_task
from tests.offline_teacher.families.tiny_models import FAMILIES, masked_lm

POSITIONS = 34
LENGTH = POSITIONS - 1
"""Padding is id 0, so a RoBERTa's first token is at position 1."""


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_roberta(tmp_path_factory.mktemp("roberta"), POSITIONS)


@pytest.fixture(scope="module")
def pair_classifier(roberta: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A RoBERTa with an RTE head whose answers differ."""
    model = load_model(Candidate("m", roberta), find_task("RTE"), seed=1)
    torch.nn.init.normal_(model.classifier.out_proj.weight, generator=torch.Generator().manual_seed(2))
    directory = tmp_path_factory.mktemp("pair_classifier")
    save(model, load_tokenizer(roberta), str(directory), {})
    return str(directory)


def scored(model: str, task: str, data: str, output: Path, length: int) -> list[str]:
    arguments = {"model": model, "tasks": task, "data": data, "output": str(output)}
    arguments |= {"epochs": "0.1", "max-length": str(length)}
    return [f"--{name}={value}" for name, value in arguments.items()]


def long_text() -> str:
    return " ".join([FILLER[0]] * (POSITIONS + 10))


def test_rows_as_long_as_a_roberta_has_positions(roberta: str, tmp_path: Path) -> None:
    data = write_task(tmp_path / "data", 32)
    for part in ("train", "dev"):
        path = Path(data) / "SST-2" / f"{part}.tsv"
        path.write_text(path.read_text() + f"{long_text()}\t1\n")
    with pytest.raises(UserError, match=f"has only {LENGTH} positions"):
        main(scored(roberta, "SST-2", data, tmp_path / "long", LENGTH + 1))
    assert not list(tmp_path.rglob("seed-*"))  # refused before anything is trained
    assert main(scored(roberta, "SST-2", data, tmp_path / "out", LENGTH)) == 0


def test_pairs_with_one_segment_type(roberta: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(scored(roberta, "RTE", write_pairs(tmp_path / "data", 32), output, LENGTH)) == 0
    assert "accuracy" in json.loads((output / "scores.json").read_text())[Path(roberta).name]["RTE"]


@pytest.mark.parametrize("text", ["the film is bright", long_text()])
def test_a_device_takes_pairs_and_long_texts(
    pair_classifier: str, tmp_path: Path, root_dir: Path, text: str
) -> None:
    output = tmp_path / "out"
    assert main(["export", "--model", pair_classifier, "--output", str(output)]) == 0
    assert json.loads((output / "export.json").read_text())["max_length"] == LENGTH
    script = root_dir / "evaluation" / "examples" / "classify_on_device.py"
    command = [sys.executable, str(script), str(output), text, "the car is red"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answers = [line.split("\t") for line in done.stdout.splitlines()]
    assert {label for _, label in answers} == {"entailment", "not_entailment"}
    assert float(answers[0][0]) >= float(answers[1][0])
    assert abs(sum(float(probability) for probability, _ in answers) - 1) <= 1e-3


def test_segment_ids_reach_latency_and_the_graph_as_zeros(pair_classifier: str, tmp_path: Path) -> None:
    model = export.load_for_export(pair_classifier).requires_grad_(False)
    tokenizer = load_tokenizer(pair_classifier)
    (inputs,) = latency.batches(tokenizer, [("the film is bright", "a dull day")], 1, LENGTH)
    assert set(inputs["token_type_ids"][0]) == {0, 1}
    ours = latency.torch_runner(model)(inputs)
    zeros = inputs | {"token_type_ids": np.zeros_like(inputs["input_ids"])}
    expected = model(**{name: torch.from_numpy(ids) for name, ids in zeros.items()}).logits
    export.export_model(model, str(tmp_path), "m")
    graph = run_session(open_session(str(tmp_path / FLOAT32)), inputs)["logits"]
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-6)
    np.testing.assert_allclose(graph, expected, atol=1e-4)


def test_two_segment_types_are_told_apart(encoder: str) -> None:
    """What a BERT knows of segments is not lost."""
    model = load_model(Candidate("m", encoder), find_task("STS-B"), seed=0)
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight[1] += 3
    (pair,) = latency.batches(load_tokenizer(encoder), [("the film is fine", "a day")], 1, 32)
    same = {**pair, "token_type_ids": np.zeros_like(pair["token_type_ids"])}
    runner = latency.torch_runner(model)
    assert not torch.allclose(runner(pair), runner(same))  # type: ignore[arg-type]


def test_latency_cuts_texts_to_the_positions(roberta: str) -> None:
    """It takes STS-B's texts at evaluation.max_length, which no task need use."""
    settings = Evaluation(max_length=LENGTH + 1, elmo_reference=False)
    student = Candidate("student", roberta, student="student")
    times, memory, references = measure_latency([student], settings, [(long_text(), "a day")])
    assert times["student"].total_seconds > 0
    assert memory["student"] > Path(roberta, "model.safetensors").stat().st_size
    assert len(references) == 2


def test_rows_without_a_token_are_no_reason(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    save_encoder(directory)
    BertForMaskedLM(
        BertConfig(vocab_size=len(WORDS) + 1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=64)
    ).save_pretrained(directory)  # fmt: skip
    assert main(scored(str(directory), "SST-2", write_task(tmp_path / "data", 32), tmp_path / "out", 16)) == 0


@pytest.mark.parametrize("task", ["SST-2", "SQuAD"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_alone_takes_a_head(family: str, task: str, tmp_path: Path) -> None:
    """What a student of relations is published as; the head is new, all else is the encoder's."""
    save_encoder(tmp_path)  # its tokenizer is kept
    encoder = masked_lm(family).base_model
    encoder.pooler = None
    encoder.save_pretrained(tmp_path)
    model = load_model(Candidate("m", str(tmp_path)), find_task(task), seed=0)
    loaded, weights = model.base_model.state_dict(), encoder.state_dict()
    assert weights.keys() <= loaded.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    model.save_pretrained(tmp_path)
    lost = load_file(tmp_path / "model.safetensors")
    name = next(name for name in lost if "embeddings" in name)
    save_file(
        {key: lost[key] for key in lost if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks 1 tensors"):
        load_model(Candidate("m", str(tmp_path)), find_task(task), seed=0)
