"""A Ray on virtual time for the pool: workers that start late, fail, hang and die, on nodes that fail."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from offline_teacher.cluster.deadlines import LEAST_SECONDS

MOST_WAITS = 100_000


class Death(Exception):
    """What a dead worker's references raise."""


class Reference:
    """A call of a worker, which ends at ``end`` with ``kind``: ok, fail, node, die or hang."""

    def __init__(self, worker: SimulatedWorker, item: str | None, end: float, kind: str) -> None:
        self.worker, self.item, self.end, self.kind = worker, item, end, kind

    def known(self) -> float:
        return min(self.end, self.worker.death)


class SimulatedWorker:
    """Does one thing after the other; ready ``seconds`` after its making, or dead then."""

    def __init__(self, ray: SimulatedRay, number: int, seconds: float, dies: bool) -> None:
        self.ray, self.number = ray, number
        begins = ray.now + ray.waits_for_room(number)
        self.free = begins + seconds
        self.death = self.free if dies else float("inf")
        ready = Reference(self, None, self.free, "die" if dies else "ok")
        self._ready = ready
        self._ends: list[float] = []
        self.call = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._call))
        self.__ray_ready__ = SimpleNamespace(remote=lambda: Reference(self, None, begins, "ok"))
        self.close = SimpleNamespace(remote=lambda: Reference(self, None, ray.now, "ok"))

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Reference:
        if method == "prepare":
            return self._ready
        (item,) = arguments
        holders = self.ray.held.setdefault(item, {})
        assert self not in holders
        in_time = [other for other, since in holders.items() if self.ray.now - since <= LEAST_SECONDS]
        assert not in_time, f"{item} is held by another worker, which is not late"
        holders[self] = self.ray.now
        seconds, kind = self.ray.work(self.number, item)
        self.free = max(self.free, self.ray.now) + (float("inf") if kind == "hang" else seconds)
        if kind == "die":
            self.death = min(self.death, self.free)
        self._ends = [end for end in self._ends if end > self.ray.now] + [self.free]
        self.ray.most_held = max(self.ray.most_held, len(self._ends))
        return Reference(self, item, self.free, kind)


class SimulatedRay:
    """The module ``ray``, as far as the pool uses it.

    ``start(number)`` -> seconds until a worker is ready, and whether it dies then instead;
    ``work(number, item)`` -> seconds, and ok, fail, node (its node failed), die or hang.
    """

    exceptions = SimpleNamespace(RayError=Death)

    def __init__(
        self, start: Callable[[int], tuple[float, bool]], work: Callable[[int, str], tuple[float, str]]
    ) -> None:
        self.start, self.work = start, work
        self.now, self.started, self.waits = 0.0, 0, 0
        self.most_held = 0  # items that one worker held at once
        self.held: dict[str, dict[SimulatedWorker, float]] = {}
        self.place: Callable[[int], str] = lambda number: f"node-{number}"
        self.head_dies = float("inf")
        self.waits_for_room: Callable[[int], float] = lambda number: 0.0
        """Seconds for which Ray has no room for the actor."""

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
            self.held[reference.item].pop(reference.worker, None)
        if reference.kind == "die" or reference.worker.death < reference.end:
            raise Death("killed")
        place = {"host": self.place(reference.worker.number), "device": "cpu"}
        error = {"fail": "item", "node": "node"}.get(reference.kind)
        if error is None:
            return {"result": {}, **place}
        return {"error": error, "reason": "it failed", "traceback": "", "exit_code": None, **place}

    def connect_to_head(self, address: tuple[str, int], timeout: float) -> Any:
        """In place of socket.create_connection."""
        if self.now >= self.head_dies:
            raise ConnectionRefusedError(111, "Connection refused")
        return SimpleNamespace(close=lambda: None)

    def kill(self, worker: SimulatedWorker) -> None:
        assert self.now < self.head_dies, "without a head, this call does not return"
        worker.death = min(worker.death, self.now)
        for holders in self.held.values():
            holders.pop(worker, None)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def shutdown(self) -> None:
        assert self.now < self.head_dies, "without a head, this call does not return"

    def cluster_resources(self) -> dict[str, float]:
        return {}
