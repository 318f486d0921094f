"""Who is given what, and who is to blame, without any worker."""

from __future__ import annotations

import pytest

from infra.errors import EXIT_INCOMPLETE, UserError
from offline_teacher.cluster.deadlines import (
    ENOUGH,
    FACTOR,
    FIRST_SECONDS,
    LEAST_SECONDS,
    LONGEST_PAUSE,
    Backoff,
    Deadlines,
)
from offline_teacher.cluster.work_queue import (
    ITEM_DEATHS,
    ITEM_DELAYS,
    WORKER_FAILURES,
    Item,
    Worker,
    WorkQueue,
)

ATTEMPTS, BOUND = 3, 26


def queue(*names: str) -> WorkQueue:
    work = WorkQueue(ATTEMPTS, BOUND)
    work.begin([Item(name, "infer", ()) for name in names], lambda item: None)
    return work


def take(work: WorkQueue, worker: Worker, ready: list[Worker], now: float = 0.0) -> Item | None:
    return work.take(worker, ready, now)


def finish(work: WorkQueue, worker: Worker) -> None:
    """The worker does an item that is of no other interest."""
    item = Item("other", "infer", (), holders={worker: 0.0})
    work.left += 1
    assert work.finished(worker, item, 1.0)


def at(*numbers: int) -> list[Worker]:
    """Workers, each at a place of its own."""
    return [Worker(number, None, f"node-{number}") for number in numbers]


def give(work: WorkQueue, worker: Worker, ready: list[Worker]) -> Item:
    item = take(work, worker, ready)
    assert item is not None
    worker.items[object()] = item
    return item


def test_an_item_that_failed_waits_for_another_worker() -> None:
    work, workers = queue("a"), at(0, 1)
    work.failed(workers[0], give(work, workers[0], workers), "ValueError: x")
    workers[0].items.clear()
    assert take(work, workers[0], workers) is None
    assert give(work, workers[1], workers).name == "a"


def test_an_item_that_failed_everywhere_goes_to_any_worker() -> None:
    work, worker = queue("a"), Worker(0, None, "node-0")
    for attempt in range(1, ATTEMPTS + 1):
        item = give(work, worker, [worker])
        work.failed(worker, item, "ValueError: x")
        assert item.attempts == attempt
    assert [item.name for item in work.quarantined] == ["a"]


def test_the_last_attempt_waits_for_a_worker_that_works() -> None:
    """Two workers are broken, the third is at its first item: whatever they fail, it has the last word."""
    work, workers = queue("long", "a"), at(*range(3))
    assert give(work, workers[2], workers).name == "long"
    for broken in workers[:2]:
        work.failed(broken, give(work, broken, workers), "RuntimeError: CUDA error")
        broken.items.clear()
    successor = Worker(3, None, "node-3")
    for other in (*workers, successor):
        assert take(work, other, [*workers, successor]) is None
    workers[2].items.clear()
    finish(work, workers[2])
    assert give(work, workers[2], workers).name == "a"
    assert work.quarantined == []


def test_the_last_attempt_waits_for_nobody_where_nobody_may_turn_out_to_work() -> None:
    work, workers = queue("a"), at(*range(3))
    for worker in workers[:2]:
        work.failed(worker, give(work, worker, workers), "ValueError: NaN")
        worker.items.clear()
    assert give(work, workers[2], workers).name == "a"


def test_idle_workers_take_what_failed_where_those_that_work_have_no_room() -> None:
    work, workers = queue("a"), at(*range(3))
    work.failed(workers[0], give(work, workers[0], workers), "ValueError: x")
    workers[0].items.clear()
    finish(work, workers[1])
    workers[1].items = {object(): Item(name, "infer", ()) for name in "xy"}
    assert take(work, workers[0], workers) is None, "it failed it"
    assert give(work, workers[2], workers).name == "a"


def test_starts_that_die_do_not_end_it_while_others_work() -> None:
    work, good = queue("long"), Worker(0, None, "node-0")
    give(work, good, [good])
    for number in range(1, 3 * BOUND):
        work.lost(Worker(number, None, f"node-{number}"), "no such module", busy=True, died=True)
    with pytest.raises(UserError, match="no such module"):
        for number in range(BOUND + 1):
            work.lost(Worker(number, None, f"node-{number}"), "no such module", busy=False, died=True)


def test_an_item_that_failed_goes_to_a_worker_that_works() -> None:
    """The broken are the first to ask for more."""
    work, workers = queue("a", "b"), at(*range(3))
    finish(work, workers[2])
    work.failed(workers[0], give(work, workers[0], workers), "RuntimeError: CUDA error")
    assert give(work, workers[1], workers).name == "b"
    assert take(work, workers[1], workers) is None
    assert give(work, workers[2], workers).name == "a"


def test_what_failed_goes_to_a_worker_that_has_failed_nothing() -> None:
    work, workers = queue("a", "b"), at(*range(3))
    for worker in workers[:2]:
        work.failed(worker, give(work, worker, workers), "ValueError: x")
        worker.items.clear()
    assert take(work, workers[0], workers) is take(work, workers[1], workers) is None
    assert [give(work, workers[2], workers).name for _ in range(2)] == ["a", "b"]


