"""Timing on a machine that others use too: candidates in turn, again and again, and the median of each."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping


def interleave(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    told: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each function over ``repeats`` rounds; one round more, first, is not counted.

    ``clock``: ``time.process_time`` for what waits for nothing, so that other processes count less.
    With ``told``, which names what is measured, every round is a line on stderr.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            begin = clock()
            function()
            seconds[name].append(clock() - begin)
        if told:
            say_round(told, number, repeats, {name: values[-1] for name, values in seconds.items()})
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def say_round(told: str, number: int, repeats: int, seconds: Mapping[str, float]) -> None:
    """Progress: round 0 is the warm-up."""
    which = f"round {number} of {repeats}" if number else "warm-up"
    spent = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    print(f"{told}: {which}: {spent}", file=sys.stderr, flush=True)
