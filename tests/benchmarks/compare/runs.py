"""Runs an arm with one seed: makes store and student, measures and scores it, and writes one JSON file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.files import storage
from infra.settings.recipe import StudentRun
from infra.settings.recipe_file import load_recipe
from offline_teacher.store.store import open_store
from tests.benchmarks.compare.arms import REFERENCE, Arm, Plan, dtype, slug

ROOT = Path(__file__).resolve().parents[3]
TRAINER = ("student_train/main.py",)
RENORMALISED_TRAINER = ("-m", "tests.benchmarks.compare.renormalised")
Result = dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """The runs of a plan. ``results``: where their JSON files are; ``tasks``: official task files."""

    plan: Plan
    results: Path
    tasks: Path
    fine_tuning_seeds: int | None = None
    """Number of fine-tuning seeds; None: as many as the size says."""

    def path(self, arm: Arm, seed: int) -> Path:
        return self.results / f"{slug(arm.name)}-{seed}.json"

    def result(self, arm: Arm, seed: int) -> Result | None:
        path = self.path(arm, seed)
        return json.loads(path.read_text()) if path.exists() else None

    def train(self, arm: Arm, seed: int) -> Result:
        """Makes the store if it is missing, trains and measures the student, and returns the result."""
        existing = self.result(arm, seed)
        if existing is not None:
            return existing
        return self._make(arm, seed)

    def _make(self, arm: Arm, seed: int) -> Result:
        if arm.is_teacher:
            return self._publish(arm, seed, self._head(arm, seed, 0) | {"validation": {}})
        steps = self._steps(arm, seed)
        recipe = self.plan.recipe(arm, seed, steps)
        run = load_recipe(recipe).run("student")
        store = command("-m", "offline_teacher.main", "run", "--recipe", recipe)
        result = self._head(arm, seed, steps)
        result |= {"bytes_per_token": _bytes_per_token(run), "store_seconds": store["seconds"]}
        if steps:
            finished = Path(run.directory, "model.json").exists()
            usage = command(*(RENORMALISED_TRAINER if arm.renormalised else TRAINER), "--recipe", recipe)
            result |= training_of(Path(run.directory, "history.jsonl"), self._tokens(arm, 1))
            if not finished:  # otherwise the command has only looked at the student
                result |= {"peak_bytes": usage["peak_bytes"]}
            model = f"{run.directory}/model"
        else:
            model = self._untrained(run, recipe)
        result |= {"validation": self._measures(arm, seed, steps, model)}
        return self._publish(arm, seed, result)

    def _head(self, arm: Arm, seed: int, steps: int) -> Result:
        """Returns what identifies the run, and its number of tokens."""
        tokens = self._tokens(arm, steps)
        return {"arm": arm.name, "seed": seed, "steps": steps, "tokens": tokens, "dtype": dtype()}

    def score(self, arm: Arm, seed: int) -> Result:
        """Fine-tunes the trained student on every task, with the same settings for all arms."""
        result = self.train(arm, seed)
        known = result.get("scores", {})
        if all(len(known.get(task, [])) >= self._seed_count for task in self.plan.size["tasks"]):
            return result
        if arm.is_teacher:
            name, model = arm.name, str(self.plan.teacher)
            output = str(self.plan.directory / "runs" / "teacher-scores")
        else:
            name = f"{slug(arm.name)}-{seed}"
            run = load_recipe(self.plan.recipe(arm, seed, self._steps(arm, seed))).run("student")
            model, output = f"{run.directory}/model", f"{run.directory}/model-scores"
            if not Path(model).exists():  # the result came with the repository, without the student
                result = self._make(arm, seed)
        return self._publish(arm, seed, result | {"scores": self.scores_of(name, model, output)})

    @property
    def _seed_count(self) -> int:
        return self.fine_tuning_seeds or len(self.plan.size["fine_tuning"]["seeds"])

    def scores_of(self, name: str, model: str, output: str) -> dict[str, list[float]]:
        """Fine-tunes ``model``, with files in ``output`` under ``name``. Returns task -> one score per
        fine-tuning seed."""
        settings = {key.replace("_", "-"): value for key, value in self.plan.size["fine_tuning"].items()}
        settings |= {"tasks": ",".join(self.plan.size["tasks"]), "seeds": self._seed_count}
        settings |= {"model": f"{name}={model}", "data": self.tasks, "output": output}
        command("-m", "evaluation.main", *(f"--{key}={value}" for key, value in settings.items()))
        scores: dict[str, list[float]] = {}
        for path in sorted(Path(output, "scores", name).glob("*/seed-*.json")):
            scores.setdefault(path.parent.name, []).append(json.loads(path.read_text())["score"])
        return scores

    def _steps(self, arm: Arm, seed: int) -> int:
        if arm.time_of is None:
            return self.plan.tokens // self._tokens(arm, 1) if arm.steps is None else arm.steps
        equal_tokens = self.train(self._with_equal_tokens(arm), 0)
        timed = self.train(self.plan.arms[arm.time_of], 0)
        return round(timed["train_seconds"] / equal_tokens["train_seconds"] * equal_tokens["steps"])

    def _with_equal_tokens(self, arm: Arm) -> Arm:
        """Returns the arm that differs from ``arm`` only in its number of steps."""
        others = (other for other in self.plan.arms.values() if other.time_of is None)
        return next(
            other
            for other in others
            if replace(arm, name=other.name, time_of=None) == replace(other, seeds=arm.seeds)
        )

    def _tokens(self, arm: Arm, steps: int) -> int:
        batch_size = arm.train.get("batch_size", self.plan.size["batch_size"])
        return int(steps * batch_size * self.plan.size["length"])

    def _untrained(self, run: StudentRun, recipe: str) -> str:
        """Saves the student's initial weights as a model directory, and returns its path."""
        path = f"{run.directory}/model"
        if not Path(path).exists():
            command("-m", "tests.benchmarks.compare.measures", "--recipe", recipe, "--save", path)
        return path

    def _measures(self, arm: Arm, seed: int, steps: int, model: str) -> dict[str, float]:
        """Returns the measures on the held-out text of the reference store, whatever the arm's own store."""
        reference = self.plan.recipe(self.plan.arms[REFERENCE], 0, self.plan.size["steps"])
        command("-m", "offline_teacher.main", "run", "--recipe", reference)
        path = Path(model).with_name("measures.json")
        command(
            *("-m", "tests.benchmarks.compare.measures", "--model", model, "--output", str(path)),
            *("--recipe", self.plan.recipe(arm, seed, steps)),
            *("--store", load_recipe(reference).store_path),
        )
        return dict(json.loads(path.read_text()))

    def _publish(self, arm: Arm, seed: int, result: Result) -> Result:
        storage.publish_json(str(self.path(arm, seed)), result)
        return result


def command(*words: str) -> dict[str, float]:
    """Runs a Python command of the project; returns its ``seconds`` and ``peak_bytes`` of memory. If it
    fails, raises SystemExit with the end of its output."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            log.seek(0)
            sys.exit(f"error: {' '.join(words)}:\n{log.read()[-3000:]}")
    return {"seconds": time.monotonic() - start, "peak_bytes": usage.ru_maxrss * 1024}


def training_of(history: Path, tokens: int) -> Result:
    """Returns the seconds of the steps alone, and the tokens per second, of a training. ``history``: the
    trainer's log. ``tokens``: number of tokens per step."""
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    windows = {line["step"]: line for line in lines if "tokens_per_second" in line}.values()
    seconds = sum(line["steps"] * tokens / line["tokens_per_second"] for line in windows)
    rate = sum(line["steps"] for line in windows) * tokens / seconds
    return {"train_seconds": seconds, "tokens_per_second": rate}


def _bytes_per_token(run: StudentRun) -> float:
    layout = open_store(run.recipe.store_path).layout
    return layout.bytes_per_sample() / layout.length