def test_two_failures_in_a_row_are_the_workers() -> None:
    work, worker = queue("a", "b", "c"), Worker(0, None, "node-0")
    work.failed(worker, give(work, worker, [worker]), "x")
    give(work, worker, [worker])
    finish(work, worker)
    work.failed(worker, give(work, worker, [worker]), "x")
    assert not work.is_broken(worker), "a success lies between"
    work.failed(worker, give(work, worker, [worker]), "x")
    assert work.is_broken(worker)


def test_what_failed_on_another_worker_too_is_not_held_against_this_one() -> None:
    work, first, second = queue("a", "b", "c"), *at(0, 1)
    for _ in range(WORKER_FAILURES + 1):
        work.failed(first, give(work, first, [first]), "ValueError: NaN")
    for _ in range(WORKER_FAILURES + 1):
        work.failed(second, give(work, second, [second]), "ValueError: NaN")
    assert work.is_broken(first)
    assert not work.is_broken(second)


def test_workers_are_not_replaced_for_ever() -> None:
    work = queue(*map(str, range(2 * BOUND + 2)))
    for number in range(BOUND):
        worker = Worker(number, None, f"node-{number}")
        for _ in range(WORKER_FAILURES):
            work.failed(worker, give(work, worker, [worker]), "x")
        assert work.is_broken(worker)
        work.removed(worker)
    last = Worker(BOUND, None, f"node-{BOUND}")
    for _ in range(WORKER_FAILURES):
        work.failed(last, give(work, last, [last]), "x")
    assert not work.is_broken(last)


def test_what_a_replaced_worker_held_is_given_to_others() -> None:
    work, worker = queue("a"), Worker(0, None, "node-0")
    item = give(work, worker, [worker])
    work.removed(worker)
    assert (list(work.todo), item.attempts, item.deaths) == ([item], 0, 0)


def test_a_suspect_is_alone_on_its_next_worker() -> None:
    work, first, second = queue("a", "b"), *at(0, 1)
    give(work, first, [first])
    work.lost(first, "SIGSEGV", busy=True, died=True)
    assert give(work, second, [second]).name == "b"
    assert take(work, second, [second]) is None
    second.items.clear()
    assert give(work, second, [second]).name == "a"
    work.todo.append(Item("c", "infer", ()))
    assert take(work, second, [second]) is None, "it holds the suspect"


def test_an_item_goes_back_to_no_place_that_failed_it_while_there_is_another() -> None:
    """Though the worker there has succeeded since, and the other one has not shown that it works."""
    work, workers = queue("a"), at(0, 1)
    neighbour = Worker(2, None, workers[0].place)
    ready = [*workers, neighbour]
    work.failed(workers[0], give(work, workers[0], ready), "ValueError: x")
    workers[0].items.clear()
    finish(work, workers[0])
    finish(work, neighbour)
    assert take(work, workers[0], ready) is take(work, neighbour, ready) is None
    assert give(work, workers[1], ready).name == "a"


def test_an_item_with_too_many_deaths_is_quarantined_and_told_at_once() -> None:
    told: list[str] = []
    work = WorkQueue(ATTEMPTS, BOUND)
    work.begin([Item("a", "infer", ())], lambda item: told.append(item.reason))
    for number in range(ITEM_DEATHS):
        assert told == []
        worker = Worker(number, None, f"node-{number}")
        give(work, worker, [worker])
        work.lost(worker, "The actor died.\n\x1b[31mkilled by signal 11\x1b[0m\n", busy=False, died=True)
    assert told == [
        f"workers died {ITEM_DEATHS} times with this item,"
        f" the last at node-{ITEM_DEATHS - 1} (killed by signal 11)"
    ]


def kill(work: WorkQueue, workers: int) -> None:
    for number in range(workers):
        worker = Worker(number, None, f"node-{number}")
        give(work, worker, [worker])
        work.lost(worker, "out of memory", busy=False, died=True)


def test_suspects_are_dropped_before_it_gives_up() -> None:
    """Many items kill their workers, the others would be well."""
    work = queue(*map(str, range(BOUND + 2)))
    kill(work, BOUND + 1)
    assert {item.name for item in work.quarantined} == {str(number) for number in range(BOUND + 1)}
    assert [item.name for item in work.todo if not item.ended] == [str(BOUND + 1)]


def test_what_was_lost_before_a_success_is_forgotten() -> None:
    work, good = queue(*map(str, range(1000))), Worker(0, None, "node-0")
    for _ in range(2):
        kill(work, BOUND)
        finish(work, good)
    assert work.quarantined == []
    for _ in range(2):
        kill(work, BOUND + 1)
        finish(work, good)
    assert len(work.quarantined) == 2 * BOUND + 2 * (BOUND + 1)


