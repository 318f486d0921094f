"""Tasks of a user's own: the three of docs/tasks.md from the command line, grids, splits."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from evaluation import model_run
from evaluation.finetuning.jobs import grid_folders, grid_points
from evaluation.main import main
from evaluation.sources.catalogue import find_task, find_tasks
from evaluation.sources.loading import load
from infra.settings.sections import Evaluation
from infra.settings.sections.task_settings import TaskSettings
from tests.evaluation.conftest import QUICK
from tests.evaluation.own_data import doc_tasks, write_all

MTEB = {
    "dataset_revision": str, "task_name": str, "mteb_version": type(None), "scores": dict,
    "evaluation_time": float,
}  # fmt: skip
"""What ``TaskResult`` of mteb 2.26 requires; the version may be a string, too."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_all(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def scored(written: dict[str, str], encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of scores after one command for all three tasks."""
    output = tmp_path_factory.mktemp("scores")
    arguments = ["--model", encoder, "--tasks", ",".join(written.values()), *QUICK]
    assert main([*arguments, "--batch-size", "16", "--keep-model", "--output", str(output)]) == 0
    return output


def scores_of(output: Path) -> dict[str, Any]:
    (rows,) = json.loads((output / "scores.json").read_text()).values()
    return rows


def test_a_task_file_is_short() -> None:
    assert doc_tasks().keys() == {"tickets", "entities", "search"}
    assert all(len(text.splitlines()) < 12 for text in doc_tasks().values())


def test_three_tasks_are_learnt_from_the_command_line(scored: Path) -> None:
    rows = scores_of(scored)
    assert rows["tickets"].keys() == {"macro_f1", "accuracy", "score"}
    assert rows["tickets"]["score"] == rows["tickets"]["macro_f1"] > 0.95
    assert rows["entities"]["score"] == rows["entities"]["entity_f1"] > 0.85
    assert rows["search"].keys() == {"ndcg_10", "recall_100", "score"}
    assert rows["search"]["recall_100"] == 1.0


