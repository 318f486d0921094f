"""Tracked runs in MLflow: one parent run per recipe, with nested runs for its stages and its students.

Every record is written to a journal and sent by a background thread, so a training step never waits. If the
server or database does not answer, a stage loses some seconds at its start and end and prints one line. The
next start of any stage of the recipe sends the remaining records. Only rank 0 logs. A failure of tracking
never raises an error in a stage. ``mlflow_sender`` calls MLflow, ``tracked_runs`` has the runs' parameters,
and ``evaluation/report/tracked.py`` the numbers of a report.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from infra.files import storage
from infra.redaction import flatten, redact, short_message
from infra.tracking.journal import Entry, Journal
from infra.tracking.mlflow_sender import MAX_POINTS, RunSender
from infra.tracking.system import sampler
from infra.tracking.tracked_runs import TrackedRun, tracked_run, tracked_runs

if TYPE_CHECKING:
    from infra.settings.recipe import Recipe

_START_SECONDS = 5.0
"""Seconds to wait at the start for the server's first answer, after which ``run_id`` is known."""
_REACHABLE_SECONDS, _UNREACHABLE_SECONDS = 120.0, 10.0
"""Seconds that a run waits at its end while no record is accepted. The first time holds for a file and for a
server that has answered, the second for a server that has not."""
_RETRY_SECONDS = 15.0
"""Seconds after a failure before records are sent again."""
_SYSTEM_SECONDS = 10.0
"""Seconds between two samples of the machine's load."""