def test_where_workers_only_die_it_ends_in_one_line_and_the_suspects_are_named() -> None:
    work = queue(*map(str, range(1000)))
    kill(work, BOUND + 1)
    with pytest.raises(
        UserError, match=r"^27 workers failed .* \(the last: node-26: out of memory\)"
    ) as raised:
        kill(work, BOUND + 1)
    assert raised.value.exit_code == EXIT_INCOMPLETE
    assert len(work.quarantined) == 2 * (BOUND + 1)


def test_workers_that_die_before_they_hold_anything_are_nobodys_fault() -> None:
    work = queue("a")
    for number in range(BOUND):
        work.lost(Worker(number, None, f"node-{number}"), "no such module", busy=False, died=True)
    with pytest.raises(UserError, match="workers failed or died .* no such module"):
        work.lost(Worker(BOUND, None, f"node-{BOUND}"), "no such module", busy=False, died=True)
    assert work.quarantined == []


def test_a_late_item_is_given_to_another_place_and_the_first_answer_counts() -> None:
    work, workers = queue("a", "b", "c", "d"), at(0, 1)
    for _ in range(ENOUGH):
        item = give(work, workers[1], workers)
        work.finished(workers[1], item, 10.0)
    workers[1].items.clear()
    late = give(work, workers[0], workers)
    assert list(work.delayed(workers, LEAST_SECONDS)) == []
    assert workers[0].in_time
    assert take(work, workers[1], workers) is None
    assert list(work.delayed(workers, LEAST_SECONDS + 1)) == [(workers[0], late, False)]
    assert not workers[0].in_time
    neighbour = Worker(2, None, workers[0].place, last_succeeded=True)
    for other, why in ((workers[0], "it has it"), (neighbour, "it is at the same place")):
        assert take(work, other, [*workers, neighbour]) is None, why
    assert give(work, workers[1], workers) is late
    assert work.finished(workers[1], late, 70.0)
    workers[1].items.clear()
    assert work.left == 0
    assert list(work.delayed(workers, 71.0)) == [(workers[0], late, True)], "it is replaced"
    assert not work.finished(workers[0], late, 72.0), "its answer comes too late"
    assert work.left == 0


def test_an_item_that_another_worker_holds_in_time_is_not_queued_again() -> None:
    work, workers = queue("a"), at(0, 1)
    late = give(work, workers[0], workers)
    assert list(work.delayed(workers, FIRST_SECONDS + 1)) == [(workers[0], late, False)]
    assert take(work, workers[1], workers, FIRST_SECONDS + 1) is late
    workers[1].items[object()] = late
    work.lost(workers[0], "killed", busy=True, died=True)
    assert list(work.todo) == []
    work.lost(workers[1], "killed", busy=True, died=True)
    assert list(work.todo) == [late]


def test_deadlines_grow_with_the_size_of_an_item_and_with_its_delays() -> None:
    deadlines = Deadlines()
    for _ in range(ENOUGH):
        assert deadlines.limit(1.0, 0) == FIRST_SECONDS
        deadlines.record(200.0, 2.0)
    assert deadlines.limit(1.0, 0) == FACTOR * 100.0
    assert deadlines.limit(3.0, 0) == 3 * FACTOR * 100.0
    assert deadlines.limit(1.0, 2) == 4 * FACTOR * 100.0


def test_a_deadline_is_that_of_the_median_item() -> None:
    deadlines = Deadlines()
    for seconds in (900.0, 50.0, 100.0):
        deadlines.record(seconds, 1.0)
    assert deadlines.limit(1.0, 0) == FACTOR * 100.0


def test_an_item_that_nobody_finishes_in_time_is_quarantined() -> None:
    work, now = queue("a"), 0.0
    for number in range(ITEM_DELAYS):
        worker = Worker(number, None, f"node-{number}")
        item = take(work, worker, [worker], now)
        assert item is not None
        worker.items[object()] = item
        now += FIRST_SECONDS * 2**number + 1
        assert [replace for _, _, replace in work.delayed([worker], now)] == [False]
    assert [item.name for item in work.quarantined] == ["a"]
    assert work.quarantined[0].reason.startswith(f"node-{ITEM_DELAYS - 1}: no answer for ")


def test_a_nodes_fault_counts_against_no_item() -> None:
    work, worker = queue("a"), Worker(0, None, "node-0")
    item = give(work, worker, [worker])
    work.lost(worker, "the disk is full", busy=True, died=False)
    assert (list(work.todo), item.attempts, item.deaths, item.reason) == ([item], 0, 0, "")


def test_pauses_of_a_place_grow_while_nothing_works_there() -> None:
    backoff = Backoff()
    assert backoff.record_failure("node-0", 10.0) == 10.0
    assert backoff.record_failure("node-0", 11.0) == 13.0
    assert backoff.record_failure("node-0", 12.0) == 13.0, "another worker of the same trouble"
    assert backoff.record_failure("node-0", 20.0) == 24.0
    assert backoff.record_failure("node-1", 20.0) == 20.0
    for _ in range(9):
        end = backoff.record_failure("node-0", 1000.0 + 100 * _)
    assert end == 1000.0 + 100 * 8 + LONGEST_PAUSE
    backoff.record_success("node-0")
    assert backoff.record_failure("node-0", 5000.0) == 5000.0
