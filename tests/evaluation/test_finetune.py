from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation.candidates.models import Candidate, load_model, load_tokenizer
from evaluation.finetuning import finetune, parallel, training
from evaluation.finetuning.jobs import Job, grid_points, load_splits, median_seed
from evaluation.finetuning.scores import complete, medians, prepare
from evaluation.finetuning.training import Schedule, bucketed_batches
from evaluation.kinds import predictions
from evaluation.kinds.registry import kind_of
from evaluation.sources.catalogue import find_task
from evaluation.tasks.encoded import Encoded
from infra.cpu.cpu_dropout import use_fast_dropout
from infra.errors import UserError
from infra.files import storage
from infra.settings.sections import Evaluation
from tests.offline_teacher.tiny_teacher import save_roberta

SETTINGS = Evaluation(tasks=("SST-2",), epochs=3, batch_size=16, learning_rate=3e-3, max_length=16)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=300), st.integers(1, 17))
def test_an_epoch_holds_every_row_once(lengths: list[int], batch_size: int) -> None:
    batches = bucketed_batches(np.asarray(lengths), batch_size, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(len(batch) for batch in batches) <= batch_size


def test_batches_hold_similar_lengths_and_change_every_epoch() -> None:
    lengths = np.random.default_rng(1).integers(4, 100, 640)
    generator = np.random.default_rng(0)
    first, second = (bucketed_batches(lengths, 32, generator) for _ in range(2))
    padded = sum(len(batch) * lengths[batch].max() for batch in first)
    assert padded < 1.06 * lengths.sum()  # random batches pad to about 1.9 times
    assert [batch.tolist() for batch in first] != [batch.tolist() for batch in second]


def test_rate_rises_over_six_percent_and_falls_to_zero() -> None:
    schedule = Schedule(epochs=1, batch_size=1, learning_rate=1.0)
    rates = [schedule.rate(step, 100) for step in range(100)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert rates[6:] == pytest.approx([(100 - step) / 94 for step in range(6, 100)])


@pytest.mark.parametrize(
    ("rows", "epochs", "most", "steps"),
    [(33, 1.0, None, 3), (33, 2.5, None, 8), (1, 0.1, None, 1), (33, 2.5, 7, 7), (33, 2.5, 9, 8)],
)
def test_steps(rows: int, epochs: float, most: int | None, steps: int) -> None:
    schedule = Schedule(epochs=epochs, batch_size=16, learning_rate=1.0, max_steps=most)
    assert schedule.steps(rows) == steps


def test_a_run_stops_at_its_most_steps(encoder: str, toy_data: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, data=toy_data, max_steps=5)
    (result,) = complete(prepare([Candidate("m", encoder)], settings, str(tmp_path)), 1)["m"]["SST-2"]
    assert result["train"]["steps"] == 5


@pytest.mark.parametrize("family", ["encoder", "pooler_free_encoder"])
def test_prediction_does_not_depend_on_batching(family: str, request: pytest.FixtureRequest) -> None:
    candidate = Candidate("m", request.getfixturevalue(family))
    model = load_model(candidate, find_task("SST-2"), seed=0)
    data = Encoded(
        [[2, 5, 3], [2, 6, 7, 8, 9, 3], [2, 3], [2, 11, 12, 13, 3]], [[0] * 3, [0] * 6, [0] * 2, [0] * 5]
    )
    alone = training.predict(model, data, 1, "float32", 0)
    together = training.predict(model, data, 4, "float32", 0)
    np.testing.assert_allclose(np.stack(alone), np.stack(together), atol=1e-5)


@pytest.mark.parametrize("family", ["encoder", "pooler_free_encoder", "roberta"])
def test_a_regression_starts_at_the_mean_label(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if family == "roberta":
        save_roberta(tmp_path)
    directory = str(tmp_path) if family == "roberta" else request.getfixturevalue(family)
    model = load_model(Candidate("m", directory), find_task("STS-B"), seed=0)
    finetune.start_at_mean(model, np.asarray([1.0, 4.0, 5.0, 3.0], np.float32))
    data = Encoded([[2, 5, 3], [2, 6, 7, 3]], [[0] * 3, [0] * 4])
    scores = np.stack(training.predict(model, data, 2, "float32", 0))
    assert scores == pytest.approx(3.25, abs=0.5)  # what is left is the head's random weights


def test_a_loss_that_is_not_finite_is_one_line(encoder: str) -> None:
    task = find_task("SST-2")
    model = load_model(Candidate("m", encoder), task, seed=0)
    data = Encoded([[2, 5, 3]] * 4, [[0] * 3] * 4, {"label": np.zeros(4, np.int64)})
    with pytest.raises(UserError, match="loss is not finite"):
        training.fit(model, data, lambda output, targets: output.logits.sum() / 0, Schedule(1, 2, 1e-3), 0, 0)


def test_soft_targets_reach_the_loss(encoder: str) -> None:
    """What a second distillation needs: a further target beside the label, and a loss of one's own."""
    model = load_model(Candidate("m", encoder), find_task("SST-2"), seed=0)
    soft = np.asarray([[3.0, -3.0], [-3.0, 3.0]] * 8, np.float32)
    rows = [[2, 5, 3], [2, 8, 3]] * 8
    data = Encoded(rows, [[0] * 3] * 16, {"label": np.zeros(16, np.int64), "teacher_logits": soft})

    def loss(output: object, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.mse_loss(output.logits, targets["teacher_logits"])  # type: ignore[attr-defined]

    fitted = training.fit(model, data, loss, Schedule(30, 8, 3e-3), 0, 0)
    assert fitted.loss < 1.0  # 9.0 for a model that answers zero


@pytest.mark.parametrize("family", ["encoder", "pooler_free_encoder", "roberta"])
def test_tokens_that_do_not_occur_change_nothing(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The weights are those of a fine-tuning of all rows of the embeddings, dropout included."""
    directory = str(save_roberta(tmp_path)) if family == "roberta" else request.getfixturevalue(family)
    task = find_task("SST-2")
    rows, pad = [[2, 5, 12, 3], [2, 8, 3], [2, 12, 9, 9, 3]] * 8, 1 if family == "roberta" else 0
    data = Encoded(rows, [[0] * len(row) for row in rows], {"label": np.arange(24) % 2})
    models = [load_model(Candidate("m", directory), task, seed=0) for _ in range(2)]
    before = models[0].get_input_embeddings().weight.detach().clone()
    arguments = kind_of(task).loss, Schedule(3, 8, 1e-3), 0, pad
    training.fit(models[0], data, *arguments)
    use_fast_dropout(models[1])
    training._fit(models[1], data, *arguments, lambda rows: None)
    found, expected = (dict(model.named_parameters()) for model in models)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    moved = (models[0].get_input_embeddings().weight != before).any(1).nonzero()[:, 0].tolist()
    assert moved == [2, 3, 5, 8, 9, 12]


@pytest.mark.parametrize("family", ["encoder", "pooler_free_encoder"])
def test_learns_a_separable_task(
    family: str, toy_data: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    candidate = Candidate("m", request.getfixturevalue(family))
    plan = prepare([candidate], dataclasses.replace(SETTINGS, data=toy_data), str(tmp_path))
    (result,) = complete(plan, workers=1)["m"]["SST-2"]
    assert result["metrics"]["accuracy"] > 0.95
    assert json.loads((tmp_path / "m/SST-2/seed-0.json").read_text()) == result
    assert "SST-2 train: 256 rows, the official set has 67,349" in result["notes"]


def test_same_seed_same_result(encoder: str, toy_data: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, data=toy_data, epochs=0.5)
    losses = []
    for name in ("a", "b"):
        plan = prepare([Candidate("m", encoder)], settings, str(tmp_path / name))
        losses.append(complete(plan, 1)["m"]["SST-2"][0]["train"]["loss"])
    assert losses[0] == losses[1]


def test_resume_runs_only_what_changed(encoder: str, toy_data: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, data=toy_data, epochs=0.2, seeds=(0, 1))
    scores = str(tmp_path)

    def left(candidate: Candidate, settings: Evaluation, predict_test: bool = False) -> list[int]:
        plan = prepare([candidate], settings, scores, predict_test=predict_test)
        return [job.seed for job, _ in plan.unfinished]

    candidate = Candidate("m", encoder)
    assert left(candidate, settings) == [0, 1]
    complete(prepare([candidate], dataclasses.replace(settings, seeds=(0,)), scores), 1)
    assert left(candidate, settings) == [1]
    complete(prepare([candidate], settings, scores), 1)
    assert left(candidate, settings) == []
    assert left(candidate, dataclasses.replace(settings, workers=2)) == []  # a matter of speed
    for change in (
        {"epochs": 0.3},
        {"batch_size": 8},
        {"learning_rate": 1e-3},
        {"max_length": 12},
        {"dtype": "bfloat16"},
    ):
        assert left(candidate, dataclasses.replace(settings, **change)) == [0, 1], change
    assert left(Candidate("m", encoder, random_weights=True), settings) == [0, 1]
    (tmp_path / "m/SST-2/seed-1.json").write_text("{")
    assert left(candidate, settings) == [1]


def test_a_score_without_its_predictions_is_computed_again(
    encoder: str, toy_data: str, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, data=toy_data, epochs=0.2)
    candidate, task = Candidate("m", encoder), find_task("SST-2")
    (result,) = complete(prepare([candidate], settings, str(tmp_path)), 1)["m"]["SST-2"]
    path = tmp_path / "m/SST-2/seed-0.predictions.parquet"
    whole = path.read_bytes()
    found = predictions.read(str(path), task, result["predictions"])
    assert predictions.score(task, found) == result["metrics"]
    split = load_splits(task, toy_data)["dev"]
    np.testing.assert_array_equal(found["dev"].labels, split.labels)

    def left() -> int:
        return len(prepare([candidate], settings, str(tmp_path)).unfinished)

    assert left() == 0
    path.write_bytes(whole[:-9] + b"x" + whole[-8:])
    assert left() == 1
    path.unlink()
    assert left() == 1
    complete(prepare([candidate], settings, str(tmp_path)), 1)
    assert path.read_bytes() == whole
    score_file = tmp_path / "m/SST-2/seed-0.json"
    content = json.loads(score_file.read_text())
    del content["predictions"]  # as an earlier version wrote it
    score_file.write_text(json.dumps(content))
    assert left() == 1


def test_predictions_are_there_before_the_score_that_names_them(
    encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[str] = []
    publishing = storage.publishing

    def record(path: str) -> AbstractContextManager[str]:
        published.append(Path(path).name)
        return publishing(path)

    settings = dataclasses.replace(SETTINGS, data=toy_data, epochs=0.1)
    plan = prepare([Candidate("m", encoder)], settings, str(tmp_path))
    monkeypatch.setattr(storage, "publishing", record)
    complete(plan, 1)
    assert published == ["seed-0.predictions.parquet", "seed-0.json"]


def test_changed_weights_run_again(encoder: str, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(encoder, copy)
    first, random_first = Candidate("m", str(copy)).digest(), Candidate("m", str(copy), True).digest()
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert Candidate("m", str(copy)).digest() != first
    assert Candidate("m", str(copy), True).digest() == random_first
    (copy / "README.md").write_text("a model card")
    assert Candidate("m", str(copy), True).digest() == random_first


def test_random_weights_are_drawn_from_the_seed(encoder: str) -> None:
    task = find_task("SST-2")
    trained = load_model(Candidate("m", encoder), task, 0).state_dict()
    first, again, other = (
        load_model(Candidate("m", encoder, True), task, seed).state_dict() for seed in (0, 0, 1)
    )
    key = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])
    assert not torch.equal(first[key], trained[key])


def test_only_the_median_model_is_kept(encoder: str, toy_data: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, data=toy_data, epochs=0.3, seeds=(0, 1, 2))
    candidate = Candidate("m", encoder)
    results = complete(prepare([candidate], settings, str(tmp_path), keep_models=("m",)), 1)["m"]["SST-2"]
    folder = tmp_path / "m/SST-2"
    assert sorted(path.name for path in folder.iterdir()) == [
        "model",
        *(f"seed-{seed}.{ending}" for seed in settings.seeds for ending in ("json", "predictions.parquet")),
    ]
    from transformers import AutoModelForSequenceClassification

    task, chosen = find_task("SST-2"), median_seed(results)
    model = AutoModelForSequenceClassification.from_pretrained(str(folder / "model"))
    split = load_splits(task, toy_data)["dev"]
    answers = finetune.answers(model, load_tokenizer(str(folder / "model")), task, split, 16, "float32")
    assert predictions.score_split(task, answers) == next(
        result["metrics"] for result in results if result["seed"] == chosen
    )
    assert prepare([candidate], settings, str(tmp_path), keep_models=("m",)).unfinished == []


def test_the_kept_model_follows_the_median_when_seeds_change(
    encoder: str, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of seeds 0 to 2, seed 1 is the median, and the models of the others go. Of seeds 0 to 4 it is seed 0,
    and of seed 2 alone it is seed 2: both are trained again, and no other one."""
    points = {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.1, 4: 0.2}
    ran: list[int] = []

    def run(job: Job, splits: dict[str, Any], advance: object = None) -> dict[str, Any]:
        ran.append(job.seed)
        result = finetune.run(job, splits) | {"score": points[job.seed], "dev_score": points[job.seed]}
        storage.publish_json(job.path, result)
        return result

    monkeypatch.setattr(parallel, "run", run)
    settings = dataclasses.replace(SETTINGS, data=toy_data, max_steps=1)
    for seeds, expected, median in (
        ((0, 1, 2), [0, 1, 2], 1), ((0, 1, 2, 3, 4), [3, 4, 0], 0), ((2,), [2], 2)
    ):  # fmt: skip
        ran.clear()
        chosen = dataclasses.replace(settings, seeds=seeds)
        complete(prepare([Candidate("m", encoder)], chosen, str(tmp_path), keep_models=("m",)), 1)
        assert ran == expected
        kept = json.loads((tmp_path / "m/SST-2/model/fine_tuning.json").read_text())
        assert kept["seed"] == median
        assert not list((tmp_path / "m/SST-2").glob("seed-*-model"))


@pytest.mark.parametrize(
    ("scores", "seed"), [([0.1, 0.9, 0.5], 2), ([0.5], 0), ([0.2, 0.4], 0), ([0.3, 0.3, 0.3], 1)]
)
def test_median_seed(scores: list[float], seed: int) -> None:
    assert median_seed([{"score": score, "seed": number} for number, score in enumerate(scores)]) == seed


def test_medians_are_taken_metric_by_metric() -> None:
    seeds = [{"metrics": {"f1": f}, "score": s} for f, s in ((0.2, 0.3), (0.4, 0.1), (0.9, 0.2))]
    assert medians(seeds) == {"f1": 0.4, "score": 0.2}


def test_test_predictions_make_a_submission(
    encoder: str, tmp_path: Path, make_task: Callable[[Path, int], str]
) -> None:
    import io
    import zipfile

    from evaluation.submission import write_submission

    data = make_task(tmp_path / "data", 32)
    (tmp_path / "data/SST-2/test.tsv").write_text("index\tsentence\n0\tthe fine film\n1\tdull\n")
    settings = dataclasses.replace(SETTINGS, data=data, epochs=1)
    candidate, scores = Candidate("m", encoder), str(tmp_path / "scores")
    plan = prepare([candidate], settings, scores, predict_test=True)
    complete(plan, 1)
    target = str(tmp_path / "submission.zip")
    assert write_submission(plan, "m", target) == ["SST-2.tsv"]
    text = zipfile.ZipFile(io.BytesIO(storage.read_bytes(target))).read("SST-2.tsv").decode()
    header, *rows = text.splitlines()
    assert header == "index\tprediction"
    assert [row.split("\t")[0] for row in rows] == ["0", "1"]
    assert {row.split("\t")[1] for row in rows} <= {"0", "1"}
    assert prepare([candidate], settings, scores, predict_test=True).unfinished == []
    (tmp_path / "data/SST-2/test.tsv").write_text("index\tsentence\n0\tthe fine film\n1\tfine\n")
    changed = prepare([candidate], settings, scores, predict_test=True)
    assert len(changed.unfinished) == 1
    assert changed.test_digests != plan.test_digests


def test_a_job_knows_its_place() -> None:
    task = find_task("SST-2")
    job = Job(Candidate("m", "d"), "x", task, 3, SETTINGS, grid_points(task, SETTINGS)[0], "scores")
    assert job.path == "scores/m/SST-2/seed-3.json"


@pytest.mark.parametrize(
    ("name", "value"),
    [("CODE", 99), ("WARM_UP", 0.1), ("version", lambda library: "0" if library == "torch" else "1")],
)
def test_what_decides_scores_besides_the_settings_makes_them_again(
    encoder: str, toy_data: str, tmp_path: Path, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS, data=toy_data, max_steps=1)
    candidate, scores = Candidate("m", encoder), str(tmp_path / "scores")
    complete(prepare([candidate], settings, scores), 1)
    assert not prepare([candidate], settings, scores).unfinished
    monkeypatch.setattr(f"evaluation.finetuning.jobs.{name}", value)
    assert len(prepare([candidate], settings, scores).unfinished) == len(settings.seeds)