def test_a_second_command_has_nothing_to_do(
    scored: Path, written: dict[str, str], encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluation.finetuning import parallel

    monkeypatch.setattr(parallel, "run_all", lambda *_: pytest.fail("ran again"))
    arguments = ["--model", encoder, "--tasks", ",".join(written.values()), *QUICK]
    assert main([*arguments, "--batch-size", "16", "--keep-model", "--output", str(scored)]) == 0


def test_a_change_of_metrics_needs_no_new_run(
    scored: Path, written: dict[str, str], encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluation.finetuning import parallel

    monkeypatch.setattr(parallel, "run_all", lambda *_: pytest.fail("ran again"))
    changed = Path(written["entities"]).with_name("changed.yaml")
    changed.write_text(Path(written["entities"]).read_text() + "metrics: entity_recall\n")
    arguments = ["--model", encoder, "--tasks", str(changed), *QUICK, "--batch-size", "16"]
    assert main([*arguments, "--output", str(scored)]) == 0
    assert scores_of(scored)["entities"].keys() == {"entity_recall", "score"}


def test_the_report_follows_the_metrics_and_their_order(
    written: dict[str, str], encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first metric of a user's own task is its score."""
    from evaluation.finetuning import parallel

    text, task = Path(written["entities"]).read_text(), Path(written["entities"]).with_name("few.yaml")
    for names in (["entity_f1"], ["entity_recall", "entity_f1"], ["entity_f1", "entity_recall"]):
        task.write_text(f"{text}metrics: {json.dumps(names)}\n")
        assert main(["--model", encoder, "--tasks", str(task), *QUICK, "--output", str(tmp_path)]) == 0
        (row,) = json.loads((tmp_path / "report.json").read_text())["rows"].values()
        (scores,) = row["scores"].values()
        assert scores.keys() == {*names, "score"}
        assert scores["score"] == scores[names[0]]
        monkeypatch.setattr(parallel, "run_all", lambda *_: pytest.fail("ran again"))


def test_the_grid_is_run_by_every_setting_and_dev_chooses(scored: Path) -> None:
    (model,) = (path for path in (scored / "scores").iterdir())
    folders = sorted(path.name for path in (model / "tickets").iterdir())
    assert folders == ["learning_rate-0.001", "learning_rate-0.003", "model"]
    runs = [json.loads((model / "tickets" / name / "seed-0.json").read_text()) for name in folders[:2]]
    assert [run["setting"]["learning_rate"] for run in runs] == [1e-3, 3e-3]
    best = max(runs, key=lambda run: run["dev_score"])
    assert scores_of(scored)["tickets"]["score"] == best["score"]
    assert not list((model / "tickets").glob("*/seed-*-model"))


def test_predictions_of_words_and_rankings(scored: Path) -> None:
    (model,) = (path for path in (scored / "scores").iterdir())
    words = parquet.read_table(model / "entities/seed-0.predictions.parquet").to_pylist()
    assert [row["split"] for row in words] == ["dev"] * 40 + ["test"] * 40
    assert all(len(row["label"]) == len(row["output"]) for row in words)
    ranked = parquet.read_table(model / "search/seed-0.predictions.parquet").to_pylist()
    assert [row["example"] for row in ranked] == ["q1", "q2"]  # q3 has no relevant document
    assert ranked[1]["label"] == [{"id": "d2", "grade": 1.0}, {"id": "d1", "grade": 0.0}]
    scores = [entry["score"] for entry in ranked[0]["output"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 4


def test_a_task_in_place_is_that_of_the_file(written: dict[str, str]) -> None:
    from infra.settings.sections.task_settings import read_file

    (from_file,) = find_tasks([written["tickets"]])
    (in_place,) = find_tasks([read_file(written["tickets"])])
    assert from_file == in_place
    assert from_file.labels == ("complaint", "praise", "question")
    assert os.path.isabs(from_file.own.train if from_file.own and from_file.own.train else "")


def test_validation_rows_are_a_share_of_every_label(written: dict[str, str]) -> None:
    (task,) = find_tasks([written["tickets"]])
    train, dev = (load(task, part, None) for part in ("train", "dev"))
    assert len(train) + len(dev) == 400
    for label in range(3):
        whole = (train.labels == label).sum() + (dev.labels == label).sum()
        assert (dev.labels == label).sum() == round(0.1 * whole)


def test_a_tasks_numbers_come_before_the_recipes() -> None:
    settings = Evaluation(epochs=(2.0, 3.0), learning_rate=1e-4, max_steps=9)
    (rte,) = find_tasks([TaskSettings(name="RTE", learning_rate=(2e-5, 5e-5), batch_size=8, max_length=64)])
    points = grid_points(rte, settings)
    assert [(one.epochs, one.learning_rate) for one in points] == [
        (2, 2e-5), (2, 5e-5), (3, 2e-5), (3, 5e-5)
    ]  # fmt: skip
    assert {(one.batch_size, one.max_steps, one.max_length) for one in points} == {(8, 9, 64)}
    assert grid_folders(points)[1] == "epochs-2_learning_rate-5e-05"
    assert grid_folders(grid_points(find_task("SST-2"), Evaluation())) == [""]


def test_many_labels_at_once(encoder: str, tmp_path: Path) -> None:
    lines = ["text,tags", *["the red car,red|car", "a house,", "red day,red", "fine car,car"] * 8]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    (tmp_path / "t.yaml").write_text(
        "name: many\nkind: multilabel\ntrain: t.csv\ndev: t.csv\ntext: text\nlabel: tags\n"
        "metrics: [macro_f1, exact_match, micro_f1]\nepochs: 40\nlearning_rate: 5.0e-3\nbatch_size: 8\n"
    )
    arguments = ["--model", encoder, "--tasks", str(tmp_path / "t.yaml"), *QUICK]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    scores = scores_of(tmp_path / "out")["many"]
    assert scores["macro_f1"] == scores["exact_match"] == scores["micro_f1"] == 1.0


def test_similarity_orders_pairs(encoder: str, tmp_path: Path) -> None:
    lines = ["a\tb\tscore", "red car\tred car\t5", "red car\ta house\t1", "fine day\twarm day\t3"]
    (tmp_path / "t.tsv").write_text("\n".join(lines))
    (tmp_path / "t.yaml").write_text("name: sim\nkind: similarity\ntest: t.tsv\ntext: [a, b]\nlabel: score\n")
    arguments = [
        "--model",
        encoder,
        "--tasks",
        str(tmp_path / "t.yaml"),
        *QUICK,
        "--seeds",
        "3",
    ]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out/scores").glob("*/sim/seed-*.json"))) == 1  # no seed has an effect
    (path,) = (tmp_path / "out/scores").glob("*/sim/*.parquet")
    cosines = [row["output"] for row in parquet.read_table(path).to_pylist()]
    assert cosines[0] == pytest.approx(1, abs=1e-5)
    assert np.argmax(cosines) == 0
    (path,) = (tmp_path / "out/mteb").glob("*/sim.json")
    found = json.loads(path.read_text())
    (entry,) = found["scores"]["test"]
    assert entry["main_score"] == entry["cosine_spearman"] == scores_of(tmp_path / "out")["sim"]["spearman"]
    assert entry["cosine_pearson"] == scores_of(tmp_path / "out")["sim"]["pearson"]
    assert (entry["hf_subset"], entry["languages"]) == ("default", ["und-Zyyy"])
    assert found["task_name"] == "sim"
    assert found["evaluation_time"] > 0
    assert found["dataset_revision"].startswith("xxh3-128:")
    assert {name: type(value) for name, value in found.items()}.items() >= MTEB.items()
    if importlib.util.find_spec("mteb"):
        from mteb.results import TaskResult

        assert TaskResult.from_disk(path, load_historic_data=False).get_score() == entry["main_score"]


def test_questions_without_an_answer(encoder: str, tmp_path: Path) -> None:
    """SQuAD 2.0's definition is taken where a question has no answer, and a model learns to give none."""

    def question(number: int, text: str, answer: str | None) -> dict[str, Any]:
        context = "the red car is very bright"
        answers = [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
        return {"context": context, "qas": [{"id": str(number), "question": text, "answers": answers}]}

    rows = [question(n, *(("who ?", "red car") if n % 2 else ("house ?", None))) for n in range(32)]
    (tmp_path / "t.json").write_text(json.dumps({"data": [{"paragraphs": rows}]}))
    (tmp_path / "t.yaml").write_text(
        "name: asked\nkind: spans\ntrain: t.json\ndev: t.json\nepochs: 40\nlearning_rate: 5.0e-3\n"
        "batch_size: 8\n"
    )
    (task,) = find_tasks([str(tmp_path / "t.yaml")])
    assert task.no_answer
    arguments = ["--model", encoder, "--tasks", str(tmp_path / "t.yaml"), *QUICK, "--max-length", "24"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert scores_of(tmp_path / "out")["asked"]["exact_match"] == 1.0
    (path,) = (tmp_path / "out/scores").glob("*/asked/*.parquet")
    found = parquet.read_table(path).to_pylist()
    assert [row["output"] for row in found[:2]] == ["", "red car"]
    assert [row["label"] for row in found[:2]] == [[], ["red car"]]


@pytest.mark.parametrize("damaged", ["", "[1]", '{"m": 5}'])
def test_scores_are_published_over_a_damaged_summary(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "scores.json").write_text(damaged)
    for task in ("tickets", "entities"):
        model_run._add_scores(str(tmp_path), {"m": {task: {"score": 0.5}}})
    assert json.loads((tmp_path / "scores.json").read_text()) == {
        "m": {"tickets": {"score": 0.5}, "entities": {"score": 0.5}}
    }
