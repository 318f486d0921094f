"""``plan``: what it publishes, for which teachers and students, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM

from infra.errors import UserError
from offline_teacher.main import main
from offline_teacher.planning.report import amount, count_noun, hours, two_digits
from offline_teacher.planning.soft_targets import (
    exact_name,
)
from offline_teacher.store.schema import Layout
from tests.conftest import ROOT
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text


def test_plan_publishes_what_it_documents(planned: tuple[Path, dict, str]) -> None:
    directory, report, _ = planned
    _, _, documented = (ROOT / "docs" / "runs.md").read_text().partition("\n## plan.json\n")
    keys = set(re.findall(r"^\| `(\w+)` \|", documented, re.MULTILINE))
    assert keys == set(report) - {"name"}
    assert (directory / "kept_mass.png").read_bytes().startswith(b"\x89PNG")
    mass = report["kept_mass"]
    assert (
        np.shape(mass["masked"]) == np.shape(mass["unmasked"]) == (len(mass["temperatures"]), len(mass["ks"]))
    )
    assert mass["temperatures"] == [1.0, 2.0, 4.0]
    assert {5, 8} <= set(mass["ks"])
    assert set(report["gradient_error"]["at_initialisation"]) == set(
        report["gradient_error"]["close_to_teacher"]
    )
    assert report["gradient_error"]["student_layers"] == [0, 3]
    errors = report["gradient_error"]
    assert {exact_name(kind, n) for kind in ("int8", "float16") for n in (0, 1)} < set(
        errors["at_initialisation"]
    )
    assert (
        1e-3 < max(errors["at_initialisation"][exact_name("float16", n)] for n in (0, 1)) < 0.1
    )  # bfloat16's


def test_bytes_are_those_of_the_layout(planned: tuple[Path, dict, str]) -> None:
    _, report, _ = planned
    layout = Layout(16, 3, 93, 32, 5, (1.0, 2.0), "float16", "all")
    own, corpus = report["bytes"]["this recipe"], report["corpus"]
    assert own["total"] == 3 * corpus["sequences"] * layout.bytes_per_sample()
    assert own["per_token"] * corpus["tokens"] * 3 == pytest.approx(own["total"])
    assert sum(own["columns"].values()) == pytest.approx(own["per_token"])
    assert set(own["columns"]) == set(layout.columns())
    int8 = report["bytes"]["int8 hidden states"]["columns"]
    assert int8["hidden_states"] == pytest.approx(own["columns"]["hidden_states"] / 2)


def test_hours_share_the_work(planned: tuple[Path, dict, str]) -> None:
    _, report, _ = planned
    time, corpus = report["time"], report["corpus"]
    assert time["hours"]["1"] * 3600 * time["tokens_per_s"] == pytest.approx(3 * corpus["tokens"])
    assert time["hours"]["8"] == pytest.approx(time["hours"]["1"] / 8)


def test_a_step_costs_what_its_products_cost(planned: tuple[Path, dict, str]) -> None:
    """Two layers of D = 32, I = 48, L = 16; the student's and the teacher's product with V = 93."""
    layer = 8 * 32**2 + 4 * 32 * 48 + 4 * 16 * 32
    cost = planned[1]["step"]["student"]
    assert cost["replay"] == layer
    assert cost["projections"] == 6 * 32**2
    assert cost["student"] == 3 * 2 * layer
    assert cost["vocabulary"] == 3 * 2 * 32 * 93 + 2 * 32 * 93


@pytest.mark.parametrize("sentence_encoder", [False, True])
def test_a_teacher_without_a_head_is_planned(tmp_path: Path, model: Path, sentence_encoder: bool) -> None:
    """Only hidden states and relations, or pooled vectors, are told of; nothing over the vocabulary."""
    encoder = save_encoder(tmp_path / "encoder", model)
    text = write_text(tmp_path / "text.txt", 60)
    store = {"top_k": 0, **({"positions": "pooled"} if sentence_encoder else {"replay_layers": 1})}
    recipe = write_recipe(
        tmp_path,
        text,
        encoder,
        store=store,
        sequences={"length": 16, "packing": "document"},
        train={"alpha_ce": 0, "alpha_mlm": 0, "alpha_cos": 0, "alpha_relation": 1},
    )
    assert main(["plan", "--recipe", str(recipe)]) == 0
    report = json.loads((tmp_path / "runs/tiny/plan/plan.json").read_text())
    assert report["kept_mass"] is report["gradient_error"] is None
    assert (report["relation_error"] is None) == sentence_encoder
    assert ("embedding" in report["bytes"]["this recipe"]["columns"]) == sentence_encoder
    assert not list((tmp_path / "runs/tiny/plan").glob("*.png"))


def save_encoder(directory: Path, model: Path) -> Path:
    """The encoder of a masked LM alone, with a sentence encoder's files."""
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    BertForMaskedLM.from_pretrained(model).bert.save_pretrained(directory)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    return directory


