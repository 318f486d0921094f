"""Measures the browser page: bytes, scores, load time, and latency relative to Python.

    python -m tests.benchmarks.bench_web --model DIR --data DIR [--vocabulary 11500] [--windows 40]

``--model`` is a model fine-tuned on SQuAD; ``--data`` has SQuAD/train-v1.1.json and dev-v1.1.json. Needs
Node, Chromium and the npm registry. The page and ONNX Runtime in Python compute the same windows, one at a
time with one thread. Python runs before and after the page, so that other load affects both.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
import time
from typing import Any

import numpy as np

from evaluation.candidates.models import load_tokenizer
from evaluation.devices.export_files import FLOAT32, INT8
from evaluation.devices.onnx_model import open_session
from evaluation.kinds.predictions import Answers, score_split
from evaluation.main import main as evaluate
from evaluation.sources.catalogue import find_task
from evaluation.tasks import answer_spans
from evaluation.tasks.answer_spans import read_questions
from evaluation.web.golden import run_rows
from infra import console
from tests.evaluation.web.browser import page_tests, served, visit


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--vocabulary", type=int, default=11_500)
    parser.add_argument("--windows", type=int, default=40, help="questions whose windows are timed")
    options = parser.parse_args()
    questions = read_questions(os.path.join(options.data, "SQuAD", "dev-v1.1.json"))
    with tempfile.TemporaryDirectory() as work:
        print(console.table(score_rows(options, questions, work), ("file", "MB", "exact match", "F1")))
        site = os.path.join(work, "site")
        command = ["export", "--web", "--model", options.model, "--task", "SQuAD", "--output", site]
        assert evaluate(command) == 0
        print(console.table(byte_rows(site), ("transferred once", "bytes")))
        print(console.table(time_rows(options, questions[: options.windows], site, work), ("what", "value")))


def score_rows(
    options: argparse.Namespace, questions: list[answer_spans.Question], work: str
) -> list[list[Any]]:
    """Returns one row per exported file with its size and scores; windows are computed one at a time."""
    base = ["export", "--model", options.model, "--task", "SQuAD", "--data", options.data]
    fewer = ["--vocabulary", str(options.vocabulary)]
    exports = {
        "": [],
        "4-bit word embeddings": ["--embedding-bits", "4"],
        f"{options.vocabulary:,} tokens": fewer,
        f"{options.vocabulary:,} tokens, 4-bit": [*fewer, "--embedding-bits", "4"],
    }
    rows = []
    for name, extra in exports.items():
        output = os.path.join(work, name or "plain")
        assert evaluate([*base, *extra, "--output", output]) == 0
        for file in (INT8,) if name else (FLOAT32, INT8):
            path = os.path.join(output, file)
            scores = span_scores(path, output, options.model, questions)
            size = f"{os.path.getsize(path) / 1e6:.2f}"
            rows.append(
                [f"{file} {name}", size, *(f"{100 * scores[key]:.2f}" for key in ("exact_match", "f1"))]
            )
    return rows


def span_scores(
    path: str, output: str, model: str, questions: list[answer_spans.Question]
) -> dict[str, float]:
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer(model)
    tokenizer._tokenizer = Tokenizer.from_file(os.path.join(output, "tokenizer.json"))  # of a trimmed model
    tokenizer.backend_tokenizer.encode_special_tokens = True
    windows = answer_spans.encode(tokenizer, questions, 384)
    outputs = run_rows(open_session(path), windows.encoded.input_ids, windows.encoded.token_type_ids)
    logits = [np.stack([row["start_logits"], row["end_logits"]]) for row in outputs]
    answers = answer_spans.best_answers(windows, logits, questions)
    return score_split(find_task("SQuAD"), Answers([item.answers for item in questions], answers))


def byte_rows(site: str) -> list[list[Any]]:
    """Returns one row per file of the page with its bytes, uncompressed and in gzip."""
    rows = []
    for folder, _, names in os.walk(site):
        for name in sorted(names):
            with open(os.path.join(folder, name), "rb") as file:
                data = file.read()
            place = os.path.relpath(os.path.join(folder, name), site)
            rows.append([place, f"{len(data):,} ({len(gzip.compress(data)):,} in gzip)"])
    return rows


def time_rows(
    options: argparse.Namespace, questions: list[answer_spans.Question], site: str, work: str
) -> list[list[Any]]:
    with open(os.path.join(site, "site.json")) as file:
        graph = os.path.join(site, json.load(file)["tasks"][0]["models"][0]["graph"]["path"])
    asked = os.path.join(work, "questions.json")
    with open(asked, "w") as file:
        json.dump([[item.question, item.context] for item in questions], file)
    before = native(graph, options.model, questions)
    tests = page_tests()
    with served(site) as address:
        cold = [visit(tests, address, "first") for _ in range(3)]
        page = visit(tests, address, "latency", asked)["milliseconds"]
    after = native(graph, options.model, questions)
    python, browser = float(np.median([*before, *after])), float(np.median(page))
    middle = sorted(cold, key=lambda one: one["total"])[1]
    return [
        ["first answer of a first visit, ms, median of 3", f"{middle['total']:.0f}"],
        ["of these until the model is loaded", f"{middle['loaded']:.0f}"],
        ["requests of the first visit, to other hosts", f"{middle['requests']}, {len(middle['foreign'])}"],
        [f"a window in Python, ms, p50 of {len(before) + len(after)}", f"{python:.1f}"],
        [f"a window in the page, ms, p50 of {len(page)}", f"{browser:.1f}"],
        ["page / Python", f"{browser / python:.2f}"],
    ]


def native(graph: str, model: str, questions: list[answer_spans.Question]) -> list[float]:
    """Returns the milliseconds of each window in ONNX Runtime from Python."""
    session = open_session(graph)
    encoded = answer_spans.encode(load_tokenizer(model), questions, 384).encoded
    times = []
    for ids, types in zip(encoded.input_ids, encoded.token_type_ids, strict=True):
        start = time.perf_counter()
        run_rows(session, [ids], [types])
        times.append(1000 * (time.perf_counter() - start))
    return times


if __name__ == "__main__":
    main()
