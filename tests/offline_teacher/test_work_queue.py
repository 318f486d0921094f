"""Who is given what, and who is to blame, without any worker."""

from __future__ import annotations

import pytest

from infra.errors import EXIT_INCOMPLETE, UserError
from offline_teacher.cluster.work_queue import ITEM_DEATHS, WORKER_FAILURES, Item, Worker, WorkQueue

ATTEMPTS, BOUND = 3, 26


def queue(*names: str) -> WorkQueue:
    work = WorkQueue(ATTEMPTS, BOUND)
    work.begin([Item(name, "capture", ()) for name in names], lambda item: None)
    return work


def give(work: WorkQueue, worker: Worker, ready: list[Worker]) -> Item:
    item = work.take(worker, ready)
    assert item is not None
    worker.items[object()] = item
    return item


def test_an_item_that_failed_waits_for_another_worker() -> None:
    work, workers = queue("a"), [Worker(0, None), Worker(1, None)]
    work.failed(workers[0], give(work, workers[0], workers), "ValueError: x")
    workers[0].items.clear()
    assert work.take(workers[0], workers) is None
    assert give(work, workers[1], workers).name == "a"


def test_an_item_that_failed_everywhere_goes_to_any_worker() -> None:
    work, worker = queue("a"), Worker(0, None)
    for attempt in range(1, ATTEMPTS + 1):
        item = give(work, worker, [worker])
        work.failed(worker, item, "ValueError: x")
        assert item.attempts == attempt
    assert [item.name for item in work.quarantined] == ["a"]


def test_the_last_attempt_waits_for_a_worker_that_works() -> None:
    """Two workers are broken, the third is at its first item: whatever they fail, it has the last word."""
    work, workers = queue("long", "a"), [Worker(number, None) for number in range(3)]
    assert give(work, workers[2], workers).name == "long"
    for broken in workers[:2]:
        work.failed(broken, give(work, broken, workers), "RuntimeError: CUDA error")
        broken.items.clear()
    successor = Worker(3, None)
    for other in (*workers, successor):
        assert work.take(other, [*workers, successor]) is None
    workers[2].items.clear()
    work.finished(workers[2])
    assert give(work, workers[2], workers).name == "a"
    assert work.quarantined == []


def test_the_last_attempt_waits_for_nobody_where_nobody_may_turn_out_to_work() -> None:
    work, workers = queue("a"), [Worker(number, None) for number in range(3)]
    for worker in workers[:2]:
        work.failed(worker, give(work, worker, workers), "ValueError: NaN")
        worker.items.clear()
    assert give(work, workers[2], workers).name == "a"


def test_idle_workers_take_what_failed_where_those_that_work_have_no_room() -> None:
    work, workers = queue("a"), [Worker(number, None) for number in range(3)]
    work.failed(workers[0], give(work, workers[0], workers), "ValueError: x")
    workers[0].items.clear()
    work.finished(workers[1])
    workers[1].items = {object(): Item(name, "capture", ()) for name in "xy"}
    assert work.take(workers[0], workers) is None, "it failed it"
    assert give(work, workers[2], workers).name == "a"


def test_starts_that_die_do_not_end_it_while_others_work() -> None:
    work, good = queue("long"), Worker(0, None)
    give(work, good, [good])
    for number in range(1, 3 * BOUND):
        work.died(Worker(number, None), "no such module", busy=True)
    with pytest.raises(UserError, match="no such module"):
        for number in range(BOUND + 1):
            work.died(Worker(number, None), "no such module", busy=False)


def test_an_item_that_failed_goes_to_a_worker_that_works() -> None:
    """The broken are the first to ask for more."""
    work, workers = queue("a", "b"), [Worker(number, None) for number in range(3)]
    work.finished(workers[2])
    work.failed(workers[0], give(work, workers[0], workers), "RuntimeError: CUDA error")
    assert give(work, workers[1], workers).name == "b"
    assert work.take(workers[1], workers) is None
    assert give(work, workers[2], workers).name == "a"


