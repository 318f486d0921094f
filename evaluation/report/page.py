"""``report.html``: the whole report as one page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from evaluation.recipe_rows import TEACHER
from evaluation.report import charts, detail_tables, tables


def to_html(report: Mapping[str, Any]) -> str:
    """The page of a report's content."""
    names = list(report["rows"])
    colours = {name: charts.PALETTE[place % len(charts.PALETTE)] for place, name in enumerate(names)}
    parts = [
        _section("Models", _models(report)),
        _section("Score against cost", _fronts(report, colours)),
        _section("Tasks", _tasks(report)),
        *(
            _section(title, f"<p>{escape(text)}</p>", _table(header, lines))
            for title, text, make in tables.DETAILS
            if make is not detail_tables.disagreements
            for header, lines in [make(report)]
            if lines
        ),
        _section("Confusion", _confusions(report)),
        _section("Where student and teacher differ most", _disagreements(report)),
        _section("Training", _curves(report, colours)),
        _section("Every metric", _table(*tables.metric_rows(report))),
        _section("Latency", _latency_note(report), _table(*tables.latency_rows(report))),
        _section(
            "A million sentences",
            f"<p>{escape(detail_tables.cost_note(report))}</p>",
            _table(*detail_tables.costs(report)),
        ),
        _section("On devices", _page_link(report), _table(*tables.device_rows(report))),
        _section("For reference: the DistilBERT paper", _table(*tables.paper_rows())),
        _section("Notes", "".join(f"<p>{escape(note)}</p>" for note in report["notes"])),
    ]
    folder = files("evaluation.report")
    style, script = (folder.joinpath(name).read_text() for name in ("page.css", "page.js"))
    title = escape(report["recipe"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{title}: evaluation</title><style>{style}</style></head>"
        f"<body><h1>{title}</h1><main>{''.join(parts)}</main><script>{script}</script></body></html>\n"
    )


def _section(title: str, *content: str) -> str:
    """Empty if the last piece of content is empty."""
    if not content[-1]:
        return ""
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def _page_link(report: Mapping[str, Any]) -> str:
    """A page with models runs only from a host, for example a local one."""
    if not report.get("page"):
        return ""
    return (
        f'<p><a href="{escape(report["page"])}">These models in a browser</a>. Serve this folder, for '
        "example with <code>python -m http.server</code>, and open the link there.</p>"
    )


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], drawn: Sequence[int] = ()) -> str:
    """A table whose columns can be sorted. drawn: numbers of the columns that hold markup already."""
    if not lines:
        return ""
    heads = "".join(f'<th scope="col"><button>{escape(name) or "&nbsp;"}</button></th>' for name in header)
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{cell if place in drawn else escape(cell)}</td>" for place, cell in enumerate(cells))
        + "</tr>"
        for cells in lines
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _models(report: Mapping[str, Any]) -> str:
    header, lines = tables.overview_rows(report)
    rows = report["rows"]
    ends = [end for row in rows.values() for end in row["intervals"]["macro"].values()]
    drawn = []
    for cells in lines:
        row = rows[cells[0]]
        low, high = row["intervals"]["macro"]["low"], row["intervals"]["macro"]["high"]
        picture = charts.interval(*(100 * one for one in (row["macro"], low, high, min(ends), max(ends))))
        drawn.append([cells[0], cells[1], picture, *cells[2:]])
    header = [header[0], header[1], "95 % interval", *header[2:]]
    return _table(header, drawn, drawn=(2,)) + f"<p>{escape(tables.legend(report))}</p>"


