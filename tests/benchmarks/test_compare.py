"""Tests of ``make compare``: its arms, its page of results, and renormalised soft targets."""

from __future__ import annotations

import gzip
import json
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from infra.demo.inputs import TEACHER
from infra.settings.recipe_file import load_recipe
from infra.settings.sections import Train
from offline_teacher.sequences.masking import masked_count
from offline_teacher.store import schema
from student_train.objectives.soft_targets import TopkTarget
from tests.benchmarks.compare import __main__ as compare
from tests.benchmarks.compare import pictures, renormalised
from tests.benchmarks.compare.arms import FILE, Plan, cut_text, slug
from tests.benchmarks.compare.curve import Point, extrapolation, tokens_for
from tests.benchmarks.compare.report import write_report
from tests.benchmarks.compare.runs import Runs


def plan(size: str, directory: Path) -> Plan:
    text = {split: directory / f"{split}.txt" for split in ("train", "validation")}
    text["train"].write_text("".join(f"line {number}\n" for number in range(10)))
    return Plan(size, text, TEACHER, directory)


@pytest.mark.parametrize("size", ["smoke", "sweep", "real", "curve"])
def test_every_arm_is_a_recipe_and_all_stores_are_read_in_one_order(size: str, tmp_path: Path) -> None:
    """Equal numbers of samples per block give equal orders of samples, whatever the blocks' bytes."""
    made = plan(size, tmp_path)
    samples = {}
    for arm in made.arms.values():
        recipe = load_recipe(made.recipe(arm, 0, 7))
        assert recipe.run("student").train.max_steps == 7
        store, length = recipe.store, recipe.sequences.length
        layout = schema.Layout(
            length=length,
            masked=masked_count(length, recipe.masking.probability or 0.0),
            vocab_size=json.loads((TEACHER / "config.json").read_text())["vocab_size"],
            hidden_size=json.loads((TEACHER / "config.json").read_text())["hidden_size"],
            top_k=store.top_k,
            temperatures=store.temperatures if store.top_k else (),
            hidden_states=store.hidden_states,
            positions=store.positions,
            replay_layers=store.replay_layers,
            teacher_weights=True,
        )
        cut = schema.Plan.from_bytes(layout, 1, store.task_sequences, store.block_bytes, store.shard_bytes)
        samples[arm.store] = cut.block_samples
    assert set(samples) == set(yaml.safe_load(FILE.read_text())["stores"])
    assert set(samples.values()) == {made.size["block_samples"]}


def test_names_of_files_are_distinct() -> None:
    names = list(yaml.safe_load(FILE.read_text())["arms"])
    assert len({slug(name) for name in names}) == len(names)


def test_equal_time_is_the_time_of_the_other_arm(tmp_path: Path) -> None:
    """An arm whose steps are twice as fast gets twice as many steps."""
    runs = Runs(plan("smoke", tmp_path), tmp_path / "results", tmp_path)
    (tmp_path / "results").mkdir()
    for name, seconds in (("relations, learning rate 1e-3", 5.0), ("replay 1", 10.0)):
        path = runs.path(runs.plan.arms[name], 0)
        path.write_text(json.dumps({"train_seconds": seconds, "steps": 12}))
    assert runs._steps(runs.plan.arms["relations, equal time"], 0) == 24


def result(arm: str, seed: int, **others: Any) -> dict[str, Any]:
    shift = seed / 10
    validation = {
        "kl_t1": 0.4 + shift, "kl_t2": 0.2 + shift, "mlm_loss": 4.0 + seed,
        "agreement": 0.5 - shift, "cosine": 0.7 + shift, "relation": 0.1 + shift,
    }  # fmt: skip
    return {
        "arm": arm, "seed": seed, "steps": 512, "tokens": 2_097_152, "bytes_per_token": 786.4,
        "tokens_per_second": 1000.0, "peak_bytes": 2e9, "validation": validation, **others,
    }  # fmt: skip