def test_two_failures_in_a_row_are_the_workers() -> None:
    work, worker = queue("a", "b", "c"), Worker(0, None)
    work.failed(worker, give(work, worker, [worker]), "x")
    give(work, worker, [worker])
    work.finished(worker)
    work.failed(worker, give(work, worker, [worker]), "x")
    assert not work.is_broken(worker), "a success lies between"
    work.failed(worker, give(work, worker, [worker]), "x")
    assert work.is_broken(worker)


def test_what_failed_on_another_worker_too_is_not_held_against_this_one() -> None:
    work, first, second = queue("a", "b", "c"), Worker(0, None), Worker(1, None)
    for _ in range(WORKER_FAILURES + 1):
        work.failed(first, give(work, first, [first]), "ValueError: NaN")
    for _ in range(WORKER_FAILURES + 1):
        work.failed(second, give(work, second, [second]), "ValueError: NaN")
    assert work.is_broken(first)
    assert not work.is_broken(second)


def test_workers_are_not_replaced_for_ever() -> None:
    work = queue(*map(str, range(2 * BOUND + 2)))
    for number in range(BOUND):
        worker = Worker(number, None)
        for _ in range(WORKER_FAILURES):
            work.failed(worker, give(work, worker, [worker]), "x")
        assert work.is_broken(worker)
        work.replaced(worker)
    last = Worker(BOUND, None)
    for _ in range(WORKER_FAILURES):
        work.failed(last, give(work, last, [last]), "x")
    assert not work.is_broken(last)


def test_what_a_replaced_worker_held_is_given_to_others() -> None:
    work, worker = queue("a"), Worker(0, None)
    item = give(work, worker, [worker])
    work.replaced(worker)
    assert (list(work.todo), item.attempts, item.deaths) == ([item], 0, 0)


def test_a_suspect_is_alone_on_its_next_worker() -> None:
    work, first, second = queue("a", "b"), Worker(0, None), Worker(1, None)
    give(work, first, [first])
    work.died(first, "SIGSEGV", busy=True)
    assert give(work, second, [second]).name == "b"
    assert work.take(second, [second]) is None
    second.items.clear()
    assert give(work, second, [second]).name == "a"
    assert work.take(second, [second]) is None


def test_an_item_with_too_many_deaths_is_quarantined_and_told_at_once() -> None:
    told: list[str] = []
    work = WorkQueue(ATTEMPTS, BOUND)
    work.begin([Item("a", "capture", ())], lambda item: told.append(item.reason))
    for number in range(ITEM_DEATHS):
        assert told == []
        worker = Worker(number, None)
        give(work, worker, [worker])
        work.died(worker, "The actor died.\n\x1b[31mkilled by signal 11\x1b[0m\n", busy=False)
    assert told == [f"its worker died {ITEM_DEATHS} times (the last: killed by signal 11)"]


def kill(work: WorkQueue, workers: int) -> None:
    for number in range(workers):
        worker = Worker(number, None)
        give(work, worker, [worker])
        work.died(worker, "out of memory", busy=True)


def test_suspects_are_dropped_before_it_gives_up() -> None:
    """Many items kill their workers, the others would be well."""
    work = queue(*map(str, range(BOUND + 2)))
    kill(work, BOUND + 1)
    assert {item.name for item in work.quarantined} == {str(number) for number in range(BOUND + 1)}
    assert [item.name for item in work.todo] == [str(BOUND + 1)]


def test_where_workers_only_die_it_ends_in_one_line_and_the_suspects_are_named() -> None:
    work = queue(*map(str, range(1000)))
    kill(work, BOUND + 1)
    with pytest.raises(UserError, match=r"^27 workers died .* \(the last: out of memory\)") as raised:
        kill(work, BOUND + 1)
    assert raised.value.exit_code == EXIT_INCOMPLETE
    assert len(work.quarantined) == 2 * (BOUND + 1)


def test_workers_that_die_before_they_hold_anything_are_nobodys_fault() -> None:
    work = queue("a")
    for number in range(BOUND):
        work.died(Worker(number, None), "no such module", busy=False)
    with pytest.raises(UserError, match="workers died .* no such module"):
        work.died(Worker(BOUND, None), "no such module", busy=False)
    assert work.quarantined == []
