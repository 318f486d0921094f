"""``python -m infra.sizing``: how long a teacher pass takes on many workers that fail, and what it costs.

    python -m infra.sizing --tokens 4e9 --tokens-per-second 1.96e6 --bytes-per-token 1539 --workers 8 64 512

The inputs are measured: ``offline_teacher.main plan`` prints the tokens per second of one worker and the
bytes per token. Instead of the tokens per second, ``--task-seconds 20.2 21.0 ...`` takes the durations of
tasks of an earlier pass. The other options describe the cluster and its store; docs/sizing.md says which
defaults are estimates.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import NoReturn

from infra.console import command, duration, table
from infra.sizing.simulation import TeacherPass, simulate

OPTIONS = {field.name: field for field in fields(TeacherPass) if "help" in field.metadata}
MAY_BE_0 = ("driver_seconds", "start_seconds", "finish_seconds", "replace_seconds")


def main() -> None:
    options = _parser().parse_args()
    teacher_pass = _teacher_pass(options)
    rows = []
    for workers in options.workers:
        timing = simulate(replace(teacher_pass, workers=workers))
        money = f"{timing.seconds / 3600 * workers * options.price:,.0f}" if options.price else "-"
        rate = f"{teacher_pass.tokens / timing.seconds / 1e6:,.1f} M"
        cells = [f"{workers:,}", duration(timing.seconds), rate, f"{timing.efficiency:.0%}"]
        rows.append([*cells, f"{timing.lost_tasks:,}", timing.bottleneck, money])
    print(table(rows, ["workers", "time", "tokens/s", "busy", "lost tasks", "bottleneck", "money"]))
    terabytes = teacher_pass.tokens * teacher_pass.bytes_per_token / 1e12
    monthly = f", {terabytes * options.terabyte_price:,.0f} a month" if options.terabyte_price else ""
    print(f"one teacher: {teacher_pass.tokens_per_second:,.0f} tokens/s; {teacher_pass.tasks:,} tasks")
    print(f"store: {terabytes:,.2f} TB{monthly}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.sizing", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tokens", type=_positive, required=True, help="number of tokens of the corpus")
    add("--masking-epochs", type=_count, default=1, help="number of masking epochs (default: 1)")
    rate = parser.add_mutually_exclusive_group(required=True)
    rate.add_argument("--tokens-per-second", type=_positive, help="speed of one teacher, as plan prints it")
    measured = "measured durations of tasks on one worker"
    rate.add_argument("--task-seconds", type=_positive, nargs="+", help=measured)
    add("--bytes-per-token", type=_positive, required=True, help="bytes per token in the store, from plan")
    workers = [8, 64, 512, 2048]
    add("--workers", type=_count, nargs="+", default=workers, help="numbers of workers, one row each")
    for name, field in OPTIONS.items():
        kind = _count if field.type == "int" else _seconds if name in MAY_BE_0 else _positive
        text = f"{field.metadata['help']} (default: %(default)g)"
        add(f"--{name.replace('_', '-')}", type=kind, default=field.default, help=text)
    add("--price", type=float, default=0.0, help="price of one worker per hour")
    add("--terabyte-price", type=float, default=0.0, help="price of keeping a terabyte for a month")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, not {text}")
    return value


def _seconds(text: str) -> float:
    return 0.0 if float(text) == 0 else _positive(text)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, not {text}")
    return value


def _teacher_pass(options: argparse.Namespace) -> TeacherPass:
    seconds = options.task_seconds or [options.task_tokens / options.tokens_per_second]
    mean = sum(seconds) / len(seconds)
    return TeacherPass(
        tokens=options.tokens * options.masking_epochs,
        tokens_per_second=options.task_tokens / mean,
        bytes_per_token=options.bytes_per_token,
        workers=1,
        relative_durations=tuple(value / mean for value in seconds),
        **{name: getattr(options, name) for name in OPTIONS},
    )


def cli() -> NoReturn:
    command(main)


if __name__ == "__main__":
    cli()
