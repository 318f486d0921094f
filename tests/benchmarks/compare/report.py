"""Writes docs/results.md and its plots from the JSON files of the runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from infra.files import storage
from tests.benchmarks.compare.arms import FILE, train_settings
from tests.benchmarks.compare.curve import MEAN, TEACHER, Point, extrapolation
from tests.benchmarks.compare.pictures import draw_arms, draw_curve

LIVE = "live"
MEASURES = {
    "kl_t1": "KL, T = 1",
    "kl_t2": "KL, T = 2",
    "mlm_loss": "masked-LM loss",
    "agreement": "agreement",
    "cosine": "cosine",
    "relation": "relations",
}
"""Key of a measure on held-out text -> its heading in a table."""
AXES = {
    "kl_t2": "KL at T = 2, nats per token (smaller is better)",
    "relation": "relation loss (smaller is better)",
}
"""Key of a measure that is plotted -> the text at its axis."""
CURVE = "Learning curve"
"""The table whose picture shows scores against tokens."""
COSTS = ("gap from start closed", "minutes", "gain/min", "tokens/s", "peak GB", "bytes/token")
SIZES = {
    "real": "A masked LM of 6 x 384 and its students of three layers, on English novels and Wikipedia:\n"
    "2,097,152 tokens, in steps of 8 sequences of 128 tokens. KL is taken at masked positions, unless the\n"
    "name says otherwise. Fine-tuning had 3 epochs, batches of 32 and learning rate 1e-4.",
    "curve": "Relations and cosine at a learning rate of 1e-3 in steps of 8 sequences of 128 tokens, with\n"
    "more and more tokens of English novels and Wikipedia. The store holds 4.7 million tokens; longer\n"
    "trainings read them again, with the same masks. Every training has its own learning-rate schedule.\n"
    "Fine-tuning had 3 epochs, batches of 32 and learning rate 1e-4.",
    "sweep": "A masked LM of 6 x 384 and its students of three layers, on English novels and Wikipedia:\n"
    "1,048,576 tokens, in steps of 32 sequences of 128 tokens unless the name says otherwise. Fine-tuning\n"
    "had 3 epochs, batches of 32 and learning rate 1e-4.",
    "smoke": "The demo's language and teacher, a few steps: this shows only that the program works.",
}
HEAD = """# Ways of training a student, compared

`make compare` trains one student in many ways (*arms*, listed in
[arms.yaml](../tests/benchmarks/compare/arms.yaml)) and measures each in the same way. Some arms also change
the student. This page is generated from the files in docs/results, one per training run.

A number in brackets is the standard deviation over training seeds; a row without brackets has one seed. An
empty cell has no value yet, or none is possible: a student trained by relations or cosine alone has no
masked-LM head. *Start* is the student before training, with layers of the teacher. *Replay 1* is
DistilBERT's triple loss (KL, masked LM and cosine), from a store with one replayed layer; *live* is the
same loss, with the teacher computed in every step. KL is taken at all positions, unless the introduction of
the size or the name of the row says otherwise. *Masked KL* is the triple loss with KL at masked positions.
*States* is relations and cosine. *Both* is the triple loss plus the relation loss with weight 10. A row
that begins with *batches of 8* changes one setting of *states, 1e-3, batches of 8*. *MASK alone* means that
every masked token is replaced by [MASK]; otherwise 80 % are, 10 % get a random token and 10 % stay. *Batch*
is the number of sequences of a step.

*KL* is the divergence of the student's distribution from the teacher's at temperature T, in nats, as a mean
over all positions. *Agreement* is the share of masked tokens for which student and teacher find the same
token most likely. *Cosine* is the mean cosine of last hidden states. *Relations* is MiniLMv2's loss. All
these are measured on the same held-out text for every row, with 15 % of its tokens masked.

Scores are those of GLUE's dev sets after fine-tuning, times 100: Matthews' correlation (CoLA), the mean of
accuracy and F1 (MRPC), the mean of Pearson's and Spearman's correlation (STS-B). They are medians of
fine-tuning seeds. A model is fine-tuned with the dropout in its configuration: the teacher with 0.1, a
student with 0 unless the name says otherwise. Scores of other pages, whose models were fine-tuned with
other settings, cannot be compared with them. *Mean* is the mean over tasks, and *fine-tuned* the number of
fine-tuning seeds. *Gap from start closed* is 0 % for the same student before training and 100 % for the
teacher.

