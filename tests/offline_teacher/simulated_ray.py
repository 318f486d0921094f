"""A Ray on virtual time for the pool: workers that start late, fail, hang over long items and die."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

MOST_WAITS = 100_000


class Death(Exception):
    """What a dead worker's references raise."""


class Reference:
    """A call of a worker, which ends at ``end`` with ``kind``: ok, fail or die."""

    def __init__(self, worker: SimulatedWorker, item: str | None, end: float, kind: str) -> None:
        self.worker, self.item, self.end, self.kind = worker, item, end, kind

    def known(self) -> float:
        return min(self.end, self.worker.death)


class SimulatedWorker:
    """Does one thing after the other; ready ``seconds`` after its making, or dead then."""

    def __init__(self, ray: SimulatedRay, number: int, seconds: float, dies: bool) -> None:
        self.ray, self.number = ray, number
        self.free = ray.now + seconds
        self.death = self.free if dies else float("inf")
        ready = Reference(self, None, self.free, "die" if dies else "ok")
        self.__ray_ready__ = SimpleNamespace(remote=lambda: ready)
        self.call = SimpleNamespace(remote=self._call)
        self.close = SimpleNamespace(remote=lambda: Reference(self, None, ray.now, "ok"))

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Reference:
        (item,) = arguments
        assert self.ray.held.setdefault(item, self) is self, f"{item} is held by two workers"
        seconds, kind = self.ray.work(self.number, item)
        self.free = max(self.free, self.ray.now) + seconds
        if kind == "die":
            self.death = min(self.death, self.free)
        return Reference(self, item, self.free, kind)


class SimulatedRay:
    """The module ``ray``, as far as the pool uses it.

    ``start(number)`` -> seconds until a worker is ready, and whether it dies then instead;
    ``work(number, item)`` -> seconds, and ok, fail or die.
    """

    exceptions = SimpleNamespace(RayError=Death)

    def __init__(
        self, start: Callable[[int], tuple[float, bool]], work: Callable[[int, str], tuple[float, str]]
    ) -> None:
        self.start, self.work = start, work
        self.now, self.started, self.waits = 0.0, 0, 0
        self.held: dict[str, SimulatedWorker] = {}

    def remote(self, kind: type) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._make))

    def _make(self, *arguments: Any) -> SimulatedWorker:
        self.started += 1
        return SimulatedWorker(self, self.started - 1, *self.start(self.started - 1))

    def wait(
        self, references: list[Reference], num_returns: int, timeout: float
    ) -> tuple[list[Reference], list]:
        assert references, "waits for nothing"
        self.waits += 1
        assert self.waits < MOST_WAITS, "goes on for ever"
        ended = [one for one in references if one.known() <= self.now]
        if not ended and timeout:
            self.now = min(self.now + timeout, min(one.known() for one in references))
            ended = [one for one in references if one.known() <= self.now][:num_returns]
        return ended, []

    def get(self, reference: Reference) -> Any:
        if reference.item is not None:
            self.held.pop(reference.item, None)
        if reference.kind == "die" or reference.worker.death < reference.end:
            raise Death("killed")
        return {"failure": "RuntimeError: x"} if reference.kind == "fail" else {}

    def kill(self, worker: SimulatedWorker) -> None:
        worker.death = min(worker.death, self.now)
        self.held = {item: holder for item, holder in self.held.items() if holder is not worker}

    def shutdown(self) -> None:
        pass

    def cluster_resources(self) -> dict[str, float]:
        return {}
