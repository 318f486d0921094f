"""Timing on a busy machine: rounds in which the candidates run in turn, and the median of each candidate."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping


def interleave(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    title: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Returns the median seconds of each function over ``repeats`` rounds, after one warm-up round.

    ``title``: name of the measurement; if given, every round prints a line to stderr. ``clock``: use
    ``time.process_time`` for functions that never wait, so that other processes count less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            begin = clock()
            function()
            seconds[name].append(clock() - begin)
        if title:
            print_round(title, number, repeats, {name: values[-1] for name, values in seconds.items()})
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def print_round(title: str, number: int, repeats: int, seconds: Mapping[str, float]) -> None:
    """Prints the seconds of a round to stderr; round 0 is the warm-up."""
    round_name = f"round {number} of {repeats}" if number else "warm-up"
    times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    print(f"{title}: {round_name}: {times}", file=sys.stderr, flush=True)