*Minutes* are of the training steps alone. *Gain/min* is the mean score minus that of the student before
training, divided by the minutes. *Peak GB* is the memory of the process, and *bytes/token* the size of the
store. Minutes and tokens/s depend on the machine and on the other programs that it ran meanwhile, so
compare them only roughly.
"""

Result = dict[str, Any]


def write_report(results: Path) -> Path:
    """Writes the page of all finished runs, and returns its path."""
    sections = [HEAD]
    for size, what in SIZES.items():
        runs = [json.loads(path.read_text()) for path in sorted((results / size).glob("*.json"))]
        tables = _tables(size, _by_arm(runs), results / size)
        if tables:
            sections += [f"## Size `{size}`\n\n{what}\n", *tables]
    path = results.with_suffix(".md")
    storage.publish_bytes(str(path), "\n".join(sections).encode())
    return path


def _by_arm(runs: list[Result]) -> dict[str, list[Result]]:
    arms: dict[str, list[Result]] = {}
    for result in sorted(runs, key=lambda one: one["seed"]):
        arms.setdefault(result["arm"], []).append(result)
    return arms


def _tables(size: str, arms: dict[str, list[Result]], pictures: Path) -> list[str]:
    file, sections = yaml.safe_load(FILE.read_text()), []
    for title in file["sizes"][size]["tables"]:
        names = file["tables"][title]
        present = {name: arms[name] for name in names if name in arms}
        if len(present) > min(len(names) - 1, 2):  # all of a short table, or three rows of a long one
            settings = {name: _settings(file, size, name) for name in present}
            sections.append(f"### {title}\n\n{table(present, settings)}")
            picture = pictures / f"{title.split(',')[0].lower().replace(' ', '-')}.png"
            points = curve_points(present)
            if title == CURVE:
                shown = "scores" if draw_curve(points, picture) else ""
            else:
                shown = draw(present, picture)
            if shown:
                words = f"{title}: {shown}"
                sections.append(f"![{words}](results/{pictures.name}/{picture.name})\n")
            if title == CURVE and (text := extrapolation(points)):
                sections.append(text)
            if LIVE in present and len(present[LIVE]) > 1:
                sections.append(differences(present))
    return sections


def _settings(file: dict[str, Any], size: str, name: str) -> list[str]:
    """Returns the learning rate and batch size of an arm."""
    train = train_settings(file, file["sizes"][size], file["arms"].get(name, {}).get("train", {}))
    return [f"{train['learning_rate']:.0e}".replace("e-0", "e-"), str(train["batch_size"])]


def table(arms: dict[str, list[Result]], settings: dict[str, list[str]]) -> str:
    """Returns a Markdown table with one row per arm. ``settings``: arm -> learning rate and batch size."""
    tasks = _tasks(arms)
    header = [
        "arm",
        "tokens",
        "learning rate",
        "batch",
        *MEASURES.values(),
        *tasks,
        "mean",
        "fine-tuned",
        *COSTS,
    ]
    rows = [header, ["---"] * len(header)]
    starts = {
        _shape(name): _mean([_mean(_scores(run, tasks)) for run in runs])
        for name, runs in arms.items()
        if name != TEACHER and not runs[0]["tokens"]
    }
    teacher = _mean([_mean(_scores(run, tasks)) for run in arms.get(TEACHER, [])])
    for name, runs in arms.items():
        measures = [_cell([run["validation"].get(key) for run in runs], 4) for key in MEASURES]
        scores = [_scores(run, tasks) for run in runs]
        means = [_mean(one) for one in scores]
        start = starts.get(_shape(name))
        minutes = [run["train_seconds"] / 60 if "train_seconds" in run else None for run in runs]
        costs = [
            _cell([_closed(mean, start, teacher) for mean in means] if runs[0]["tokens"] else [], 0),
            _cell(minutes, 1),
            _cell([_gain(mean, start, time) for mean, time in zip(means, minutes, strict=True)], 2),
            _cell([run.get("tokens_per_second") for run in runs], 0),
            _cell([run["peak_bytes"] / 1e9 for run in runs if "peak_bytes" in run], 2),
            _cell([run.get("bytes_per_token") for run in runs][:1], 0),
        ]
        cells = [_cell(column, 1) for column in (*zip(*scores, strict=True), means)] + [_fine_tuned(runs)]
        trained = settings[name] if runs[0]["tokens"] else ["", ""]
        rows.append([name, f"{runs[0]['tokens']:,}", *trained, *measures, *cells, *costs])
    filled = [place for place, column in enumerate(zip(*rows[2:], strict=True)) if any(column)]
    return "\n".join(f"| {' | '.join(row[place] for place in filled)} |" for row in rows) + "\n"


def _shape(name: str) -> str:
    """Returns the settings of an arm's student before training. Equal texts mean equal students."""
    settings = yaml.safe_load(FILE.read_text())["arms"].get(name, {})
    student = {key: value for key, value in settings.get("student", {}).items() if key != "dropout"}
    return json.dumps([student, settings.get("narrow", False)], sort_keys=True)