def test_a_student_as_deep_as_its_teacher(
    planned: tuple[Path, dict, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--recipe", planned[2], "student.layers=last:4", f"output={tmp_path}"]) == 0
    report = json.loads((tmp_path / "tiny/plan/plan.json").read_text())
    for student in ("at_initialisation", "close_to_teacher"):
        assert set(report["gradient_error"][student].values()) == {None}
    printed = capsys.readouterr().out
    assert re.search(r"top-5, renormalised +- +-\n", printed)
    assert report["relation_error"] is None
    assert "No form of store is recommended" in printed
    assert "nothing to compare" in printed


def test_without_the_gpus_of_the_recipe_the_cpu_is_measured(
    planned: tuple[Path, dict, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpus = ["teacher.gpus_per_worker=1", "teacher.dtype=float32"]
    assert main(["plan", "--recipe", planned[2], *gpus, f"output={tmp_path}"]) == 0
    report = json.loads((tmp_path / "tiny/plan/plan.json").read_text())
    assert (report["time"]["device"], report["time"]["gpus_per_worker"]) == ("cpu", 1)
    errors, relations = report["gradient_error"]["at_initialisation"], report["relation_error"]["errors"]
    assert max(errors[exact_name("float16", n)] for n in (0, 1)) < 1e-3  # the teacher is in float32 here
    assert relations["float16 input of the last layer"] < 2e-3 < relations["int8 input of the last layer"]
    assert "With 1 worker like this one" in report["recommendation"][-1]
    assert "GPUs" in report["recommendation"][-1]
    assert "teacher.gpus_per_worker=1) and there is none here" in capsys.readouterr().out


def test_a_dtype_too_narrow_for_the_teacher_is_refused(
    planned: tuple[Path, dict, str], tmp_path: Path
) -> None:
    teacher = save_bert(tmp_path / "model", num_hidden_layers=4)
    model = BertForMaskedLM.from_pretrained(teacher)
    torch.nn.init.constant_(model.get_parameter("bert.encoder.layer.3.output.LayerNorm.bias"), 1e6)
    model.save_pretrained(teacher)
    with pytest.raises(UserError, match=r"teacher\.dtype: .*float16 are not all finite"):
        main(["plan", "--recipe", planned[2], f"teacher.model={teacher}", "teacher.dtype=float16"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("corpus.path=absent/*.txt", "matches no file"),
        ("teacher.model=./absent", "teacher.model"),
        ("sequences.length=65", "sequences.length: 65"),
        ("store.top_k=1000", "store.top_k: 1000"),
        ("student.layers=last:9", "student.layers"),
    ],
)
def test_bad_inputs_are_one_clear_line(planned: tuple[Path, dict, str], override: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        main(["plan", "--recipe", planned[2], override])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_figures_are_read_at_a_glance() -> None:
    assert [two_digits(x) for x in (212.4, 5.46, 0.0123, 0.0000218, 1e-9)] == [
        "212",
        "5.5",
        "0.012",
        "0.000022",
        "< 0.00001",
    ]
    assert [amount(x, "bytes") for x in (12, 15_500_000, 3.02e9)] == ["12 bytes", "15.5 MB", "3.0 GB"]
    assert [hours(x) for x in (0.001, 0.5, 3, 480)] == [
        "3.6 s",
        "30.0 min",
        "3.0 h",
        "480 h (20.0 days)",
    ]
    assert two_digits(None) == "-"
    assert [count_noun(x, "batch", "batches") for x in (1, 2000)] == ["1 batch", "2,000 batches"]
