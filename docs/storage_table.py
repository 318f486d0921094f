"""Writes the measured part of ``docs/storage.md``, and its picture, from ``docs/storage.json``.

    python tests/benchmarks/bench_storage_formats.py --json docs/storage.json
    python -m docs.storage_table

`tests/benchmarks/test_storage_formats.py` checks that the page is up to date.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from tests.benchmarks.bit_flips import OUTCOMES

FOLDER = Path(__file__).parent
RESULT, PAGE, PICTURE = FOLDER / "storage.json", FOLDER / "storage.md", FOLDER / "storage.png"
MEASURED = re.compile(r"(?<=<!-- measured -->\n\n).*?(?=\n<!-- end of what was measured -->)", re.DOTALL)
COLOURS = {"named": "tab:green", "noticed": "tab:olive", "silent": "tab:red", "unchanged": "lightgray"}
Result = dict[str, Any]


def page(result: Result) -> str:
    """Returns the page with the tables of this result."""
    text, count = MEASURED.subn(lambda _: measured(result), PAGE.read_text())
    if count != 1:
        raise ValueError(f"{PAGE}: {count} parts for what was measured instead of one")
    return text


def measured(result: Result) -> str:
    """Returns the sentence about the machine, and the three tables."""
    known, logits = result["conditions"], result["vocabulary"]
    machine = (
        f"The machine had {known['machine']}. Rates are tokens per second of {known['clock']}. Each is the "
        f"median of {known['rounds']} rounds in which the formats took turns."
    )
    vocabulary = (
        f"For comparison, all {known['vocab_size']:,} logits take {logits['bytes_per_token']:,.0f} bytes per "
        f"token in the compressed tar file in float16 ({logits['samples']} samples, size only)."
    )
    flips = (
        f"{known['flips']} bits of each format were flipped, one at a time, in files of a few samples with "
        "hidden states and top-k:"
    )
    parts = [
        _filled(machine),
        _table(_rates(result)),
        "The same, divided by the numbers of the store of the same outputs:",
        _table(_ratios(result)),
        _filled(vocabulary),
        _filled(flips),
        _table(_flips(result)),
    ]
    return "\n\n".join(parts) + "\n"


def _filled(text: str) -> str:
    """Returns the text in lines as long as those of the other pages."""
    return textwrap.fill(text, 140)


def _table(cells: list[list[str]]) -> str:
    """Returns a Markdown table whose numbers are aligned to the right."""
    lines = [cells[0], ["---"] + ["---:"] * (len(cells[0]) - 1), *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rates(result: Result) -> list[list[str]]:
    head = ["outputs: format", "bytes/token", "write, MB/s", "write, tokens/s", "read in order, tokens/s"]
    cells = [[*head, "read in training order, tokens/s"]]
    for one in result["formats"]:
        keys = ("write_tokens_per_s", "read_tokens_per_s", "shuffled_tokens_per_s")
        rates = [_three_digits(one[key]) for key in keys]
        megabytes = _three_digits(one["write_bytes_per_s"] / 1e6)
        name = f"{one['holds']}: {one['format']}"
        cells.append([name, f"{one['bytes_per_token']:,.0f}", megabytes, *rates])
    return cells


def _three_digits(value: float) -> str:
    """Returns the number rounded to three digits, with commas; more would be noise."""
    return f"{float(f'{value:.3g}'):,.0f}"


def _flips(result: Result) -> list[list[str]]:
    return [["format", *OUTCOMES.values()]] + [
        [one["format"], *(str(one[key]) for key in OUTCOMES)] for one in result["flips"]
    ]


def _ratios(result: Result) -> list[list[str]]:
    """Returns the rows of a table that compares each format with the store of the same outputs."""
    stores = {one["holds"]: one for one in result["formats"] if one["format"] == "store"}
    rows = [["outputs: format", "bytes", "write, tokens/s", "read in training order, tokens/s"]]
    for one in result["formats"]:
        if one["format"] != "store":
            store = stores[one["holds"]]
            keys = ("bytes_per_token", "write_tokens_per_s", "shuffled_tokens_per_s")
            rows.append(
                [f"{one['holds']}: {one['format']}", *(f"{one[key] / store[key]:.2g}" for key in keys)]
            )
    return rows


def draw(result: Result, path: Path) -> None:
    """Draws bytes per token, the rate of reading in training order, and the outcomes of flips as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(9, 6))
    names = [f"{one['holds']}: {one['format']}" for one in result["formats"]]
    colours = ["tab:blue" if one["format"].startswith("store") else "tab:gray" for one in result["formats"]]
    panels = {
        "bytes_per_token": ("bytes per token (fewer is better)", "{:,.0f}".format),
        "shuffled_tokens_per_s": ("tokens/s in training order (more is better)", _three_digits),
    }
    for place, (key, (title, words)) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[0, place])
        values = [one[key] for one in result["formats"]]
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, [words(value) for value in values], padding=3)
        axes.set(xscale="log", title=title, xlim=(min(values) / 3, max(values) * 40))
        axes.invert_yaxis()
        if place:
            axes.set_yticklabels([])
    axes = figure.add_subplot(grid[1, :])
    names, left = [one["format"] for one in result["flips"]], [0] * len(result["flips"])
    for key, title in OUTCOMES.items():
        counts = [one[key] for one in result["flips"]]
        axes.barh(names, counts, left=left, color=COLOURS[key], label=title)
        left = [before + count for before, count in zip(left, counts, strict=True)]
    axes.set_title(f"what {result['conditions']['flips']} flipped bits did, one at a time")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=len(OUTCOMES), frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    result = json.loads(RESULT.read_text())
    PAGE.write_text(page(result))
    draw(result, PICTURE)


if __name__ == "__main__":
    main()
