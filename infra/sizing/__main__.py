"""``python -m infra.sizing``: how long a teacher pass takes on many workers that fail, and what it costs.

    python -m infra.sizing --tokens 4e9 --tokens-per-second 1.96e6 --bytes-per-token 1539 --workers 8 64 512

Measured figures go in: tokens a second of one worker and bytes a token, from ``offline_teacher.main plan``;
or, instead of the rate, the seconds that tasks took in a pass (``--task-seconds 20.2 21.0 ...``). The other
options are what is known of the cluster and its store; docs/sizing.md says which defaults are estimates.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import NoReturn

from infra.console import command, duration, table
from infra.sizing.simulation import Pass, simulate

OPTIONS = {
    "task_tokens": "of a task: store.task_sequences times sequences.length",
    "in_flight": "tasks on one worker",
    "host_bytes_per_second": "that one worker's host checks and writes",
    "uploads": "files that one worker uploads at once",
    "upload_bytes_per_second": "of one of them",
    "store_bytes_per_second": "that the store takes from all workers",
    "store_requests_per_second": "that the store takes under one prefix",
    "prefixes": "into which the store has split its keys",
    "driver_seconds": "of the driver for one task",
    "start_seconds": "until workers compute",
    "finish_seconds": "from the last task to the manifest",
    "mtbf_hours": "between losses of one worker",
    "replace_seconds": "until another worker is in its place",
}
"""Fields of `Pass` that are options of the same name."""
MAY_BE_0 = ("driver_seconds", "start_seconds", "finish_seconds", "replace_seconds")


def main() -> None:
    options = _parser().parse_args()
    job = _job(options)
    rows = []
    for workers in options.workers:
        found = simulate(replace(job, workers=workers))
        money = f"{found.seconds / 3600 * workers * options.price:,.0f}" if options.price else "-"
        rate = f"{job.tokens / found.seconds / 1e6:,.1f} M"
        cells = [f"{workers:,}", duration(found.seconds), rate, f"{found.efficiency:.0%}"]
        rows.append([*cells, f"{found.lost_tasks:,}", found.bottleneck, money])
    print(table(rows, ["workers", "time", "tokens/s", "busy", "lost tasks", "bottleneck", "money"]))
    terabytes = job.tokens * job.bytes_per_token / 1e12
    kept = f", {terabytes * options.terabyte_price:,.0f} a month" if options.terabyte_price else ""
    print(f"one teacher: {job.tokens_per_second:,.0f} tokens/s; {job.tasks:,} tasks")
    print(f"store: {terabytes:,.2f} TB{kept}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.sizing", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tokens", type=_positive, required=True, help="of the corpus")
    add("--masking-epochs", type=_count, default=1)
    rate = parser.add_mutually_exclusive_group(required=True)
    rate.add_argument("--tokens-per-second", type=_positive, help="of one teacher, from plan")
    rate.add_argument("--task-seconds", type=_positive, nargs="+", help="measured, of one worker")
    add("--bytes-per-token", type=_positive, required=True, help="from plan")
    add("--workers", type=_count, nargs="+", default=[8, 64, 512, 2048])
    for field in fields(Pass):
        if field.name in OPTIONS:
            kind = _count if field.type == "int" else _seconds if field.name in MAY_BE_0 else _positive
            text = f"{OPTIONS[field.name]} (default: %(default)g)"
            add(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=text)
    add("--price", type=float, default=0.0, help="of one worker an hour")
    add("--terabyte-price", type=float, default=0.0, help="of keeping a terabyte for a month")
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


def _job(options: argparse.Namespace) -> Pass:
    seconds = options.task_seconds or [options.task_tokens / options.tokens_per_second]
    mean = sum(seconds) / len(seconds)
    return Pass(
        tokens=options.tokens * options.masking_epochs,
        tokens_per_second=options.task_tokens / mean,
        bytes_per_token=options.bytes_per_token,
        workers=1,
        spread=tuple(one / mean for one in seconds),
        **{name: getattr(options, name) for name in OPTIONS},
    )


def cli() -> NoReturn:
    """The command: ``main`` with its mistakes in one line and its exit codes."""
    command(main)


if __name__ == "__main__":
    cli()