def _scores(run: Result, tasks: Sequence[str]) -> list[float | None]:
    """Returns for each task the median score over fine-tuning seeds, times 100; None if it was not run."""
    scores = run.get("scores", {})
    return [100 * statistics.median(scores[task]) if task in scores else None for task in tasks]


def _fine_tuned(runs: Sequence[Result]) -> str:
    """Returns the number of fine-tuning seeds of all runs and tasks, or its range; empty without scores."""
    counts = sorted({len(values) for run in runs for values in run.get("scores", {}).values()})
    return " to ".join(str(count) for count in (counts[:1] + counts[1:][-1:]))


def _mean(scores: Sequence[float | None]) -> float | None:
    """Returns the mean; None if a score is missing or there is none."""
    known = [score for score in scores if score is not None]
    return statistics.mean(known) if known and len(known) == len(scores) else None


def _closed(mean: float | None, start: float | None, teacher: float | None) -> float | None:
    """Returns how much of the gap between the untrained student and the teacher is closed, in percent."""
    if mean is None or start is None or teacher is None or teacher <= start:
        return None
    return 100 * (mean - start) / (teacher - start)


def _gain(mean: float | None, start: float | None, minutes: float | None) -> float | None:
    return None if mean is None or start is None or minutes is None else (mean - start) / minutes


def _cell(values: Sequence[float | None], digits: int) -> str:
    """Returns ``mean (standard deviation)``; an empty text if no run has the measure."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ({statistics.stdev(known):.{digits}f})" if len(known) > 1 else ""
    return f"{statistics.mean(known):,.{digits}f}{spread}"


def differences(arms: dict[str, list[Result]]) -> str:
    """Returns a table of the differences between each arm and the live arm with the same seeds. The unit is
    the standard deviation of the live arm over its seeds."""
    live = {run["seed"]: run["validation"] for run in arms[LIVE]}
    rows = [["arm", "seeds", *MEASURES.values()], ["---"] * (2 + len(MEASURES))]
    for name, runs in arms.items():
        pairs = [(run["validation"], live[run["seed"]]) for run in runs if run["seed"] in live]
        if name == LIVE or not pairs:
            continue
        cells = []
        for key in MEASURES:
            spread = statistics.stdev(values[key] for values in live.values())
            cells.append(
                f"{statistics.mean(abs(own[key] - other[key]) for own, other in pairs) / spread:.2f}"
            )
        rows.append([name, str(len(pairs)), *cells])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        "Mean absolute difference from the live arm with the same seed, divided by the standard deviation\n"
        f"of the live arm's own seeds:\n\n{lines}\n"
    )


def draw(arms: dict[str, list[Result]], path: Path) -> str:
    """Plots a measure on held-out text and the mean score of every arm. The measure is KL at T = 2, or the
    relation loss if most arms have no masked-LM head. Returns what is shown; an empty text if neither has
    values of two arms."""
    measured = [runs[0]["validation"] for runs in arms.values() if runs[0]["validation"]]
    with_head = sum("kl_t2" in measures for measures in measured)
    key = "kl_t2" if with_head > len(measured) / 2 else "relation"
    tasks = _tasks(arms)
    values = {
        name: [run["validation"][key] for run in runs if key in run["validation"]]
        for name, runs in arms.items()
    }
    scores = {
        name: [mean for run in runs if (mean := _mean(_scores(run, tasks))) is not None]
        for name, runs in arms.items()
    }
    panels = [(AXES[key], values), ("mean score (larger is better)", scores)]
    return " and ".join(draw_arms(list(arms), panels, path))


def _tasks(arms: dict[str, list[Result]]) -> list[str]:
    return sorted({task for runs in arms.values() for run in runs for task in run.get("scores", {})})


def curve_points(arms: dict[str, list[Result]]) -> dict[str, Point]:
    """Returns arm -> point of the learning curve (the first training seed), for arms with all scores."""
    tasks = _tasks(arms)
    points = {}
    for name, runs in arms.items():
        scores = _scores(runs[0], tasks)
        known = {task: score for task, score in zip(tasks, scores, strict=True) if score is not None}
        if known and len(known) == len(tasks):
            known[MEAN] = statistics.mean(known.values())
            points[name] = Point(runs[0]["tokens"], known)
    return points
