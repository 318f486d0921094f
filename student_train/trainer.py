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
from offline_teacher.store.store import Store
from student_train.data.loss_needs import teacher_output_layout
from student_train.data.order import chained_digest, dropout_seed
from student_train.data.phases import Phases
from student_train.data.stream import Step
from student_train.engine.checkpoint_schedule import Checkpoints
from student_train.engine.engine import Engine
from student_train.engine.learning_rate import learning_rate
from student_train.engine.world import World
from student_train.history import History, LogSums, Tracker, progress
from student_train.mirror import Mirror
from student_train.objectives.objective import TERMS, Objective
from student_train.objectives.validation import validate
from student_train.profiling import gpu_metrics, profiled
from student_train.ranks import handling_stop_signals
from student_train.student.model import StudentModel
from student_train.student.model_directory import require_same

SHOWN_IDS = 32
"""Maximum number of sequence ids in the message about a failed step."""


class Stopped(KeyboardInterrupt):
    """Training ended after Ctrl-C or SIGTERM; the current step was finished and saved."""


class Trainer:
    """Trains one student of a recipe; every rank has a Trainer. ``model`` is trained in place. ``stores``:
    the recipe's own, then those of ``train.phases``. ``mirror``: None if the student's directory is local."""

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
        self.checkpoints = Checkpoints(
            storage.join(directory, "checkpoints"), run.train, world, engine, fingerprint,
            mirror.push if mirror else lambda: None,
        )  # fmt: skip
        self.history = History(storage.join(directory, "history.jsonl"), tracker, world.is_rank_0)
        self.step, self.samples_digest = 0, ""  # number of steps done, digest of their samples
        self.minutes_passed = self.stop_requested = False
        self._has_gradient = True
        """False if no token of the step is masked, and every term of the loss needs masked ones; the same on
        all ranks."""
        self.log_sums = LogSums()

    @property
    def total_steps(self) -> int:
        """Number of optimiser steps of the whole run."""
        return self.phases.steps

    def train(self) -> dict[str, float]:
        """Trains from the newest checkpoint to the end. Returns the trained student's validation metrics.

        Raises Stopped after Ctrl-C or SIGTERM. Raises UserError, the same on all ranks, if a sample is
        damaged, or if a loss or a gradient is not finite.
        """
        self.resume()
        section = self.train_section
        with (
            handling_stop_signals(self._stop),
            closing(self.phases.read(self.world, self.step)) as stream,
            progress(self.world.is_rank_0, self.total_steps, "steps", self.run.title, self.step) as bar,
            profiled(section.profile_steps if self.world.is_rank_0 else 0, self.trace) as profile_step,
        ):
            while (read := self._next_step(stream)) is not None:
                started = time.perf_counter()
                step, tokens, masked = read
                terms = self._forward_backward(step, tokens, masked)
                rate = learning_rate(section, step.number, self.total_steps)
                norm = self.engine.step(rate) if self._has_gradient else torch.zeros(()).to(terms.device)
                self._count(step, terms, tokens, norm)
                if self._reads_norms_now():
                    self._require_finite()
                self.log_sums.seconds += time.perf_counter() - started
                bar.advance(1)
                profile_step()
                if self._is_due(section.log_every):
                    bar.note(self._log(rate))
                if self._is_due(section.validate_every) and self.step < self.total_steps:
                    self._validate()
                if self.checkpoints.is_due(self.step, self.minutes_passed):
                    self.save()
        self._require_finite()
        self.save()
        self.checkpoints.wait()
        if self.step < self.total_steps:
            raise Stopped
        return self._validate()

    # --- one step -------------------------------------------------------------------------------------------

    def _next_step(self, stream: Iterator[Step]) -> tuple[Step, float, float] | None:
        """Returns the next step, with its real and masked tokens over all ranks; None at the end or after a
        signal. If the stream of one rank raises UserError, all ranks raise it."""
        if self.step >= self.total_steps:
            return None
        step, problem, started = None, "", time.perf_counter()
        try:
            step = next(stream)
        except UserError as error:
            problem = str(error)
        self.log_sums.waited += time.perf_counter() - started
        counts = [step.tokens, step.masked] if step else [0, 0]
        by_time = self.world.is_rank_0 and self.checkpoints.minutes_passed()
        values = [*counts, self.stop_requested, bool(problem), by_time]
        tokens, masked, stop, failed, minutes_passed = self.world.sum([float(value) for value in values])
        self.log_sums.seconds += time.perf_counter() - started
        self.minutes_passed = bool(minutes_passed)
        if failed:
            self.world.raise_on_all_ranks(problem)
        if stop:
            return None
        assert step is not None
        assert step.number == self.step
        return step, tokens, masked

    def _forward_backward(self, step: Step, tokens: float, masked: float) -> torch.Tensor:
        """Adds up this rank's gradients of the step. Returns its share of each of `TERMS`, float64 [6]."""
        torch.manual_seed(dropout_seed(self.train_section.seed, step.number, self.world.rank))
        sums = torch.zeros(len(TERMS), dtype=torch.float64, device=self.world.device)
        layout = teacher_output_layout(self.train_section, self.phases.at(step.number).store.layout)
        objective = replace(self.objective, layout=layout)
        for index, batch in enumerate(step.micro_batches):
            batch = batch.to(self.world.device)
            terms = objective(self.model, batch, tokens, masked, len(step.locations))
            last = index == len(step.micro_batches) - 1
            self._has_gradient = terms.total.requires_grad
            if self._has_gradient:
                self.engine.backward(terms.total * batch.weight, last)
            sums += torch.stack([value.detach().double() for value in terms.values()]) * batch.weight
        return sums

    def _reads_norms_now(self) -> bool:
        """Whether the host reads the gradient norms now: always on a CPU. On a GPU the host would wait, so it
        reads them only before a log, a validation or a checkpoint."""
        if self.world.device.type == "cpu" or self.checkpoints.is_due(self.step, self.minutes_passed):
            return True
        return self._is_due(self.train_section.log_every) or self._is_due(self.train_section.validate_every)

    def _require_finite(self) -> None:
        """Raises UserError if a gradient was not finite, unless float16's loss scale can still be lowered.
        The optimiser skips a step whose gradient is not finite, so this check may come some steps later."""
        bad_step = self.log_sums.first_not_finite(self.step)
        if bad_step is not None and not self.engine.scale_can_fall:
            self._fail(bad_step, "gradient")

    def _fail(self, step: int, what: str) -> None:
        """Raises UserError, which names the samples of the step; ``what``: "loss" or "gradient"."""
        self.checkpoints.wait()
        phase = self.phases.at(step)
        locations = phase.locations(step)
        listed = ", ".join(phase.sequence_names(locations, SHOWN_IDS))
        listed += ", ..." if len(locations) > SHOWN_IDS else ""
        raise UserError(
            f"step {step}: the {what} is not a finite number. Its {len(locations)} samples (part/row):"
            f" {listed}; masking epoch {sorted(set(locations.masking_epoch.tolist()))}; store"
            f" {phase.store.root}; {self.checkpoints.newest_as_words()}; lower train.learning_rate or check"
            " the store"
        )

    def _count(self, step: Step, terms: torch.Tensor, tokens: float, norm: torch.Tensor) -> None:
        """Counts a step as done. ``norm``: that of its gradient."""
        self.step = step.number + 1
        self.samples_digest = chained_digest(self.samples_digest, step.locations)
        self.log_sums.add(terms, int(tokens), norm)

    def _is_due(self, every: int) -> bool:
        """Whether this is an ``every``-th step or the run's last; False if ``every`` is 0."""
        return every > 0 and (self.step % every == 0 or self.step == self.total_steps)

    # --- what is logged -------------------------------------------------------------------------------------

    def _log(self, rate: float) -> str:
        """Writes averages over the steps since the last log to history.jsonl and MLflow. ``rate``: the
        current learning rate. Returns a short text for the progress bar."""
        sums, self.log_sums = self.log_sums, LogSums()
        *terms, waited = self.world.sum([*sums.terms.tolist(), sums.waited / sums.seconds])
        metrics = {name: value / sums.steps for name, value in zip(TERMS, terms, strict=True)}
        if not all(map(math.isfinite, metrics.values())):
            self._fail(self.step - 1, "loss")
        speed = sums.tokens / sums.seconds
        metrics |= {
            "learning_rate": rate,
            "gradient_norm": sums.gradient_norm,
            "tokens_per_second": speed,
            "tokens_per_second_per_rank": speed / self.world.size,
            "input_wait": waited / self.world.size,
        }
        flops = self.model.flops_per_token * metrics["tokens_per_second_per_rank"]
        metrics |= gpu_metrics(self.world.device, flops, self.train_section.dtype)
        if self.train_section.dtype == "float16":
            metrics["loss_scale"] = self.engine.loss_scale
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._record({**finite, "samples": self.samples_digest, "steps": sums.steps})
        return f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s"

    def _validate(self) -> dict[str, float]:
        """Measures the student on held-out text and logs the metrics. Returns {} if the store has none."""
        held_out = self.store.splits.get("validation")
        if held_out is None:
            return {}
        with progress(self.world.is_rank_0, held_out.plan.samples, "sequences", "validation") as bar:
            inputs = self.model, self.objective, self.store, self.world, self.train_section
            metrics = validate(*inputs, bar.advance)
        self._record({f"validation_{name}": value for name, value in metrics.items()})
        return metrics

    def _record(self, values: dict[str, Any]) -> None:
        """Appends a line to the history. All ranks call it, since all must end if rank 0 cannot write."""
        self.world.on_rank_0(lambda: self.history.record(self.step, values))

    # --- stop and resume ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Starts to write a checkpoint after this step, unless there is one. All ranks call it."""
        samples = self.phases.samples_before(self.step)
        self.checkpoints.save(self.step, samples, self.samples_digest, self.tracker.run_id)

    def resume(self) -> None:
        """Loads the newest valid checkpoint, if any, into the engine. All ranks call it."""
        self.step, self.samples_digest = self.checkpoints.resume(
            lambda old: require_same(old, self.fingerprint, self.run.directory)
        )
        self.history.trim(self.step)

    def _stop(self, signal_number: int) -> None:
        """Makes training end after the current step; called by the signal handler."""
        console.record_signal(signal_number)
        self.stop_requested = True