class Run:
    """A tracked run. An object of this class itself records nothing. It is used by every rank except rank 0,
    and by rank 0 too if ``tracking.enabled`` is false."""

    _stage = ""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None if nothing is tracked or the server has not answered yet."""
        return None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs each parameter once. If a resumed run has another value, it becomes the tag
        ``resumed.<name>``."""
        self._record({"params": flatten(params)})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds one point to each metric; a point at or before the metric's last recorded step is ignored."""
        values = {name: float(value) for name, value in metrics.items()}
        self._record({"metrics": values, "step": step, "time": _milliseconds()})

    def log_artifact(self, path: str, folder: str | None = None) -> None:
        """Uploads a local file or directory in the background, with its content at that time."""
        self._record({"artifact": _absolute(path), "folder": folder}, at_once=True)

    def log_store(self, store_dir: str, digest: str) -> None:
        """Logs the store as a dataset of the run; ``digest`` is the manifest's digest."""
        contexts = {"teacher": "produced", "student": "training"}
        self.log_dataset("store", store_dir, digest, contexts.get(self._stage, "evaluation"))

    def log_dataset(self, name: str, source: str, digest: str, context: str = "evaluation") -> None:
        """Logs data that the run read. ``source``: a directory, URL or hub name; ``digest``: the digest of
        the content."""
        location = redact(_absolute(source) if os.path.exists(source) else source)
        self._record({"dataset": name, "source": location, "digest": digest, "context": context})

    def log_child(self, name: str, metrics: Mapping[str, float], step: int, tags: Mapping[str, str]) -> None:
        """Adds one point per metric to the run ``name`` nested in this run, for example a model on a task.
        ``step``: the random seed of the fine-tuning."""
        entry = {"child": name, "values": dict(metrics), "step": step, "tags": dict(tags)}
        self._record({**entry, "time": _milliseconds()}, at_once=True)

    def log_headline(self, metrics: Mapping[str, float], note: str) -> None:
        """Writes to the recipe's parent run the metrics by which recipes are compared, and a description.
        ``note``: the description in Markdown. A link in it that begins with ``ARTIFACTS_PLACEHOLDER`` leads
        to an artifact of this run."""
        self._record({"headline": dict(metrics), "note": redact(note), "time": _milliseconds()})

    def register_model(
        self,
        model_dir: str,
        name: str,
        *,
        alias: str | None = None,
        tags: Mapping[str, str] | None = None,
        score: str | None = None,
        scores: Mapping[str, float] | None = None,
        note: str | None = None,
    ) -> None:
        """Registers a model directory as a version of ``name`` that MLflow can load.

        A version with the same weights is updated instead. ``scores`` become metrics of the version's
        LoggedModel, and ``note`` its description. The version gets the ``alias``. But if ``score`` names a
        tag with a number, the version that has the alias now keeps it if its number is higher, or if the
        tags ``tasks`` of the two versions differ.
        """
        clean = {key: redact(str(value)) for key, value in (tags or {}).items()}
        entry = {"model": os.path.abspath(model_dir), "name": name, "alias": alias, "tags": clean}
        self._record({**entry, "score": score, "scores": dict(scores or {}), "note": note}, at_once=True)

    def finish(self, ok: bool) -> None:
        """Sends the remaining records and ends the run; the parent run ends with its last running stage."""

    def _record(self, entry: Entry, at_once: bool = False) -> None:
        """Records an entry. ``at_once``: wakes the thread that sends entries."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.finish(kind is None)


def start_run(recipe: Recipe, stage: str, rank: int = 0, student: str | None = None) -> Run:
    """Starts the run of a stage, or resumes it if its id is in ``tracking.json``; never raises. ``stage``:
    "teacher", "student" or "evaluation". ``student``: name of the student if the recipe has several, since
    each student has its own run."""
    nested = tracked_run(recipe, stage, student)
    if rank != 0 or not recipe.tracking.enabled:
        return Run()
    if recipe.tracking.uri is None and storage.is_remote(recipe.output):
        _say("tracking: off, because a remote output cannot hold an SQLite database; set tracking.uri")
        return Run()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("PGCONNECT_TIMEOUT", "5")
    try:
        return _LiveRun(recipe, nested)
    except Exception as problem:
        _say(f"tracking: off; {short_message(problem)}")
        return Run()


class _LiveRun(Run):
    """Writes records to the journal, from which a background thread sends them."""

    def __init__(self, recipe: Recipe, nested: TrackedRun) -> None:
        self._recipe, self._nested, self._stage = recipe, nested, nested.stage
        self._journal = Journal(_journal_path(recipe, nested))
        self._sender = RunSender(recipe, nested)
        self._answered, self._wake, self._stopping = threading.Event(), threading.Event(), False
        self._retry_at, self._problem = 0.0, ""
        self._sample = sampler() if recipe.tracking.system_metrics else None
        self._sample_at = time.monotonic()
        self._journal.append({"status": "RUNNING"})
        self.log_params(nested.params)
        # A daemon, so that the process can end while a call to an unreachable database still waits.
        self._thread = threading.Thread(target=self._run, name=f"tracking-{nested.key}", daemon=True)
        self._thread.start()
        self._answered.wait(_START_SECONDS)

    @property
    def run_id(self) -> str | None:
        return self._sender.run_id

    def _record(self, entry: Entry, at_once: bool = False) -> None:
        self._journal.append(entry)
        if at_once:
            self._wake.set()

    def finish(self, ok: bool) -> None:
        if self._stopping:
            return
        self._journal.append({"status": "FINISHED" if ok else "FAILED"})
        self._stopping = True
        self._wake.set()
        self._wait_for_delivery()
        if len(self._journal) or self._sender.refusals:
            kept = f"kept in {self._journal.path}, sent when a stage starts again"
            fate, reason = kept if self._journal.on_disk else "lost", self._problem or "no answer"
            count = len(self._journal)
            unsent = f"{count} records were not sent ({reason}), {fate}" if count else ""
            _say("tracking: " + "; ".join(part for part in (unsent, *self._sender.refusals[:1]) if part))
        self._journal.close()

    def _wait_for_delivery(self) -> None:
        """Waits until the thread has ended, or until no record has been accepted for too long."""
        unsent, last_success = len(self._journal), time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.5)
            if len(self._journal) < unsent:
                unsent, last_success = len(self._journal), time.monotonic()
            reachable = self._sender.is_sqlite or (self._sender.has_answered and not self._problem)
            if time.monotonic() - last_success > (_REACHABLE_SECONDS if reachable else _UNREACHABLE_SECONDS):
                return

    def _run(self) -> None:
        self._run_once()
        self._answered.set()
        if self._sender.connected:
            _send_old_journals(self._recipe, self._nested)
        while not self._stopping:
            self._wake.wait(1.0)
            self._wake.clear()
            self._run_once()
        self._deliver()

    def _run_once(self) -> None:
        if time.monotonic() >= self._retry_at:
            self._deliver()
        if self._sample and time.monotonic() >= self._sample_at:
            self._sample_at = time.monotonic() + _SYSTEM_SECONDS
            with contextlib.suppress(Exception):
                entry = {"metrics": self._sample(), "step": None, "clock": True}
                self._journal.append({**entry, "time": _milliseconds()})

    def _deliver(self) -> None:
        try:
            deliver(self._journal, self._sender)
            self._problem = ""
        except Exception as problem:
            self._problem = short_message(problem)
            self._retry_at = time.monotonic() + _RETRY_SECONDS


def deliver(journal: Journal, sender: RunSender) -> None:
    """Sends all entries of the journal. Raises an error if the server cannot be reached.

    A server that answers may still be unable to store files. Then files and models are tried once and stay
    in the journal, all other entries are sent, and the last error is raised.
    """
    failed: list[Entry] = []
    problem: Exception | None = None
    while (entries := journal.head(MAX_POINTS)) and entries[0] not in failed:
        try:
            journal.discard(sender.send(entries))
        except Exception as error:
            if entries[0].keys().isdisjoint({"artifact", "model"}) or not sender.answers():
                raise
            failed.append(entries[0])
            problem = error
            journal.postpone()
    if problem is not None:
        raise problem


def _send_old_journals(recipe: Recipe, nested: TrackedRun) -> None:
    """Sends the remaining records of the recipe's other runs, except those that another process logs now."""
    for other in tracked_runs(recipe):
        path = _journal_path(recipe, other)
        if other == nested or path is None or not os.path.exists(path):
            continue
        journal = Journal(path)
        with contextlib.suppress(Exception):
            if journal.on_disk:
                deliver(journal, RunSender(recipe, other))
        journal.close()


def _milliseconds() -> int:
    """Returns the present time as MLflow counts it, in milliseconds since 1970."""
    return int(time.time() * 1000)


def _absolute(path: str) -> str:
    return path if storage.is_remote(path) else os.path.abspath(path)


def _journal_path(recipe: Recipe, nested: TrackedRun) -> str | None:
    if storage.is_remote(recipe.root):
        return None
    return storage.join(recipe.root, f"tracking-{nested.key}.jsonl")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
