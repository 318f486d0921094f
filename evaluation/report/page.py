"""Writes ``report.html``: the whole report as one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from evaluation.candidates.recipe_rows import TEACHER
from evaluation.report import charts, detail_tables, tables


def to_html(report: Mapping[str, Any]) -> str:
    """Returns the HTML text of ``report.html``; ``report`` is the content of report.json."""
    names = list(report["rows"])
    colours = {name: charts.PALETTE[index % len(charts.PALETTE)] for index, name in enumerate(names)}
    cost_note = escape(detail_tables.cost_note(report))
    sections = [
        _section("Models", _models(report)),
        _section("Score against cost", _score_against_cost(report, colours)),
        _section("Tasks", _scores_by_task(report)),
        *(
            _section(title, f"<p>{escape(explanation)}</p>", _table(header, lines))
            for title, explanation, make_table in tables.DETAILS
            if make_table is not detail_tables.disagreements  # shown as cards below
            for header, lines in [make_table(report)]
            if lines
        ),
        _section("Confusion matrices", _confusion_matrices(report)),
        _section("Where student and teacher differ most", _disagreements(report)),
        _section("Training", _loss_curves(report, colours)),
        _section("Every metric", _table(*tables.metric_rows(report))),
        _section("Latency", _latency_note(report), _table(*tables.latency_rows(report))),
        _section("A million sentences", f"<p>{cost_note}</p>", _table(*detail_tables.costs(report))),
        _section("On devices", _page_link(report), _table(*tables.device_rows(report))),
        _section("For reference: the DistilBERT paper", _table(*tables.paper_rows())),
        _section("Notes", "".join(f"<p>{escape(note)}</p>" for note in report["notes"])),
    ]
    package = files("evaluation.report")
    style, script = (package.joinpath(name).read_text() for name in ("page.css", "page.js"))
    title = escape(report["recipe"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{title}: evaluation</title><style>{style}</style></head>"
        f"<body><h1>{title}</h1><main>{''.join(sections)}</main><script>{script}</script></body></html>\n"
    )


def _section(title: str, *content: str) -> str:
    """Returns a section of the page; "" if its data, the last of ``content``, are empty."""
    if not content[-1]:
        return ""
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def _page_link(report: Mapping[str, Any]) -> str:
    """Returns the link to the page that runs the exported models; "" if that page was not written."""
    if not report.get("page"):
        return ""
    return (
        f'<p><a href="{escape(report["page"])}">These models in a browser</a>. The link needs HTTP: serve '
        "this folder, for example with <code>python -m http.server</code>, and open this report there.</p>"
    )


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], html_columns: Sequence[int] = ()) -> str:
    """Returns a table that can be sorted by its columns; "" if there are no ``lines``.

    Cells are escaped, except in ``html_columns``: numbers, from 0, of the columns that hold HTML.
    """
    if not lines:
        return ""
    titles = "".join(f'<th scope="col"><button>{escape(name) or "&nbsp;"}</button></th>' for name in header)
    rows = ""
    for line in lines:
        cells = (cell if column in html_columns else escape(cell) for column, cell in enumerate(line))
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div>'


def _models(report: Mapping[str, Any]) -> str:
    """Returns the overview table of all models, with the interval of each macro score drawn."""
    header, lines = tables.overview_rows(report)
    intervals = [row["intervals"]["macro"] for row in report["rows"].values()]
    html_lines = []
    for name, score, *other_cells in lines:
        row = report["rows"][name]
        drawing = _interval(row["macro"], row["intervals"]["macro"], intervals)
        html_lines.append([name, score, drawing, *other_cells])
    header = [*header[:2], "95 % interval", *header[2:]]
    return _table(header, html_lines, html_columns=(2,)) + f"<p>{escape(tables.legend(report))}</p>"


def _interval(score: float, interval: Mapping[str, float], scale: Sequence[Mapping[str, float]]) -> str:
    """Returns a drawing of a score with its interval, on an axis that holds all intervals in ``scale``."""
    least, greatest = min(one["low"] for one in scale), max(one["high"] for one in scale)
    values = (score, interval["low"], interval["high"], least, greatest)
    return charts.interval(*(100 * value for value in values))


def _score_against_cost(report: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """Returns two charts: macro score against latency, and against the size of the weights."""
    latency_title = f"median latency, ms (batch size 1, {detail_tables.processor_note(report)})"
    cost_functions = {
        latency_title: lambda row: row["latency"]["p50_ms"],
        "size of the weights in float32, MB": lambda row: row["parameters"] * 4 / 1e6,
    }
    figures = []
    for axis_title, cost_of in cost_functions.items():
        points = []
        for name, row in report["rows"].items():
            interval = row["intervals"]["macro"]
            percents = (100 * value for value in (row["macro"], interval["low"], interval["high"]))
            points.append(charts.Point(name, cost_of(row), *percents))
        figures.append(charts.scatter(points, colours, axis_title))
    note = (
        "Macro score in percent, with 95 % intervals. The dashed line is the Pareto front: no cheaper "
        "model reaches the score of a model on it."
    )
    return f"<p>{note}</p>{charts.legend(colours)}<div class='figures'>{''.join(figures)}</div>"


def _scores_by_task(report: Mapping[str, Any]) -> str:
    """Returns a table with one line per task and model; the intervals of a task are drawn on one scale."""
    lines = []
    rows = report["rows"]
    for task in next(iter(rows.values()))["scores"]:
        intervals = [row["intervals"]["scores"][task] for row in rows.values()]
        for name, row in rows.items():
            score, interval = row["scores"][task]["score"], row["intervals"]["scores"][task]
            ratio = row["retention_by_task"][task]
            retention = "" if ratio is None or name == TEACHER else f"{100 * ratio:.0f} %"
            seed_scores = " ".join(f"{100 * one:.1f}" for one in row["seed_scores"][task].values())
            drawing = _interval(score, interval, intervals)
            lines.append([task, name, tables.score(score, interval), drawing, retention, seed_scores])
    header = ["task", "model", "score", "95 % interval", "retention", "score of each seed"]
    return _table(header, lines, html_columns=(3,))


def _loss_curves(report: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """Returns one chart per loss term, with one curve per student; "" if no student has a history."""
    figures = []
    for term, title in charts.LOSS_TERMS.items():
        points = {student: terms[term] for student, terms in report["curves"].items() if term in terms}
        if points:
            chart = charts.curves(points, colours, title)
            figures.append(f"<figure><figcaption>{title}</figcaption>{chart}</figure>")
    legend = charts.legend({student: colours[student] for student in report["curves"]})
    return f"{legend}<div class='figures'>{''.join(figures)}</div>" if figures else ""


def _confusion_matrices(report: Mapping[str, Any]) -> str:
    """Returns one block per classification task, with the matrices of the teacher and of each student."""
    blocks = []
    for task in next(iter(report["rows"].values()))["scores"]:
        names = [name for name in (TEACHER, *report["students"]) if name in report["details"]]
        matrices = [
            _confusion_matrix(name, list(detail["labels"]), detail["confusion"])
            for name in names
            for detail in [report["details"][name][task]]
            if "confusion" in detail
        ]
        if matrices:
            content = f"<div class='figures'>{''.join(matrices)}</div>"
            blocks.append(f"<details><summary>{escape(task)}</summary>{content}</details>")
    return "".join(blocks)


def _confusion_matrix(name: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Returns ``counts`` [label][predicted] as a table; a cell is shaded by its share of the row."""
    titles = "".join(f"<th>{escape(label)}</th>" for label in labels)
    rows = []
    for label, label_counts in zip(labels, counts, strict=True):
        total = sum(label_counts) or 1
        cells = "".join(
            f'<td style="background:rgba(0,114,178,{0.75 * count / total:.2f})">{count:,}</td>'
            for count in label_counts
        )
        rows.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    table = f'<table class="grid"><tr><th></th>{titles}</tr>{"".join(rows)}</table>'
    caption = f"{escape(name)}: rows are labels, columns are predictions"
    return f'<figure><figcaption>{caption}</figcaption><div class="scroll">{table}</div></figure>'


def _disagreements(report: Mapping[str, Any]) -> str:
    """Returns one block per student and task, with one card per example on which they disagree."""
    blocks = []
    for student, tasks in report["disagreements"].items():
        for task, examples in tasks.items():
            cards = "".join(
                f"<article><p>{escape(one['text'])}</p><dl><dt>label</dt><dd>{escape(one['label'])}</dd>"
                f"<dt>teacher</dt><dd>{escape(one['teacher'])}</dd>"
                f"<dt>{escape(student)}</dt><dd>{escape(one['student'])}</dd></dl></article>"
                for one in examples
            )
            if cards:
                title = f"{escape(student)}: {escape(task)}"
                blocks.append(f"<details><summary>{title}</summary>{cards}</details>")
    return "".join(blocks)


def _latency_note(report: Mapping[str, Any]) -> str:
    setting = report["latency_setting"]
    text = (
        f"{setting['texts']}, {setting['sentences']:,} rows, {detail_tables.processor_note(report)}; "
        "the models take turns, and only the forward pass is timed."
    )
    return f"<p>{escape(text)}</p>"
