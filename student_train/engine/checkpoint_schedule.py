"""When a run writes checkpoints (by steps and by minutes), and from which checkpoint it resumes.

The files of a checkpoint are described in `checkpoint_format`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from infra.settings.sections import Train
from student_train.engine import checkpoint_format
from student_train.engine.engine import Engine
from student_train.engine.world import World


class Checkpoints:
    """The checkpoints of one run. All ranks call every method; only rank 0 reads and writes files."""

    def __init__(
        self,
        directory: str,
        train: Train,
        world: World,
        engine: Engine,
        fingerprint: dict[str, Any],
        after_write: Callable[[], None],
    ) -> None:
        """``after_write``: called on rank 0, in the writing thread, after every checkpoint."""
        self.directory = directory
        self._every, self._minutes = train.checkpoint_every, train.checkpoint_minutes
        self._world, self._engine, self._fingerprint = world, engine, fingerprint
        self._writer = checkpoint_format.CheckpointWriter(directory, train.keep_checkpoints, after_write)
        self._saved_step, self._saved_at = -1, time.monotonic()

    def minutes_passed(self) -> bool:
        """Whether ``train.checkpoint_minutes`` have passed since the last checkpoint, on this rank."""
        return self._minutes > 0 and time.monotonic() - self._saved_at >= 60 * self._minutes

    def is_due(self, step: int, minutes_passed: bool) -> bool:
        """Whether to save after ``step`` steps: at every ``train.checkpoint_every``-th step, or by time.
        ``minutes_passed``: of rank 0, so that all ranks decide alike."""
        return minutes_passed or (self._every > 0 and step % self._every == 0)

    def save(self, step: int, samples_seen: int, samples_digest: str, tracking_run: str | None) -> None:
        """Starts to write a checkpoint after ``step`` steps, unless there is one."""
        self._saved_at = time.monotonic()
        if self._saved_step == step:
            return
        self.wait()
        tensors = self._engine.gather()
        run_state = checkpoint_format.RunState(
            step=step, samples_seen=samples_seen, samples_digest=samples_digest,
            optimizer_step=self._engine.optimizer_step(), loss_scaler=self._engine.scaler_state(),
            fingerprint=self._fingerprint, tracking_run=tracking_run,
        )  # fmt: skip
        if self._world.is_rank_0:
            self._writer.start(run_state, tensors)
        self._saved_step = step

    def wait(self) -> None:
        """Returns when the started checkpoint is on disk. Raises UserError if writing failed."""
        self._world.on_rank_0(self._writer.wait)

    def resume(self, check: Callable[[dict[str, Any]], None]) -> tuple[int, str]:
        """Loads the newest valid checkpoint into the engine. Returns its step and its digest of samples; 0
        and "" if there is no checkpoint. ``check``: raises UserError if it gets another training's
        fingerprint."""
        loaded: list[checkpoint_format.Checkpoint] = []

        def load() -> str:
            newest = checkpoint_format.load_newest(self.directory)
            if newest is None:
                return ""
            state = newest.run_state
            check(state.fingerprint)
            loaded.append(newest)
            return json.dumps([state.step, state.samples_digest, state.optimizer_step, state.loss_scaler])

        text = self._world.on_rank_0(load)
        if not text:
            return 0, ""
        step, digest, optimizer_step, scaler = json.loads(text)
        self._engine.restore(loaded[0].tensors if loaded else None, optimizer_step)
        self._engine.restore_scaler(scaler)
        self._saved_step = step
        return step, digest

    def newest_as_words(self) -> str:
        """Returns a phrase for an error message of rank 0 that names the newest checkpoint."""
        step = checkpoint_format.newest_step(self.directory) if self._world.is_rank_0 else None
        if step is None:
            return "no checkpoint was written yet"
        return f"the last good checkpoint is {self.directory}/{checkpoint_format.checkpoint_name(step)}"
