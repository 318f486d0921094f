"""The phases of a training run.

Each phase reads one store: the first the recipe's own, the others those of ``train.phases``. Step numbers
continue from phase to phase. So a step number alone determines store and samples, and a run that is killed at
any step resumes in the right phase.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from infra.settings.sections import Train
from offline_teacher.store.store import Store
from student_train.data.loss_needs import required_columns
from student_train.data.order import Locations, SampleOrder, run_order
from student_train.data.reading import open_stream, sequence_names
from student_train.data.stream import Step

if TYPE_CHECKING:
    from student_train.engine.world import World


@dataclass(frozen=True)
class Phase:
    """The steps of a run that read one store."""

    store: Store
    order: SampleOrder
    first_step: int
    """The phase's first step, as the run counts."""

    @property
    def end_step(self) -> int:
        """The run's first step after the phase."""
        return self.first_step + self.order.steps

    def locations(self, step: int) -> Locations:
        """Returns the locations of the samples of the run's step ``step``."""
        return self.order.batch(step - self.first_step)

    def sequence_names(self, locations: Locations, count: int) -> list[str]:
        """Returns ``part/row`` of the sequences of the first ``count`` of these samples."""
        return sequence_names(self.store.splits["train"], locations, count)


class Phases:
    """All phases of a run."""

    def __init__(self, stores: Sequence[Store], train: Train) -> None:
        """``stores``: the recipe's own, then one store per entry of ``train.phases``."""
        self._train, self._phases = train, list[Phase]()
        phase_steps = [None, *(entry.steps for entry in train.phases)]  # None: by train.epochs, max_steps
        for store, steps in zip(stores, phase_steps, strict=True):
            order = run_order(store.splits["train"].plan, train, steps)
            self._phases.append(Phase(store, order, first_step=self.steps))  # the steps so far

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return self._phases[-1].end_step if self._phases else 0

    def at(self, step: int) -> Phase:
        """Returns the phase that contains the run's step ``step``."""
        return next(phase for phase in self._phases if step < phase.end_step)

    def samples_before(self, step: int) -> int:
        """Returns the number of samples of all steps before ``step``."""
        return sum(
            min(max(0, step - phase.first_step) * phase.order.batch_size, phase.order.samples)
            for phase in self._phases
        )

    def read(self, world: World, start: int) -> Generator[Step, None, None]:
        """Yields this rank's steps from ``start`` to the end. Close the iterator to end its threads."""
        for phase in self._phases:
            if start >= phase.end_step:
                continue
            columns = required_columns(self._train, phase.store.layout)
            arguments, first = (phase.store, "train", columns, phase.order), max(0, start - phase.first_step)
            with open_stream(*arguments, self._train, world, start=first) as stream:
                for step in stream:
                    yield replace(step, number=step.number + phase.first_step)
