"""The training loop: step, log, validate, checkpoint. One screen; all it needs lies below or beside it.

recipe, store -> Trainer.train() -> history.jsonl, checkpoints/, the trained student in the engine
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from infra import console, storage
from infra.cache import Cache
from infra.errors import UserError
from infra.recipe import Recipe
from offline_teacher.store.reader import Store
from student_train import checkpoint
from student_train.engine import Engine, StepResult, World
from student_train.mirror import Mirror
from student_train.model_card import require_same
from student_train.objective import Objective, columns_needed
from student_train.order import SampleOrder, run_samples, run_steps
from student_train.schedule import learning_rate
from student_train.stream import Step, Stream
from student_train.student import StudentModel
from student_train.validation import validate

TERMS = ("loss", "kl", "mlm", "cosine")
SHOWN_IDS = 32
"""Sequence ids a message about a failed step lists."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the current step was finished and saved."""


class Tracker(Protocol):
    """What the loop needs of ``infra.tracking.Run``."""

    @property
    def run_id(self) -> str | None: ...
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...


@dataclass
class Window:
    """What was added up since the last logged step, on this rank."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    """Seconds spent waiting for the stream."""
    tokens: int = 0
    """Of all ranks."""
    steps: int = 0
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(len(TERMS), dtype=torch.float64))
    """This rank's share of each term, added up over the steps."""


