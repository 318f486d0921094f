"""The teacher stage: ``python -m offline_teacher.main run --recipe R [section.key=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__" and not __package__:  # run as a file: the repository's root must be on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infra.console import command, duration, table
from infra.errors import EXIT_INCOMPLETE, UserError
from infra.files.paths import expand_home
from infra.settings.recipe import Recipe
from infra.settings.recipe_file import load_recipe

if TYPE_CHECKING:
    from offline_teacher.corpus.partition import Part
    from offline_teacher.running.teacher_pass import Outcome
    from offline_teacher.store.store import Store


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return options.function(options)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line. Options and overrides may come in any order.

    argparse allows this (``parse_intermixed_args``) only in a command's parser, which this class finds.
    """

    commands: dict[str, _Parser] = {}

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        words = sys.argv[1:] if args is None else list(args)
        if words and words[0] in self.commands:
            return self.commands[words[0]].parse_intermixed_args(words[1:], namespace)
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(prog="python -m offline_teacher.main", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    parser.commands = commands.choices

    def add(name: str, function, words: str) -> _Parser:  # type: ignore[no-untyped-def]
        sub = commands.add_parser(name, help=words, description=words)
        sub.set_defaults(function=function)
        return sub

    for sub in (
        add("run", _run, "make the store of a recipe, or its missing tasks"),
        add("plan", _plan, "estimate time, bytes and errors of a store before the pass"),
    ):
        sub.add_argument("--recipe", required=True, type=expand_home, metavar="FILE")
        sub.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    _add_verify_options(add("verify", _verify, "check every digest, range and number of a store"))
    sub = add("inspect", _inspect, "show one sample of a store")
    sub.add_argument("store", type=expand_home)
    sub.add_argument("--split", default="train", help="train or validation (default: %(default)s)")
    sub.add_argument("--sample", type=int, default=0, metavar="N", help="index of the sequence, from 0")
    sub.add_argument("--epoch", type=int, default=0, metavar="E", help="index of the masking epoch, from 0")
    plot = "plot probability kept over k to this file"
    sub.add_argument("--plot", type=expand_home, metavar="PNG", help=plot)
    return parser


def _add_verify_options(sub: _Parser) -> None:
    sub.add_argument("store", type=expand_home)
    deep = "compare stored top-k and logsumexp with the stored hidden states"
    sub.add_argument("--deep", action="store_true", help=deep)
    sub.add_argument(
        "--deep-positions",
        type=partial(_number, all_of_them=", or all"),
        default=512,  # docs/teacher.md says why not all
        metavar="N",
        help="positions of each task that --deep compares, or all (default: %(default)s)",
    )
    rerun = "compute N random tasks again with the teacher, and compare them"
    sub.add_argument("--rerun", type=partial(_number, least=0), default=0, metavar="N", help=rerun)
    sub.add_argument("--repair", action="store_true", help="make damaged files again")
    workers = "number of processes that check tasks (default: one per processor)"
    sub.add_argument("--workers", type=_number, default=os.cpu_count() or 1, metavar="N", help=workers)
    recipe = "recipe for --repair and --rerun (default: the store's own)"
    sub.add_argument("--recipe", type=expand_home, metavar="FILE", help=recipe)
    sub.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")


def _number(text: str, least: int = 1, all_of_them: str = "") -> int:
    """Converts an argument to an integer >= ``least``; ``all``, if allowed, to ``sys.maxsize``."""
    if all_of_them and text == "all":
        return sys.maxsize
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a number of at least {least}{all_of_them}, not {text!r}")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    return run(load_recipe(options.recipe, options.overrides))


def run(recipe: Recipe) -> int:
    """Makes the store of the recipe, or its missing tasks. Returns the exit code."""
    if recipe.corpus is None or recipe.teacher is None:
        missing = "corpus" if recipe.corpus is None else "teacher"
        raise UserError(f"{missing}: is required to make a store; add this section to the recipe")
    recipe.refuse_outputs_in_store()
    from offline_teacher.running import pass_record
    from offline_teacher.running.teacher_pass import parts_of

    parts = parts_of(recipe)
    inputs = pass_record.inputs_digest(recipe, parts)
    if pass_record.is_recorded(recipe, inputs):
        return _nothing_to_do(recipe)
    quarantined = _pass(recipe, parts)
    if not quarantined:
        pass_record.remember(recipe, inputs)
    return EXIT_INCOMPLETE if quarantined else 0


def _pass(recipe: Recipe, parts: dict[str, list[Part]]) -> bool:
    """Makes the store. Returns whether tasks are quarantined."""
    from infra.tracking import run as tracking
    from offline_teacher.cluster.pool import Cluster
    from offline_teacher.inputs.source import find_source, spec_of, tokenising
    from offline_teacher.planning import preflight
    from offline_teacher.running.teacher_pass import is_finished, refuse_common_text, run_pass
    from offline_teacher.store.store import open_store

    begin = time.monotonic()
    source, recipe = find_source(recipe)
    spec, root = spec_of(recipe, source, parts), recipe.store_path
    if is_finished(spec, parts, tokenising(recipe, source)):
        _nothing_to_do(recipe)
        return False
    refuse_common_text(parts)
    preflight.check(recipe, source, parts)
    with tracking.start_run(recipe, "teacher") as record, Cluster(recipe) as cluster:
        record.log_params(recipe.fingerprinted_settings("corpus", "sequences", "masking", "teacher", "store"))
        outcomes = run_pass(recipe, source, spec, parts, cluster, report=record.log_metrics)
        quarantined = any(outcome.quarantined for outcome in outcomes)
        if not quarantined:
            record.log_store(root, open_store(root).digest)
    print(_summary(outcomes))
    size = "" if quarantined else f" ({_size(open_store(root))})"
    print(f"wall time {duration(time.monotonic() - begin)}; the store is {root}{size}")
    return quarantined


def _nothing_to_do(recipe: Recipe) -> int:
    print(f"{recipe.store_path}: complete, nothing to do")
    return 0


def _summary(outcomes: list[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        rate = f"{outcome.new_tokens / outcome.seconds:,.0f}" if outcome.new_tokens else "-"
        time_taken = duration(outcome.seconds) if outcome.new_tokens else "complete"
        rows.append([outcome.split, f"{outcome.samples:,}", f"{outcome.new_tokens:,}", rate, time_taken])
    quarantined = [item for outcome in outcomes for item in outcome.quarantined]
    lines = [f"quarantined: task {item.name}: {item.reason}" for item in quarantined]
    return "\n".join([table(rows, ["split", "samples", "new tokens", "tokens/s", "time"]), *lines])


def _size(store: Store) -> str:
    """Describes the size of a finished store: its tokens, and bytes per token."""
    tokens = sum(split.tokens for split in store.splits.values())
    samples = sum(split.plan.samples for split in store.splits.values())
    return f"{tokens:,} tokens, {store.layout.bytes_per_sample() * samples / tokens:,.0f} bytes per token"


def _plan(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    from offline_teacher.planning.plan import plan

    return plan(recipe)


def _verify(options: argparse.Namespace) -> int:
    from offline_teacher.verification.verify_command import VerifyOptions, absolute, run_verify

    root, deep = absolute(options.store), options.deep_positions if options.deep else 0
    recipe = options.recipe, options.overrides
    return run_verify(VerifyOptions(root, deep, options.rerun, options.workers, *recipe), options.repair)


def _inspect(options: argparse.Namespace) -> int:
    from offline_teacher.verification.sample_view import show

    return show(options.store, options.split, options.epoch, options.sample, options.plot)


def cli() -> NoReturn:
    """The console command: runs ``main``, prints a UserError as one line, and sets the exit code."""
    command(main)


if __name__ == "__main__":
    cli()
