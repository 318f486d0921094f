"""The training loop: step, log, validate, checkpoint.

``Trainer.train`` trains the student in the engine and writes history.jsonl and checkpoints/.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from infra import console
from infra.errors import UserError
from infra.files import storage
from infra.settings.recipe import StudentRun
from offline_teacher.store.reader import Store
from student_train.data.order import chained_digest, dropout_seed
from student_train.data.phases import Phases
from student_train.data.stream import Step
from student_train.engine.engine import Engine
from student_train.engine.saving import Saving
from student_train.engine.schedule import learning_rate
from student_train.engine.world import World
from student_train.gauges import gpu_metrics, traced
from student_train.history import History, Tracker, Window, progress
from student_train.mirror import Mirror
from student_train.objectives.needs import taught_layout
from student_train.objectives.objective import TERMS, Objective
from student_train.objectives.validation import validate
from student_train.ranks import signals_noted
from student_train.student.model import StudentModel
from student_train.student.published import require_same

SHOWN_IDS = 32
"""Number of sequence ids that the message about a failed step lists."""


class Stopped(KeyboardInterrupt):
    """Raised after Ctrl-C or SIGTERM, when the current step is finished and saved."""


class Trainer:
    """One student of a recipe on one rank. ``model`` is trained in place.

    ``stores``: the recipe's own, then those of ``train.phases``.
    """

    def __init__(
        self,
        run: StudentRun,
        world: World,
        stores: Sequence[Store],
        model: StudentModel,
        objective: Objective,
        engine: Engine,
        tracker: Tracker,
        fingerprint: dict[str, Any],
        mirror: Mirror | None = None,
    ) -> None:
        self.run, self.train_section, self.world, self.store = run, run.train, world, stores[0]
        self.model, self.objective, self.engine, self.tracker = model, objective, engine, tracker
        self.fingerprint = fingerprint
        self.phases = Phases(stores, run.train)
        directory = mirror.local if mirror else run.directory
        self.trace = storage.join(directory, "trace.json")
        self.saving = Saving(
            storage.join(directory, "checkpoints"), run.train, world, engine, fingerprint,
            mirror.push if mirror else lambda: None,
        )  # fmt: skip
        self.history = History(storage.join(directory, "history.jsonl"), tracker, world.first)
        self.step, self.samples_digest = 0, ""
        self.save_due = self.stop_requested = False
        self.window = Window()

    @property
    def total_steps(self) -> int:
        return self.phases.steps

    def train(self) -> dict[str, float]:
        """Trains from the newest checkpoint to the end. Returns the final student's validation metrics.

        Raises Stopped after a signal. Raises UserError, the same on every rank, if a sample is damaged or a
        loss or gradient is not finite.
        """
        self.resume()
        section = self.train_section
        with (
            signals_noted(self._stop),
            closing(self.phases.read(self.world, self.step)) as stream,
            progress(self.world.first, self.total_steps, "steps", self.run.title, self.step) as bar,
            traced(section.profile_steps if self.world.first else 0, self.trace) as step_traced,
        ):
            while (agreed := self._next_step(stream)) is not None:
                started = time.perf_counter()
                step, tokens, masked = agreed
                terms = self._forward_backward(step, tokens, masked)
                rate = learning_rate(section, step.step, self.total_steps)
                norm = self.engine.step(rate).gradient_norm
                self._count(step, terms, tokens, norm)
                if self._checks_norms_now():
                    self._require_finite()
                self.window.seconds += time.perf_counter() - started
                bar.advance(1)
                step_traced()
                if self._due(section.log_every):
                    bar.note(self._log(rate))
                if self._due(section.validate_every) and self.step < self.total_steps:
                    self._validate()
                if self._due(section.checkpoint_every) or self.save_due:
                    self.save()
        self._require_finite()
        self.save()
        self.saving.wait()
        if self.step < self.total_steps:
            raise Stopped
        return self._validate()

    # --- one step -------------------------------------------------------------------------------------------

    def _next_step(self, stream: Iterator[Step]) -> tuple[Step, float, float] | None:
        """The next step with its real and masked tokens over all ranks; None at the end or after a signal.

        If one rank's stream raises a UserError, all ranks raise it.
        """
        if self.step >= self.total_steps:
            return None
        step, problem, started = None, "", time.perf_counter()
        try:
            step = next(stream)
        except UserError as error:
            problem = str(error)
        self.window.waited += time.perf_counter() - started
        counts = [step.tokens, step.masked] if step else [0, 0]
        flags = [self.stop_requested, bool(problem), self.world.first and self.saving.is_time()]
        tokens, masked, stop, failed, due = self.world.sum([float(x) for x in (*counts, *flags)])
        self.window.seconds += time.perf_counter() - started
        self.save_due = bool(due)
        if failed:
            self.world.raise_first(problem)
        if stop:
            return None
        assert step is not None
        assert step.step == self.step
        return step, tokens, masked

    def _forward_backward(self, step: Step, tokens: float, masked: float) -> torch.Tensor:
        """Accumulates this rank's gradients. Returns the rank's share of each of TERMS, float64 [6]."""
        torch.manual_seed(dropout_seed(self.train_section.seed, step.step, self.world.rank))
        sums = torch.zeros(len(TERMS), dtype=torch.float64, device=self.world.device)
        layout = taught_layout(self.train_section, self.phases.at(step.step).store.layout)
        objective = replace(self.objective, layout=layout)
        for number, batch in enumerate(step.micro_batches):
            batch = batch.to(self.world.device)
            terms = objective(self.model, batch, tokens, masked, len(step.places))
            last = number == len(step.micro_batches) - 1
            self.engine.backward(terms.total * batch.weight, last)
            sums += torch.stack([value.detach().double() for value in terms.values()]) * batch.weight
        return sums

    def _checks_norms_now(self) -> bool:
        """Whether the host checks the gradient norms now: always on a CPU, else before a log, validation or
        save."""
        section = self.train_section
        every = section.log_every, section.validate_every, section.checkpoint_every
        return self.world.device.type == "cpu" or self.save_due or any(map(self._due, every))

    def _require_finite(self) -> None:
        """Raises UserError if a gradient was not finite and the loss scale cannot be lowered any further.

        The optimiser skips a step with such a gradient, so this check may come some steps later.
        """
        bad = self.window.first_not_finite(self.step)
        if bad is not None and not (self.train_section.dtype == "float16" and self.engine.loss_scale > 1):
            self._fail(bad, "gradient")

    def _fail(self, step: int, what: str) -> None:
        self.saving.wait()
        phase = self.phases.at(step)
        places = phase.places(step)
        listed = ", ".join(phase.names(places, SHOWN_IDS))
        listed += ", ..." if len(places) > SHOWN_IDS else ""
        raise UserError(
            f"step {step}: the {what} is not a finite number. Its {len(places)} samples (part/row):"
            f" {listed}; masking epoch {sorted(set(places.masking_epoch.tolist()))}; store"
            f" {phase.store.root}; {self.saving.last_good()}; lower train.learning_rate or check the store"
        )

    def _count(self, step: Step, terms: torch.Tensor, tokens: float, norm: torch.Tensor) -> None:
        self.step = step.step + 1
        self.samples_digest = chained_digest(self.samples_digest, step.places)
        self.window.add(terms, int(tokens), norm)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.total_steps)

    # --- what is logged -------------------------------------------------------------------------------------

    def _log(self, rate: float) -> str:
        """Writes averages of the steps since the last log to history.jsonl and MLflow. Returns a short
        text."""
        window, self.window = self.window, Window()
        reduced = self.world.sum([*window.sums.tolist(), window.waited / window.seconds])
        metrics = {
            name: value / window.steps for name, value in zip(TERMS, reduced, strict=False)
        }  # the last entry is the wait
        if not all(map(math.isfinite, metrics.values())):
            self._fail(self.step - 1, "loss")
        speed = window.tokens / window.seconds
        metrics |= {
            "learning_rate": rate,
            "gradient_norm": window.gradient_norm,
            "tokens_per_second": speed,
            "tokens_per_second_per_rank": speed / self.world.size,
            "input_wait": reduced[-1] / self.world.size,
        }
        flops = self.model.flops_per_token * metrics["tokens_per_second_per_rank"]
        metrics |= gpu_metrics(self.world.device, flops, self.train_section.dtype)
        if self.train_section.dtype == "float16":
            metrics["loss_scale"] = self.engine.loss_scale
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.history.record(self.step, {**finite, "samples": self.samples_digest, "steps": window.steps})
        return f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s"

    def _validate(self) -> dict[str, float]:
        held_out = self.store.splits.get("validation")
        if held_out is None:
            return {}
        with progress(self.world.first, held_out.plan.samples, "sequences", "validation") as bar:
            metrics = validate(
                self.model, self.objective, self.store, self.world, self.train_section, bar.advance
            )
        self.history.record(self.step, {f"validation_{name}": value for name, value in metrics.items()})
        return metrics

    # --- stop and resume ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Starts to write a checkpoint of this step, unless it has one. All ranks call it."""
        self.save_due = False
        samples = self.phases.samples_before(self.step)
        self.saving.save(self.step, samples, self.samples_digest, self.tracker.run_id)

    def resume(self) -> None:
        """Loads the newest valid checkpoint, if any, into the engine. All ranks call it."""
        self.step, self.samples_digest = self.saving.resume(
            lambda old: require_same(old, self.fingerprint, self.run.directory)
        )
        self.history.trim(self.step)

    def _stop(self, signal_number: int) -> None:
        console.record_signal(signal_number)
        self.stop_requested = True
