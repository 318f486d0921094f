"""What a recipe requires of its students, and what the command says where it is not met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evaluation.main import main
from evaluation.report import gates
from infra.errors import EXIT_UNMET, UserError
from infra.settings.recipe_file import load_recipe
from infra.settings.sections import Require


def report(**row: Any) -> dict[str, Any]:
    values = {
        "macro": 0.6, "retention": 0.96, "gap_closed": 0.7, "gap_closed_best": 0.4, "bytes": 68_000_000,
        "latency": {"p50_ms": 2.0}, "references": {"random": "undistilled", "start": "start"},
        "differences": {
            "undistilled": {"difference": 0.1, "p": 0.001, "interval": {"low": 0.08, "high": 0.12}},
            "start": {"difference": 0.02, "p": 0.2, "interval": {"low": -0.01, "high": 0.05}},
        },
    }  # fmt: skip
    tasks = {
        "CoLA": {"agreement": 0.9, "calibration": {"error": 0.1, "brier": 0.2}},
        "STS-B": {"agreement": 0.8},
    }
    devices = {"CoLA": {"int8_lost": 0.004}, "STS-B": {"int8_lost": -0.01}}
    return {
        "students": ["student"], "rows": {"student": values | row}, "details": {"student": tasks},
        "devices": {"student": devices},
    }  # fmt: skip


MET = [
    {"macro": 0.6}, {"retention": 0.96}, {"gap_closed": 0.7}, {"gap_closed_best": 0.4},
    {"agreement": 0.8499}, {"int8_loss": 0.4}, {"calibration_error": 0.1}, {"p50_ms": 2.0},
    {"megabytes": 68.0}, {"beats": "random"}, {},
]  # fmt: skip
UNMET = [
    ({"macro": 0.61}, "student: macro is 0.6, but must be at least 0.61"),
    ({"retention": 0.97}, "student: retention is 0.96, but must be at least 0.97"),
    ({"gap_closed": 0.71}, "student: gap_closed is 0.7, but must be at least 0.71"),
    ({"gap_closed_best": 0.41}, "student: gap_closed_best is 0.4, but must be at least 0.41"),
    ({"agreement": 0.86}, "student: agreement is 0.85, but must be at least 0.86"),
    ({"int8_loss": 0.39}, "student: int8_loss is 0.4, but must be at most 0.39"),
    ({"calibration_error": 0.09}, "student: calibration_error is 0.1, but must be at most 0.09"),
    ({"p50_ms": 1.9}, "student: p50_ms is 2, but must be at most 1.9"),
    ({"megabytes": 67.0}, "student: megabytes is 68, but must be at most 67"),
    (
        {"beats": "start"},
        "student: does not beat start: the difference of their macro scores is +2.0 points [-1.0, 5.0]",
    ),
]


@pytest.mark.parametrize("required", MET, ids=str)
def test_a_limit_that_is_reached_is_met(required: dict[str, Any]) -> None:
    assert gates.unmet(report(), Require(**required)) == []


@pytest.mark.parametrize(("required", "says"), UNMET, ids=[says for _, says in UNMET])
def test_a_limit_that_is_missed_is_said(required: dict[str, Any], says: str) -> None:
    assert gates.unmet(report(), Require(**required)) == [says]


def test_every_requirement_is_measured() -> None:
    import dataclasses

    measured = gates.measured(report(), "student").keys()
    assert measured | {"beats"} == {field.name for field in dataclasses.fields(Require)}


def test_what_is_unknown_is_not_met() -> None:
    assert gates.unmet(report(retention=None), Require(retention=0.5)) == [
        "student: retention is unknown, but must be at least 0.5"
    ]
    assert gates.unmet(report(references={}), Require(beats="start")) == [
        "student: there is no reference start to beat"
    ]


def test_a_significantly_worse_student_beats_nothing() -> None:
    worse = {"difference": -0.1, "p": 0.001, "interval": {"low": -0.12, "high": -0.08}}
    assert gates.unmet(report(differences={"start": worse}), Require(beats="start"))


def test_every_student_must_meet_it() -> None:
    content = report()
    content["rows"]["tiny"] = content["rows"]["student"] | {"retention": 0.5}
    content["details"]["tiny"], content["students"] = content["details"]["student"], ["student", "tiny"]
    assert [line.partition(":")[0] for line in gates.unmet(content, Require(retention=0.9))] == ["tiny"]


def test_the_command_ends_with_4(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also when nothing is left to compute, and not any more when the requirement is dropped."""
    limit = "evaluation.require={megabytes: 0.001}"
    says = r"^evaluation.require: student: megabytes is .*0\.001$"
    for _ in range(2):
        with pytest.raises(UserError, match=says) as caught:
            main(["--recipe", recipe_file, limit])
        assert caught.value.exit_code == EXIT_UNMET == 4
        printed = capsys.readouterr()
        assert "report.html" in printed.out
    assert "rows/s" not in printed.err
    assert main(["--recipe", recipe_file]) == 0
    directory = Path(load_recipe(recipe_file).evaluation_dir)
    assert (directory / "report.html").exists()


# what is changed of a right recipe, what the one line must say
WRONG = [
    ("require={retention: high}", "evaluation.require.retention: expected a number"),
    ("require={retension: 0.9}", "did you mean retention?"),
    ("require={beats: bert}", "evaluation.require.beats: expected"),
    ("require={beats: start}", "beats: start must also be in evaluation.references"),
    ("require={megabytes: .inf}", "evaluation.require.megabytes"),
    ("require={p50_ms: true}", "evaluation.require.p50_ms: expected a number"),
    ("require=0.9", "evaluation.require: expected"),
    ("require=[retention]", "evaluation.require: expected"),
    ("references=random", "evaluation.references"),
    ("references=[teacher]", "evaluation.references"),
    ("references=[random,random]", "contains a name twice"),
    ("references={random: true}", "evaluation.references"),
    ("watts=0", "evaluation.watts: must be > 0, not 0"),
    ("watts=-40", "evaluation.watts: must be > 0, not -40"),
    ("watts=.nan", "evaluation.watts"),
    ("watts=40W", "evaluation.watts: expected a number"),
    ("price_per_hour=0", "evaluation.price_per_hour: must be > 0, not 0"),
    ("price_per_hour=$3", "evaluation.price_per_hour: expected a number"),
    ("price_per_hours=3", "did you mean price_per_hour?"),
    ("price_per_hour=[1,2]", "evaluation.price_per_hour: expected a number"),
    ("models={teacher: a/b}", "teacher is the name of another row of the report"),
    ("models={a b: a/b}", "models: a name is letters, digits, dots, dashes and underscores, not 'a b'"),
    ("models={a: ./nowhere}", "./nowhere: no such model directory"),
    ("models={a: https://me:secret@host/m}", "holds a password"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[change for change, _ in WRONG])
def test_a_wrong_requirement_is_one_line(recipe_file: str, change: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        main(["--recipe", recipe_file, f"evaluation.{change}"])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not Path(load_recipe(recipe_file).evaluation_dir).exists()
