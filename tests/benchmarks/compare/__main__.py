"""``make compare``: trains a student in every way that ``arms.yaml`` lists, and measures all of them alike.

    python -m tests.benchmarks.compare --size smoke                  # a few steps per arm
    python -m tests.benchmarks.compare --size sweep --data ../shared # half an hour per arm, on one core
    python -m tests.benchmarks.compare --size real --data ../shared  # 40 hours of one core
    python -m tests.benchmarks.compare --size curve --data ../shared # 1 to 16 M tokens
    python -m tests.benchmarks.compare --size real --arms "relations" "both" --seeds 1
    python -m tests.benchmarks.compare --report                      # docs/results.md from the files alone

A finished run writes one small JSON file, docs/results/SIZE/ARM-SEED.json. The same command continues where
it was stopped: a partly trained student continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from infra.demo.inputs import write_inputs
from infra.files import storage
from infra.files.locks import exclusive
from tests.benchmarks.compare.arms import CHARACTERS_PER_TOKEN, Plan, cut_text
from tests.benchmarks.compare.report import SIZES, write_report
from tests.benchmarks.compare.runs import ROOT, Runs

RESULTS = ROOT / "docs" / "results"
HELD_OUT_CHARACTERS = 240_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="smoke")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared",
        help="has teacher/ and data/ (not needed by smoke)",
    )
    parser.add_argument(
        "--directory", type=Path, default=ROOT / "runs" / "compare", help="stores and students"
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="run only these arms, in this order")
    parser.add_argument("--seeds", type=int, help="largest number of seeds per arm")
    parser.add_argument("--fine-tuning-seeds", type=int, help="how many (default: as the size says)")
    parser.add_argument("--no-scores", action="store_true", help="train and measure; fine-tune later")
    parser.add_argument("--report", action="store_true", help="write docs/results.md, and run nothing")
    options = parser.parse_args()
    if not options.report:
        runs = prepare(options)
        names = options.arms or runs.plan.needed
        unknown = [name for name in names if name not in runs.plan.arms]
        if unknown:
            parser.error(f"no arm is called {unknown[0]!r}; there are: {', '.join(runs.plan.arms)}")
        with exclusive(str(options.directory)):
            run_all(runs, names, options.seeds, scored=not options.no_scores)
    print(write_report(RESULTS))
    return 0


def prepare(options: argparse.Namespace) -> Runs:
    """Prepares text, teacher and tasks for the size; files that exist unchanged are not written again."""
    directory = options.directory / options.size
    text = {split: directory / f"{split}.txt" for split in ("train", "validation")}
    if options.size == "smoke":
        write_inputs(directory / "input")
        text = {split: directory / "input" / "corpus" / f"{split}.txt" for split in text}
        teacher, tasks = directory / "input" / "teacher", directory / "input" / "glue"
    else:
        teacher, tasks = options.data / "teacher", options.data / "data" / "glue"
    plan = Plan(options.size, text, teacher, directory)
    if options.size != "smoke":
        publish_text(plan, options.data / "data")
    return Runs(plan, RESULTS / options.size, tasks, options.fine_tuning_seeds)


def publish_text(plan: Plan, data: Path) -> None:
    """Writes the beginning of every novel and of every file of Wikipedia, in the shares of the size."""
    folders = {"novels": data / "corpus", "wikipedia": data / "wikipedia"}
    for split, characters in (
        ("train", plan.tokens * CHARACTERS_PER_TOKEN),
        ("validation", HELD_OUT_CHARACTERS),
    ):
        lines = [
            line
            for name, share in plan.size["text"].items()
            for line in cut_text(sorted((folders[name] / split).glob("*.txt*")), int(characters * share))
        ]
        storage.publish_if_changed(str(plan.text[split]), ("\n".join(lines) + "\n").encode())


def run_all(runs: Runs, names: list[str], max_seeds: int | None, scored: bool) -> None:
    """Trains and measures all arms, one seed after the other, and then fine-tunes the students. So every arm
    has one result before any arm has two."""
    todo = [
        (arm, seed)
        for seed in range(max(runs.plan.arms[name].seeds for name in names))
        for arm in (runs.plan.arms[name] for name in names)
        if seed < min(arm.seeds, max_seeds or arm.seeds)
    ]
    for step in [runs.train] + [runs.score] * scored:
        for number, (arm, seed) in enumerate(todo, 1):
            result = step(arm, seed)
            values = format_values(result)
            print(f"{step.__name__} {number}/{len(todo)}  {arm.name}, seed {seed}: {values}", flush=True)


def format_values(result: dict) -> str:
    """Returns the held-out measures and mean task scores of a run as one line."""
    scores = {task: sum(values) / len(values) for task, values in result.get("scores", {}).items()}
    return "  ".join(f"{name} {value:.4f}" for name, value in {**result["validation"], **scores}.items())


if __name__ == "__main__":
    sys.exit(main())