class Trainer:
    """One run of a recipe on one rank. ``model`` is trained in place."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        store: Store,
        validation: Store | None,
        model: StudentModel,
        objective: Objective,
        engine: Engine,
        tracker: Tracker,
        fingerprint: dict[str, Any],
        mirror: Mirror | None = None,
    ) -> None:
        self.recipe, self.train_section, self.world = recipe, recipe.train, world
        self.store, self.validation, self.model, self.objective = store, validation, model, objective
        self.engine, self.tracker, self.fingerprint = engine, tracker, fingerprint
        self.samples = run_samples(
            store.plan.sequences, recipe.train.epochs, recipe.train.max_steps, recipe.train.batch_size
        )
        self.total_steps = run_steps(self.samples, recipe.train.batch_size)
        self.mirror = mirror
        directory = mirror.local if mirror else recipe.student_dir
        self.checkpoints = storage.join(directory, "checkpoints")
        self.history = storage.join(directory, "history.jsonl")
        self.step = 0
        self.samples_digest = ""
        self.saved_step = -1
        self.stop_requested = False
        self.last_metrics: dict[str, float] = {}

    def train(self) -> dict[str, float]:
        """Trains to the end from where the newest checkpoint is; validation metrics of the final student.

        Raises Stopped after a signal, and UserError where a shard is damaged or the loss is not finite; the
        latter is raised alike on every rank.
        """
        self.resume()
        section, window = self.train_section, Window()
        with (
            self._signals_noted(),
            self._stream() as stream,
            self._progress(self.total_steps, "steps", "student", self.step) as bar,
        ):
            for step in self._agreed(stream, window):
                terms = self._forward_backward(step)
                rate = learning_rate(section, step.step, self.total_steps)
                result = self.engine.step(rate)
                self._require_finite(step, result)
                self._count(step, terms, window)
                bar.advance(1)
                if self._due(section.log_every):
                    bar.note(self._log(window, rate, result))
                    window = Window()
                if self._due(section.validate_every) and self.step < self.total_steps:
                    self._validate()
                if self._due(section.checkpoint_every):
                    self.save()
        self.save()
        if self.step < self.total_steps:
            raise Stopped
        return self._validate()

    # --- one step -------------------------------------------------------------------------------------------

    def _forward_backward(self, step: Step) -> torch.Tensor:
        """Adds the gradient of this rank's micro-batches; its share of each of TERMS, float64 [4]."""
        torch.manual_seed(dropout_seed(self.train_section.seed, step.step, self.world.rank))
        sums = torch.zeros(len(TERMS), dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(step.micro_batches):
            terms = self.objective(self.model, batch.to(self.world.device), step.tokens, step.masked)
            last = number == len(step.micro_batches) - 1
            self.engine.backward(terms.total * batch.weight, last)
            values = (terms.total, terms.kl, terms.mlm, terms.cosine)
            sums += torch.stack([value.detach().double() for value in values]) * batch.weight
        return sums

    def _agreed(self, stream: Stream, window: Window) -> Iterator[Step]:
        """The steps to do; ends early where any rank got a signal, raises on all what one stream raised."""
        while self.step < self.total_steps:
            step, problem, started = None, "", time.perf_counter()
            try:
                step = next(stream)
            except UserError as error:
                problem = str(error)
            window.waited += time.perf_counter() - started
            stop, failed = self.world.max(
                [float(self.stop_requested), self.world.rank + 1.0 if problem else 0.0]
            )
            if failed:
                raise UserError(self.world.text_from(int(failed) - 1, problem))
            if stop:
                return
            assert step is not None
            assert step.step == self.step
            yield step

    def _require_finite(self, step: Step, result: StepResult) -> None:
        """UserError where the gradient is not finite and it is not the loss scaler's to handle."""
        if math.isfinite(result.gradient_norm):
            return
        if self.train_section.dtype == "float16" and self.engine.loss_scale > 1:
            return
        self._fail(step.sequence_ids, step.replicas, "gradient")

    def _fail(self, ids: np.ndarray, replicas: np.ndarray, what: str) -> None:
        good = checkpoint.newest_step(self.checkpoints) if self.world.first else None
        kept = "no checkpoint was written yet"
        if good is not None:
            kept = f"the last good checkpoint is {self.checkpoints}/{checkpoint.checkpoint_name(good)}"
        listed = ", ".join(map(str, ids[:SHOWN_IDS].tolist())) + (", ..." if len(ids) > SHOWN_IDS else "")
        raise UserError(
            f"step {self.step}: the {what} is not a finite number; the {len(ids)} samples of this step are "
            f"sequences {listed} of replica {sorted(set(replicas.tolist()))}; {kept}; "
            "lower train.learning_rate or check the store"
        )

    def _count(self, step: Step, terms: torch.Tensor, window: Window) -> None:
        self.step = step.step + 1
        self.samples_digest = chained_digest(self.samples_digest, step.replicas, step.sequence_ids)
        window.sums = window.sums.to(terms.device) + terms
        window.tokens += step.tokens
        window.steps += 1

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.total_steps)

    # --- what is said and kept ------------------------------------------------------------------------------

    def _log(self, window: Window, rate: float, result: StepResult) -> str:
        """Means over the steps since the last log, in history.jsonl and MLflow; a short text to show."""
        seconds = time.perf_counter() - window.started
        reduced = self.world.sum([*window.sums.tolist(), window.waited / seconds])
        metrics = {name: value / window.steps for name, value in zip(TERMS, reduced, strict=False)}
        if not all(map(math.isfinite, metrics.values())):
            order = self._order()
            size = self.train_section.batch_size
            replicas, ids = order.samples((self.step - 1) * size, min(self.step * size, self.samples))
            self._fail(ids, replicas, "loss")
        metrics |= {
            "learning_rate": rate,
            "gradient_norm": result.gradient_norm,
            "tokens_per_second": window.tokens / seconds,
            "input_wait": reduced[-1] / self.world.size,
        }
        if self.train_section.dtype == "float16":
            metrics["loss_scale"] = self.engine.loss_scale
        self.last_metrics = metrics
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._record({**finite, "samples": self.samples_digest, "steps": window.steps})
        return f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s"

    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        with self._progress(self.validation.plan.sequences, "sequences", "validation") as bar:
            metrics = validate(self.model, self.objective, self.validation, self.world, bar.advance)
        self._record({f"validation_{name}": value for name, value in metrics.items()})
        return metrics

    def _record(self, values: dict[str, Any]) -> None:
        if not self.world.first:
            return
        with open(self.history, "a") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, float)}
        self.tracker.log_metrics(numbers, self.step)

    def last_logged(self) -> dict[str, float]:
        """Losses of the last logged step, also where an earlier process logged it. Meaningful on rank 0."""
        if not self.last_metrics and os.path.exists(self.history):
            lines = [json.loads(line) for line in storage.read_bytes(self.history).decode().splitlines()]
            logged = [line for line in lines if "loss" in line]
            self.last_metrics = logged[-1] if logged else {}
        return {name: self.last_metrics[name] for name in TERMS if name in self.last_metrics}

    def _progress(self, total: int, unit: str, description: str, done: int = 0) -> Any:
        if self.world.first:
            return console.progress(total, unit, description, done)
        return _silent_progress()

    # --- stop and go on -------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of this step, unless there is one. All ranks call it."""
        if self.saved_step == self.step:
            return
        tensors = self.engine.gather()
        facts = checkpoint.Facts(
            step=self.step,
            samples_seen=min(self.step * self.train_section.batch_size, self.samples),
            optimizer_step=self.engine.optimizer_step(),
            loss_scaler=self.engine.scaler_state(),
            samples_digest=self.samples_digest,
            fingerprint=self.fingerprint,
            tracking_run=self.tracker.run_id if self.world.first else None,
        )
        keep = self.train_section.keep_checkpoints

        def publish() -> str:
            path = checkpoint.save(self.checkpoints, facts, tensors, keep)
            if self.mirror:
                self.mirror.push()
            return path

        self.world.first_does(publish)
        self.saved_step = self.step

    def resume(self) -> None:
        """Puts the newest valid checkpoint into the engine, if there is one. All ranks call it."""
        found: list[checkpoint.Checkpoint] = []

        def load() -> str:
            newest = checkpoint.load_newest(self.checkpoints)
            if newest is None:
                return ""
            require_same(newest.facts.fingerprint, self.fingerprint, self.recipe.student_dir)
            found.append(newest)
            facts = newest.facts
            rest = {
                "step": facts.step,
                "optimizer_step": facts.optimizer_step,
                "digest": facts.samples_digest,
            }
            return json.dumps({**rest, "scaler": facts.loss_scaler})

        text = self.world.first_does(load)
        if text:
            facts = json.loads(text)
            self.engine.restore(found[0].tensors if found else None, facts["optimizer_step"])
            self.engine.restore_scaler(facts["scaler"])
            self.step = self.saved_step = facts["step"]
            self.samples_digest = facts["digest"]
        if self.world.first:
            trim_history(self.history, self.step)

    def _order(self) -> SampleOrder:
        return SampleOrder(self.store.plan, self.train_section.seed, self.train_section.window_shards)

    def _stream(self) -> Stream:
        section = self.train_section
        return Stream(
            self.store,
            self._order(),
            section.batch_size,
            section.micro_batch_size,
            self.world.rank,
            self.world.size,
            self.step,
            self.total_steps,
            section.prefetch,
            self.world.device,
            samples=self.samples,
            columns=columns_needed(section, self.store.layout),
            cache=Cache(section.cache_dir, section.cache_bytes)
            if storage.is_remote(self.recipe.store_dir)
            else None,
        )

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM only ask for a stop; launchers send both, and more than once."""

        def note(number: int, frame: object) -> None:
            self.stop_requested = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the random numbers of one step on one rank, so that no generator state is kept."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def chained_digest(before: str, replicas: np.ndarray, sequence_ids: np.ndarray) -> str:
    """Digest of all samples up to and with this batch: equal digests mean equal samples in equal order."""
    batch = np.stack([replicas, sequence_ids]).astype("<i8").tobytes()
    return xxhash.xxh3_128_hexdigest(before.encode() + batch)


def trim_history(path: str, step: int) -> None:
    """Drops what a run wrote after its last checkpoint, and a line cut short by its death."""
    if not os.path.exists(path):
        return
    kept = []
    for line in storage.read_bytes(path).decode(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    storage.publish_bytes(path, "".join(f"{line}\n" for line in kept).encode())


class _Silent:
    def advance(self, count: int = 1) -> None: ...
    def note(self, text: str) -> None: ...


@contextmanager
def _silent_progress() -> Iterator[_Silent]:
    yield _Silent()