def write(results: Path, *results_of_runs: dict[str, Any], size: str = "real") -> None:
    (results / size).mkdir(parents=True, exist_ok=True)
    for one in results_of_runs:
        path = results / size / f"{slug(one['arm'])}-{one['seed']}.json"
        path.write_text(json.dumps(one))


def test_a_page_has_means_spreads_and_scores(tmp_path: Path) -> None:
    results = tmp_path / "results"
    runs = [result("replay 1", seed, scores={"MRPC": [0.7, 0.9, 0.8 + seed / 100]}) for seed in range(3)]
    runs = [{**one, "train_seconds": 120.0} for one in runs]
    start = result("start", 0, tokens=0, scores={"MRPC": [0.75]})
    write(results, *runs, start)
    assert "### Objectives" not in write_report(results).read_text()  # two rows of many say little
    write(results, result("relations", 0))
    page = write_report(results).read_text().split("### Objectives")[1]
    row = next(line for line in page.splitlines() if line.startswith("| replay 1 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    spread = statistics.stdev([0.2, 0.3, 0.4])
    assert cells[2:4] == ["1e-4", "8"]
    assert cells[5] == f"0.3000 ({spread:.4f})"
    assert cells[10] == "81.0 (1.0)"  # the median of each student's fine-tuning seeds, then their mean
    assert cells[11:] == ["81.0 (1.0)", "3", "2.0 (0.0)", "3.00 (0.50)", "1,000 (0)", "2.00 (0.00)", "786"]
    assert (results / "real" / "objectives.png").read_bytes()[:4] == b"\x89PNG"


def test_the_picture_of_arms_without_a_head_shows_their_relation_loss(tmp_path: Path) -> None:
    """A student of relations alone has no distribution, so a KL axis would leave most rows empty."""
    states = ["relations and cosine", "states, learning rate 3e-4", "states, 1e-3, dropout 0.1"]
    runs = [result(name, 0) for name in states]
    for one in runs:
        one["validation"] = {"relation": 0.1}
    write(tmp_path / "results", result("start", 0, tokens=0), *runs, size="sweep")
    section = write_report(tmp_path / "results").read_text().split("### Relations and cosine")[1]
    assert "![Relations and cosine, one setting at a time: relation loss (smaller is better)]" in section
    for one in runs:
        one["scores"] = {"A": [0.5]}
    write(tmp_path / "results", *runs, size="sweep")
    section = write_report(tmp_path / "results").read_text().split("### Relations and cosine")[1]
    both = "relation loss (smaller is better) and mean score (larger is better)"
    assert f"![Relations and cosine, one setting at a time: {both}]" in section
    write(tmp_path / "results", *(result(name, 0) for name in states), size="sweep")
    section = write_report(tmp_path / "results").read_text().split("### Relations and cosine")[1]
    assert (
        "![Relations and cosine, one setting at a time: KL at T = 2, nats per token (smaller is better)"
        in section
    )


def test_a_picture_has_a_row_for_every_arm_with_one_of_its_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *words, **options: figures.append(figure))
    loss, score = ("loss", {"a": [0.1], "b": [0.2, 0.3], "c": []}), ("score", {"c": [50.0], "b": [60.0]})
    panels = [loss, score, ("one arm", {"a": [1.0]})]
    assert pictures.draw_arms(["a", "b", "c", "d"], panels, tmp_path) == ["loss", "score"]
    ((left, right),) = (figure.axes for figure in figures)
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "b", "c"]
    points = [[np.asarray(line.get_xydata()).tolist() for line in axes.lines] for axes in (left, right)]
    assert points[0] == [[[0.1, 0]], [[0.2, 1], [0.3, 1]], []]
    assert points[1] == [[], [[60.0, 1]], [[50.0, 2]]]
    assert (left.get_xlabel(), right.get_xlabel()) == ("loss", "score")
    assert not pictures.draw_arms(["a", "b"], [("one arm", {"a": [1.0]})], tmp_path)
    assert len(figures) == 1


