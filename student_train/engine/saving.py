"""Saves a run's checkpoints, by minutes and by steps, and finds the one to resume from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from infra.settings.sections import Train
from student_train.engine import checkpoint
from student_train.engine.engine import Engine
from student_train.engine.world import World


class Saving:
    """The checkpoints of one run. All ranks call every method; rank 0 reads and writes."""

    def __init__(
        self,
        directory: str,
        train: Train,
        world: World,
        engine: Engine,
        fingerprint: dict[str, Any],
        written: Callable[[], None],
    ) -> None:
        """``written`` is called on rank 0, in the writing thread, after every checkpoint."""
        self.directory, self._minutes = directory, train.checkpoint_minutes
        self._world, self._engine, self._fingerprint = world, engine, fingerprint
        self._writer = checkpoint.Writer(directory, train.keep_checkpoints, written)
        self._step, self._saved_at = -1, time.monotonic()

    def is_time(self) -> bool:
        """Whether ``train.checkpoint_minutes`` have passed since the last checkpoint."""
        return self._minutes > 0 and time.monotonic() - self._saved_at >= 60 * self._minutes

    def save(self, step: int, samples_seen: int, samples_digest: str, tracking_run: str | None) -> None:
        """Starts to write a checkpoint of this step, unless it has one."""
        self._saved_at = time.monotonic()
        if self._step == step:
            return
        self.wait()
        tensors = self._engine.gather()
        facts = checkpoint.Facts(
            step=step,
            samples_seen=samples_seen,
            optimizer_step=self._engine.optimizer_step(),
            loss_scaler=self._engine.scaler_state(),
            samples_digest=samples_digest,
            fingerprint=self._fingerprint,
            tracking_run=tracking_run,
        )
        if self._world.first:
            self._writer.start(facts, tensors)
        self._step = step

    def wait(self) -> None:
        """Returns when the started checkpoint is on disk."""

        def written() -> str:
            self._writer.wait()
            return ""

        self._world.first_does(written)

    def resume(self, check: Callable[[dict[str, Any]], None]) -> tuple[int, str]:
        """Loads the newest valid checkpoint into the engine. Returns its step and digest of samples; 0 and ""
        if there is none.

        ``check`` gets the checkpoint's fingerprint, and raises UserError if it must not be resumed.
        """
        found: list[checkpoint.Checkpoint] = []

        def load() -> str:
            newest = checkpoint.load_newest(self.directory)
            if newest is None:
                return ""
            check(newest.facts.fingerprint)
            found.append(newest)
            facts = newest.facts
            return json.dumps([facts.step, facts.samples_digest, facts.optimizer_step, facts.loss_scaler])

        text = self._world.first_does(load)
        if not text:
            return 0, ""
        step, digest, optimizer_step, scaler = json.loads(text)
        self._engine.restore(found[0].tensors if found else None, optimizer_step)
        self._engine.restore_scaler(scaler)
        self._step = step
        return step, digest

    def last_good(self) -> str:
        """Which checkpoint to go back to, in words; on rank 0 only."""
        good = checkpoint.newest_step(self.directory) if self._world.first else None
        if good is None:
            return "no checkpoint was written yet"
        return f"the last good checkpoint is {self.directory}/{checkpoint.checkpoint_name(good)}"