def _fronts(report: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    processor = detail_tables.processor_note(report)
    costs = {
        f"median latency, ms (batch size 1, {processor})": lambda row: row["latency"]["p50_ms"],
        "size of the weights in float32, MB": lambda row: row["parameters"] * 4 / 1e6,
    }
    figures = []
    for title, cost in costs.items():
        points = [
            charts.Point(
                name,
                cost(row),
                *(100 * one for one in (row["macro"], *map(row["intervals"]["macro"].get, ("low", "high")))),
            )
            for name, row in report["rows"].items()
        ]
        figures.append(charts.scatter(points, colours, title))
    note = (
        "Macro score in percent, with 95 % intervals. The line joins the models that no cheaper model beats."
    )
    return f"<p>{note}</p>{charts.legend(colours)}<div class='figures'>{''.join(figures)}</div>"


def _tasks(report: Mapping[str, Any]) -> str:
    """One line for each task and model: its interval, drawn on the task's scale, and its share of the
    teacher's score."""
    lines = []
    rows = report["rows"]
    for task in next(iter(rows.values()))["scores"]:
        ends = [end for row in rows.values() for end in row["intervals"]["scores"][task].values()]
        for name, row in rows.items():
            value, found = row["scores"][task]["score"], row["intervals"]["scores"][task]
            scale = (value, found["low"], found["high"], min(ends), max(ends))
            kept = row["retention_by_task"][task]
            seeds = " ".join(f"{100 * one:.1f}" for one in row["seed_scores"][task].values())
            shown = tables.score(value, found)
            share = "" if kept is None or name == TEACHER else f"{100 * kept:.0f} %"
            lines.append([task, name, shown, charts.interval(*(100 * one for one in scale)), share, seeds])
    header = ["task", "model", "score", "95 % interval", "of the teacher's", "seeds"]
    return _table(header, lines, drawn=(3,))


def _curves(report: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    figures = []
    for term, title in charts.LOSS_TERMS.items():
        lines = {name: found[term] for name, found in report["curves"].items() if term in found}
        if lines:
            drawn = charts.curves(lines, colours, title)
            figures.append(f"<figure><figcaption>{title}</figcaption>{drawn}</figure>")
    legend = charts.legend({name: colours[name] for name in report["curves"]})
    return f"{legend}<div class='figures'>{''.join(figures)}</div>" if figures else ""


def _confusions(report: Mapping[str, Any]) -> str:
    """Confusion matrices of the teacher and of each student, by task."""
    parts = []
    for task in next(iter(report["rows"].values()))["scores"]:
        shown = [name for name in (TEACHER, *report["students"]) if name in report["details"]]
        grids = [
            _grid(name, list(found["labels"]), found["confusion"])
            for name in shown
            for found in [report["details"][name][task]]
            if "confusion" in found
        ]
        if grids:
            inside = f"<div class='figures'>{''.join(grids)}</div>"
            parts.append(f"<details><summary>{escape(task)}</summary>{inside}</details>")
    return "".join(parts)


def _grid(name: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    heads = "".join(f"<th>{escape(label)}</th>" for label in labels)
    rows = []
    for label, line in zip(labels, counts, strict=True):
        total = sum(line) or 1
        cells = "".join(
            f'<td style="background:rgba(0,114,178,{0.75 * count / total:.2f})">{count:,}</td>'
            for count in line
        )
        rows.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    table = f'<table class="grid"><tr><th></th>{heads}</tr>{"".join(rows)}</table>'
    caption = f"{escape(name)}: label (row), predicted (column)"
    return f'<figure><figcaption>{caption}</figcaption><div class="wide">{table}</div></figure>'


def _disagreements(report: Mapping[str, Any]) -> str:
    parts = []
    for student, tasks in report["disagreements"].items():
        for task, found in tasks.items():
            cards = "".join(
                f"<article><p>{escape(one['text'])}</p><dl><dt>label</dt><dd>{escape(one['label'])}</dd>"
                f"<dt>teacher</dt><dd>{escape(one['teacher'])}</dd>"
                f"<dt>{escape(student)}</dt><dd>{escape(one['student'])}</dd></dl></article>"
                for one in found
            )
            if cards:
                title = f"{escape(student)}: {escape(task)}"
                parts.append(f"<details><summary>{title}</summary>{cards}</details>")
    return "".join(parts)


def _latency_note(report: Mapping[str, Any]) -> str:
    setting = report["latency_setting"]
    text = (
        f"{setting['texts']}, {setting['sentences']:,} rows, {detail_tables.processor_note(report)}; "
        "the models take turns, and only the forward is timed."
    )
    return f"<p>{escape(text)}</p>"