def test_distance_from_live_is_in_its_own_standard_deviations(tmp_path: Path) -> None:
    results = tmp_path / "results"
    live = [result("live", seed) for seed in range(3)]
    near = result("replay 1", 1)
    near["validation"]["kl_t2"] += 0.05
    write(results, *live, near, result("replay 0", 0))
    page = write_report(results).read_text()
    row = next(line for line in page.splitlines() if line.startswith("| replay 1 | 1 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:4] == ["0.00", f"{0.05 / statistics.stdev([0.2, 0.3, 0.4]):.2f}"]


def test_every_size_has_the_arms_of_its_own_tables(tmp_path: Path) -> None:
    smoke, sweep, real, curve = (
        set(plan(size, tmp_path).needed) for size in ("smoke", "sweep", "real", "curve")
    )
    lengths = {f"{tokens} M tokens" for tokens in (1, 2, 4, 8, 16)}
    assert curve == {"teacher", "start"} | lengths
    assert smoke == set(yaml.safe_load(FILE.read_text())["arms"]) - lengths
    assert sweep | real == smoke
    assert {"live", "replay 1"} <= real


def test_a_size_has_settings_of_its_own_that_an_arm_may_change(tmp_path: Path) -> None:
    def train(size: str, name: str) -> Train:
        made = plan(size, tmp_path)
        return load_recipe(made.recipe(made.arms[name], 0, 7)).run("student").train

    assert {train(size, "both").learning_rate for size in ("real", "sweep")} == {1e-4}
    assert (train("real", "replay 1").batch_size, train("sweep", "replay 1").batch_size) == (8, 32)
    assert train("real", "replay 1").kl_positions == "masked"
    assert train("real", "KL at all positions").kl_positions == "all"


def test_smaller_batches_take_more_steps_for_the_same_tokens(tmp_path: Path) -> None:
    runs = Runs(plan("sweep", tmp_path), tmp_path, tmp_path)
    arm = runs.plan.arms["states, 1e-3, batches of 8"]
    assert runs._steps(arm, 0) == 4 * runs.plan.size["steps"]
    assert runs._tokens(arm, runs._steps(arm, 0)) == runs.plan.tokens
    train = load_recipe(runs.plan.recipe(arm, 0, 7)).run("student").train
    assert (train.batch_size, train.micro_batch_size) == (8, 8)


def test_the_teacher_is_scored_in_the_directory_of_the_runs_and_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, commands = Runs(plan("curve", tmp_path), tmp_path / "results", tmp_path), []
    scores = {"CoLA": 0.25, "MRPC": 0.5}

    def command(*words: str) -> dict[str, float]:
        options = dict(word.removeprefix("--").split("=", 1) for word in words[2:])
        commands.append(options)
        name = options["model"].split("=")[0]
        for task, score in scores.items():
            for seed in range(int(options["seeds"])):
                directory = Path(options["output"], "scores", name, task)
                directory.mkdir(parents=True, exist_ok=True)
                (directory / f"seed-{seed}.json").write_text(json.dumps({"score": score}))
        return {}

    monkeypatch.setattr("tests.benchmarks.compare.runs.command", command)
    found = runs.score(runs.plan.arms["teacher"], 0)
    assert found["scores"] == {"CoLA": [0.25], "MRPC": [0.5]}
    assert found["validation"] == {}
    (options,) = commands
    assert options["model"] == f"teacher={TEACHER}"
    assert Path(options["output"]).is_relative_to(tmp_path)
    other = Path(options["output"], "scores", "other", "CoLA")  # of another model in the same directory
    other.mkdir(parents=True)
    (other / "seed-0.json").write_text('{"score": 0.75}')
    scores["STS-B"] = 0.75  # a task of the size that was not scored yet
    found = runs.score(runs.plan.arms["teacher"], 0)
    assert found["scores"] == {"CoLA": [0.25], "MRPC": [0.5], "STS-B": [0.75]}
    assert runs.score(runs.plan.arms["teacher"], 0) == found
    assert len(commands) == 2
    runs.plan.size["fine_tuning"]["seeds"] = [0, 1]
    assert runs.score(runs.plan.arms["teacher"], 0)["scores"]["CoLA"] == [0.25, 0.25]


def test_the_gap_closed_is_between_the_untrained_student_and_the_teacher(tmp_path: Path) -> None:
    """The mean over tasks counts, and the picture shows it against the number of tokens."""
    results = tmp_path / "results"
    names = {"teacher": (0.9, 0.7), "start": (0.5, 0.5), "1 M tokens": (0.7, 0.4), "2 M tokens": (0.8, 0.6)}
    runs = [
        result(name, 0, tokens=2**20 if "M" in name else 0, scores={"A": [a], "B": [b]})
        for name, (a, b) in names.items()
    ]
    runs[0]["validation"] = {}
    write(results, *runs, size="curve")
    page = write_report(results).read_text().split("### Learning curve")[1]
    header, _, *rows = (line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| "))
    closed = {row[0]: row[header.index("gap from start closed")].strip() for row in rows[:4]}
    assert closed == {"teacher": "", "start": "", "1 M tokens": "17", "2 M tokens": "67"}
    assert "![Learning curve: scores](results/curve/learning-curve.png)" in page
    assert (results / "curve" / "learning-curve.png").read_bytes()[:4] == b"\x89PNG"


def points_of_law(a: float, b: float, tokens: tuple[int, ...] = (1, 2, 4, 8)) -> dict[str, Point]:
    """A teacher of 80 points, and students whose distance from it is ``a * (million tokens)**-b``."""
    students = {f"{n} M": Point(n * 1_000_000, {"A": 80 - a * n**-b}) for n in tokens}
    return {"teacher": Point(0, {"A": 80.0}), **students}


def test_an_extrapolation_finds_the_law_that_made_the_scores() -> None:
    """97 % of 80 is a gap of 2.4 points: 8 * n**-0.5 reaches it at (8 / 2.4)**2 = 11.1; 0.8 at 100."""
    row = extrapolation(points_of_law(8, 0.5)).splitlines()[-1]
    assert row == "| A | 80.0 | 77.2 | 96.5% | 11 M (11 M to 11 M) | 100 M (100 M to 100 M) |"


def test_an_extrapolation_says_what_is_reached_and_what_more_tokens_never_reach() -> None:
    row = extrapolation(points_of_law(2, 0.1)).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[5:-1]][0] == "reached"
    row = extrapolation(points_of_law(4, -0.1)).splitlines()[-1]
    assert row.endswith("| never (never to never) | never (never to never) |")
    assert extrapolation(points_of_law(8, 0.5, tokens=(1, 2, 4))) == ""


def test_the_range_of_an_extrapolation_is_that_without_one_point() -> None:
    points = points_of_law(8, 0.5)
    points["8 M"] = Point(8_000_000, {"A": 76.0})  # the last one is worse than that of 4 M tokens
    low = tokens_for(2.4, [(n * 10**6, 8 * n**-0.5) for n in (1, 2, 4)])
    cell = extrapolation(points).splitlines()[-1].split("|")[5]
    assert f"({low / 1e6:.0f} M to " in cell
    numbers = [float(word.replace(",", "")) for word in re.findall(r"[\d,.]+", cell)]
    assert numbers[1] < numbers[0] < numbers[2]


def test_unequal_numbers_of_fine_tuning_seeds_are_said(tmp_path: Path) -> None:
    names = {"teacher": [0.5], "start": [0.5, 0.4], "1 M tokens": [0.5, 0.3]}
    runs = [result(name, 0, scores={"A": values, "B": [0.5]}) for name, values in names.items()]
    write(tmp_path / "results", *runs, size="curve")
    page = write_report(tmp_path / "results").read_text().split("### Learning curve")[1]
    header, _, *rows = (line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| "))
    assert [row[header.index("fine-tuned")] for row in rows[:3]] == ["1", "1 to 2", "1 to 2"]


def test_equal_scores_of_start_and_teacher_leave_the_gap_empty(tmp_path: Path) -> None:
    names = ("teacher", "start", "1 M tokens")
    runs = [result(name, 0, tokens=2**20 if "M" in name else 0, scores={"A": [0.5]}) for name in names]
    write(tmp_path / "results", *runs, size="curve")
    assert "gap from start closed |" not in write_report(tmp_path / "results").read_text()


def test_a_student_is_compared_with_its_own_start(tmp_path: Path) -> None:
    """Not with the untrained student of the row above, which may have other layers."""
    names = {"1 layer start": 0.2, "2 layers start": 0.4, "1 layer": 0.5, "2 layers": 0.5}
    runs = [
        result(name, 0, tokens=0 if "start" in name else 9, scores={"A": [score]})
        for name, score in names.items()
    ]
    runs = [{**one, "train_seconds": 600.0} if one["tokens"] else one for one in runs]
    write(tmp_path / "results", *runs)
    page = write_report(tmp_path / "results").read_text().split("### A family")[1]
    header, _, *rows = (line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| "))
    gains = {row[0]: row[header.index("gain/min")] for row in rows[:4] if row[0] in ("1 layer", "2 layers")}
    assert gains == {"1 layer": "3.00", "2 layers": "1.00"}


def test_a_size_without_a_table_has_no_heading(tmp_path: Path) -> None:
    write(tmp_path / "results", result("start", 0, tokens=0))
    assert "## Size" not in write_report(tmp_path / "results").read_text()


def test_a_result_without_its_student_is_trained_again_before_it_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results come with the repository, and the students do not."""
    runs, made = Runs(plan("sweep", tmp_path), tmp_path / "results", tmp_path), []
    (tmp_path / "results").mkdir()
    runs.path(runs.plan.arms["relations"], 0).write_text(json.dumps(result("relations", 0)))

    def make(self: Runs, arm: Any, seed: int) -> dict[str, Any]:
        made.append(arm.name)
        return result(arm.name, seed)

    monkeypatch.setattr(Runs, "_make", make)
    monkeypatch.setattr(Runs, "scores_of", lambda *_: {"CoLA": [0.5]})
    assert runs.score(runs.plan.arms["relations"], 0)["scores"] == {"CoLA": [0.5]}
    assert made == ["relations"]


def test_an_unknown_arm_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", "--directory", str(tmp_path), "--arms", "liv"])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == 2
    assert "no arm is called 'liv'" in capsys.readouterr().err


def test_text_is_cut_by_whole_lines_of_every_source(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("".join(f"{name}{number}\n" for number in range(100)))
    with gzip.open(tmp_path / "c.gz", "wt") as file:
        file.write("\nc0\nc1\nc2\n")
    assert cut_text([tmp_path / "a", tmp_path / "c.gz", tmp_path / "b"], 18) == [
        "a0",
        "a1",
        "c0",
        "c1",
        "b0",
        "b1",
    ]


def test_a_quarter_of_the_text_is_spread_over_all_of_it(tmp_path: Path) -> None:
    made = plan("smoke", tmp_path)
    assert made.part_of_text(1.0) == made.text["train"]
    assert made.part_of_text(0.25).read_text() == "line 0\nline 4\nline 8\n"


def test_renormalised_targets_have_no_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5, 3).half()
    target = TopkTarget(torch.tensor([[4, 2, 9]] * 5), logits, torch.full((5,), 7.0), 2.0)
    monkeypatch.setattr(renormalised, "exact_tail", lambda *_: target)
    _, p, tail = renormalised.renormalised(SimpleNamespace(), None, 2.0).probabilities(slice(None))
    torch.testing.assert_close(p, torch.softmax(logits.float() / 2.0, 1))
    torch.testing.assert_close(tail, torch.zeros(5), atol=1e-6, rtol=0)
