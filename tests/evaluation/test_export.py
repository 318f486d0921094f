from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation.candidates.models import Candidate, load_model, load_tokenizer
from evaluation.devices import export
from evaluation.devices.export_files import FLOAT32, INT8
from evaluation.devices.onnx_model import OnnxModel, open_session, run_session
from evaluation.devices.quantisation import pack_rows, quantise_rows
from evaluation.finetuning import finetune
from evaluation.finetuning.finetune import save
from evaluation.finetuning.training import predict
from evaluation.kinds.predictions import score_split
from evaluation.kinds.registry import KINDS
from evaluation.main import main
from evaluation.sources.catalogue import find_task
from evaluation.sources.loading import load
from evaluation.tasks import answer_spans
from infra.errors import UserError
from tests.starts import COMMANDS, HEAVY, loaded, start

NO_TORCH = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(name + " is not on this device")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def fine_tuned(encoder: str, task_name: str, directory: Path) -> str:
    """The task's head with weights large enough that its answers differ."""
    model = load_model(Candidate("m", encoder), find_task(task_name), seed=1)
    head = getattr(model, "classifier", None) or model.qa_outputs
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(2))
    save(model, load_tokenizer(encoder), str(directory), {})
    return str(directory)


@pytest.fixture(scope="module")
def classifier(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return fine_tuned(encoder, "SST-2", tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def exported(classifier: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported")
    export.export(classifier, str(output))
    return output


@pytest.mark.parametrize("family", ["encoder", "pooler_free_encoder"])
@pytest.mark.parametrize("task", ["SST-2", "STS-B", "SQuAD", None])
def test_onnx_equals_torch(
    family: str, task: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(family)
    directory = fine_tuned(source, task, tmp_path / "model") if task else source
    summary = export.export(directory, str(tmp_path / "out"))
    assert summary["kind"] == {
        "SST-2": "classification", "STS-B": "regression", "SQuAD": "spans", None: "encoder"
    }[task]  # fmt: skip
    assert summary["difference"]["float32"] <= export.TOLERANCE
    assert 0 < summary["difference"]["int8"] < 0.5
    # at a batch size and length that neither the export nor its own comparison saw, mask included
    model = export.load_for_export(directory)
    inputs = export.sample_inputs(model.config, (5, 11))
    with torch.inference_mode():
        output = model(**{name: torch.from_numpy(inputs[name]) for name in summary["inputs"]})
    found = run_session(open_session(str(tmp_path / "out" / FLOAT32)), inputs)
    assert list(found) == summary["outputs"]
    for name, values in found.items():
        np.testing.assert_allclose(values, getattr(output, name).numpy(), atol=1e-4)


def test_files_and_summary(exported: Path, classifier: str) -> None:
    summary = json.loads((exported / "export.json").read_text())
    names = {"export.json", "tokenizer.json", FLOAT32, INT8}
    assert {path.name for path in exported.iterdir()} == names
    assert summary["bytes"] == {name: (exported / name).stat().st_size for name in (FLOAT32, INT8)}
    assert summary["labels"] == ["0", "1"]
    assert summary["int8_size_ratio"] == pytest.approx(
        (exported / INT8).stat().st_size / (exported / FLOAT32).stat().st_size, abs=1e-4
    )
    assert summary["source"] == Candidate("m", classifier).digest()


def test_weights_are_int8_embeddings_too(exported: Path) -> None:
    import onnx
    from onnx import TensorProto, numpy_helper

    tensors = onnx.load(str(exported / INT8)).graph.initializer
    matrices = [tensor for tensor in tensors if len(tensor.dims) == 2 and 1 not in tensor.dims]
    assert {tensor.data_type for tensor in matrices} == {TensorProto.INT8}
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors if "_scales" in tensor.name}
    assert len(scales) == len(matrices) > 3
    assert all(len(np.unique(one)) > 1 for one in scales.values())  # one a row of embeddings, or a column


def test_a_device_scores_row_by_row(exported: Path) -> None:
    """Each row is run alone and without padding; the outputs are those of a batch."""
    session = open_session(str(exported / INT8))
    shapes = []

    class Recorder:
        get_inputs, get_outputs = session.get_inputs, session.get_outputs

        def run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            shapes.append({array.shape for array in inputs.values()})
            return session.run(outputs, inputs)

    ids = torch.tensor([[2, 5, 11, 3], [2, 7, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "token_type_ids": torch.zeros_like(ids)}
    found = OnnxModel(Recorder())(**inputs).logits
    assert shapes == [{(1, 4)}, {(1, 3)}]
    together = run_session(session, {name: tensor.numpy() for name, tensor in inputs.items()})["logits"]
    np.testing.assert_allclose(found.numpy(), together, atol=1e-5)


def test_word_embeddings_in_four_bits(classifier: str, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto

    summary = export.export(classifier, str(tmp_path / "out"), embedding_bits=4)
    assert summary["embedding_bits"] == 4
    assert summary["difference"]["int8"] < 0.5
    tensors = onnx.load(str(tmp_path / "out" / INT8)).graph.initializer
    packed = [tensor for tensor in tensors if tensor.data_type == TensorProto.UINT8]
    largest = max(np.prod(tensor.dims) for tensor in tensors if tensor.data_type == TensorProto.INT8)
    assert len(packed) == 1
    assert 2 * np.prod(packed[0].dims) > largest  # the largest table
    assert export.finished_export(classifier, str(tmp_path / "out"), 8) is None


@given(st.integers(1, 20), st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_half_bytes_keep_rows_to_a_step(rows: int, half: int, seed: int) -> None:
    table = np.random.default_rng(seed).standard_normal((rows, 2 * half)).astype(np.float32)
    packed, scales = pack_rows(table)
    assert packed.shape == (rows, half)
    values = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32) - 8
    plain = np.abs(table).max(axis=1, keepdims=True) / 7
    rounded = np.rint(table / plain) * plain
    error = ((values * scales - table) ** 2).sum(axis=1)
    assert (error <= ((rounded - table) ** 2).sum(axis=1) + 1e-6).all()  # cutting the largest never costs


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_rows_are_kept_to_half_a_step(rows: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    table = (generator.standard_normal((rows, width)) * 10.0 ** generator.integers(-6, 6, (rows, 1))).astype(
        np.float32
    )
    table[0] = 0
    values, scales = quantise_rows(table)
    assert values.dtype == np.int8
    assert scales.shape == (rows, 1)
    half = np.abs(table).max(axis=1, keepdims=True) / 127 / 2
    assert (np.abs(values * scales.astype(np.float64) - table) <= half * 1.001).all()


def test_size_ratio() -> None:
    assert export.size_ratio({FLOAT32: 400, INT8: 101}) == 0.2525


def test_nothing_is_exported_twice_until_the_model_changes(classifier: str, tmp_path: Path) -> None:
    import shutil

    model, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(classifier, model)
    export.export(str(model), str(output))
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    export.export(str(model), str(output))
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    (output / INT8).write_bytes(b"")
    export.export(str(model), str(output))
    assert (output / INT8).stat().st_size > 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    export.export(str(model), str(output))
    assert json.loads((output / "export.json").read_text())["source"] == Candidate("m", str(model)).digest()


def test_an_onnx_graph_that_computes_something_else_is_refused(
    classifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differs from torch"):
        export.export(classifier, str(tmp_path / "out"))
    assert not (tmp_path / "out" / FLOAT32).exists()


def test_scores_of_an_exported_model(classifier: str, exported: Path, toy_data: str) -> None:
    task, tokenizer = find_task("SST-2"), load_tokenizer(classifier)
    split = load(task, "dev", toy_data)
    model = OnnxModel(open_session(str(exported / FLOAT32)))
    ours, theirs = (
        score_split(task, finetune.answers(one, tokenizer, task, split, 16, "float32"))
        for one in (model, export.load_for_export(classifier))
    )
    assert ours == theirs


def example(root: Path, name: str, *arguments: str) -> str:
    script = root / "evaluation" / "examples" / name
    command = [sys.executable, "-c", NO_TORCH, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_device_without_torch_classifies(exported: Path, classifier: str, root_dir: Path) -> None:
    model, tokenizer = export.load_for_export(classifier), load_tokenizer(classifier)
    with torch.inference_mode():
        shares = model(**tokenizer("the film is bright", return_tensors="pt")).logits[0].softmax(-1)
    lines = example(root_dir, "classify_on_device.py", str(exported), "the film is bright").splitlines()
    found = {label: float(share) for share, label in (line.split("\t") for line in lines)}
    assert [found["0"], found["1"]] == pytest.approx(shares.tolist(), abs=0.02)
    assert lines == sorted(lines, reverse=True)


def test_a_device_without_torch_answers_as_evaluation_does(
    encoder: str, tmp_path: Path, root_dir: Path
) -> None:
    """Also in long texts, whose answer may be in any window, and for questions that are cut."""
    directory, out = fine_tuned(encoder, "SQuAD", tmp_path / "model"), str(tmp_path / "out")
    command = ["export", "--model", directory, "--output", out]
    assert main(command) == 0
    again = start([*COMMANDS["evaluation"], *command])
    assert again.returncode == 0, again.stderr
    assert not loaded(again) & HEAVY
    words = random.Random(1)
    long = " ".join(words.choice(["red", "car", "house", "warm", "very", "the"]) for _ in range(900))
    tokenizer, model = load_tokenizer(directory), OnnxModel(open_session(str(tmp_path / "out" / INT8)))
    for question, context in (
        ("who ?", "the red car is very bright"),
        ("house ?", long),
        ("who " * 90, long),
    ):
        asked = answer_spans.Question("", question, context, ("",), (0,))
        windows = answer_spans.encode(tokenizer, [asked], 384)
        assert (len(windows.question) > 1) == (context is long)
        logits = predict(
            model, windows.encoded, 1, "float32", tokenizer.pad_token_id, KINDS["spans"].select_outputs
        )
        (expected,) = answer_spans.best_answers(windows, logits, [asked])
        lines = example(root_dir, "answer_on_device.py", out, question, context).splitlines()
        assert lines[0].partition("\t")[2] == expected
        shares = [float(line.partition("\t")[0]) for line in lines]
        assert shares == sorted(shares, reverse=True)
        assert len(lines) == 5
        assert example(root_dir, "answer_on_device.py", out, question, context, "-100") == "no answer"


def test_the_check_for_torch_works(root_dir: Path) -> None:
    done = subprocess.run([sys.executable, "-c", NO_TORCH, "-"], input="", capture_output=True, text=True)
    assert done.returncode != 0
    code = NO_TORCH.replace('runpy.run_path(sys.argv[0], run_name="__main__")', "import torch")
    refused = subprocess.run([sys.executable, "-c", code, "-"], capture_output=True, text=True)
    assert "is not on this device" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["export", "--model", "./nowhere", "--output", "{out}"], "no such model directory"),
        (["export", "--model", "{model}", "--output", "/dev/null/out"], "/dev/null"),
        (["export", "--model", "{model}"], "--output"),
        (["export", "--output", "{out}"], "either --model"),
    ],
)
def test_wrong_export(
    arguments: list[str], says: str, classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [part.format(model=classifier, out=tmp_path / "out") for part in arguments]
    with pytest.raises((UserError, SystemExit)) as caught:
        main(filled)
    assert says in f"{caught.value}{capsys.readouterr().err}"
