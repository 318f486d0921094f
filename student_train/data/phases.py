"""The stores that a run reads one after the other: the recipe's own, then those of ``train.phases``.

Steps are counted through all phases. So the number of a step alone tells its store and its samples, and a run
that is killed at any step resumes in the right phase.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from infra.settings.sections import Train
from offline_teacher.store.reader import Store
from student_train.data.order import Places, SampleOrder, run_order
from student_train.data.reading import open_stream, sequence_names
from student_train.data.stream import Step
from student_train.objectives.needs import columns_needed

if TYPE_CHECKING:
    from student_train.engine.world import World


@dataclass(frozen=True)
class Phase:
    """The part of a run that reads one store."""

    store: Store
    order: SampleOrder
    first: int
    """The step of the run with which it begins."""

    @property
    def stop(self) -> int:
        """The step of the run before which it ends."""
        return self.first + self.order.steps

    def places(self, step: int) -> Places:
        """The samples of a step of the run."""
        return self.order.batch(step - self.first)

    def names(self, places: Places, count: int) -> list[str]:
        """``part/row`` of the first ``count`` samples."""
        return sequence_names(self.store.splits["train"], places, count)


class Phases:
    """All phases of a run."""

    def __init__(self, stores: Sequence[Store], train: Train) -> None:
        """``stores``: the recipe's own, then one for each of ``train.phases``."""
        self._train, self._all = train, list[Phase]()
        lengths = [None, *(phase.steps for phase in train.phases)]
        for store, steps in zip(stores, lengths, strict=True):
            order = run_order(store.splits["train"].plan, train, steps)
            self._all.append(Phase(store, order, self.steps))

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self._all[-1].stop if self._all else 0

    def at(self, step: int) -> Phase:
        """The phase of a step of the run."""
        return next(phase for phase in self._all if step < phase.stop)

    def samples_before(self, step: int) -> int:
        """Samples of all steps before this one."""
        return sum(
            min(max(0, step - phase.first) * phase.order.batch_size, phase.order.samples)
            for phase in self._all
        )

    def read(self, world: World, start: int) -> Generator[Step, None, None]:
        """This rank's steps from ``start`` to the end. Close the iterator to end its threads."""
        for phase in self._all:
            if start >= phase.stop:
                continue
            columns = columns_needed(self._train, phase.store.layout)
            at = max(0, start - phase.first)
            with open_stream(
                phase.store, "train", columns, phase.order, self._train, world, start=at
            ) as stream:
                for step in stream:
                    yield replace(step, step=step.step + phase.first)
