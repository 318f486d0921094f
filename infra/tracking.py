"""MLflow, the only place that imports it: a parent run for each recipe, nested runs for its stages.

Everything logged goes into a journal first and is sent by a background thread, so a step never waits
and a server that is away costs nothing but one line at the end; the next start of any stage of the
recipe catches up. Only rank 0 logs. Nothing here raises into a stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from infra import storage
from infra.errors import UserError
from infra.journal import Entry, Journal, locked

if TYPE_CHECKING:
    from infra.recipe import Recipe

STAGES = {
    "teacher": ("corpus", "sequences", "masking", "teacher", "store"),
    "student": ("student", "train"),
    "evaluation": ("evaluation",),
}
"""The nested runs, and the sections of the recipe that are each one's parameters."""

_POINTS, _PARAMS, _VALUE = 1000, 100, 6000
"""MLflow's limits: metric points and params a request, characters a param."""
_RETRY_SECONDS = 15.0
_SYSTEM_SECONDS = 10.0
_HOPELESS = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE", "PERMISSION_DENIED")
"""Error codes that sending the same again cannot change."""


class Run:
    """A run that records nothing: other ranks, and ``tracking.enabled: false``. Also the interface."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id; None where nothing is tracked or the server has not answered yet."""
        return None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logged once; one that differs on a resumed run becomes the tag ``resumed.<name>``."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """A point of each metric; a step that is not after the last one recorded is not recorded again."""

    def log_artifact(self, path: str, folder: str | None = None) -> None:
        """A local file or directory, as it is when it is sent."""

    def log_store(self, store_dir: str, digest: str) -> None:
        """The store as a dataset of the run, with its manifest's digest."""

    def register_model(
        self,
        model_dir: str,
        name: str,
        alias: str | None = None,
        tags: Mapping[str, str] | None = None,
        score: str | None = None,
    ) -> None:
        """Logs a model directory as artifact ``model``, file by file, and makes it a version of ``name``.

        The version takes ``alias``. With ``score``, a tag that holds a number, only where that is at least
        the number of the version that has the alias now, and both have the same tag ``tasks``.
        """

    def finish(self, ok: bool) -> None:
        """Sends what is left and ends the run; the parent run ends with its last stage."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.finish(kind is None)


def start_run(recipe: Recipe, stage: str, rank: int = 0) -> Run:
    """The run of ``stage`` ("teacher", "student", "evaluation"), resumed where ``tracking.json`` knows it."""
    assert stage in STAGES, stage
    if rank != 0 or not recipe.tracking.enabled:
        return Run()
    if recipe.tracking.uri is None and storage.is_remote(recipe.output):
        _say("tracking: off; set tracking.uri, a remote output holds no sqlite database")
        return Run()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    try:
        _catch_up(recipe, stage)
        return _LiveRun(recipe, stage)
    except Exception as problem:
        _say(f"tracking: off; {_short(problem)}")
        return Run()


def redact(text: str) -> str:
    """``text`` without user names and passwords of URIs and without secrets in their queries."""
    text = re.sub(r"(\b[a-z][a-z0-9+.-]*://)[^/\s]*@", r"\1", text, flags=re.IGNORECASE)
    secret = r"[^=&\s]*(?:token|secret|passw|key|sig|credential)[^=&\s]*"
    return re.sub(rf"([?&]{secret}=)[^&\s#]*", r"\1***", text, flags=re.IGNORECASE)


class _LiveRun(Run):
    """Writes to the journal; a thread delivers from it."""

    def __init__(self, recipe: Recipe, stage: str) -> None:
        self._journal = Journal(_journal_path(recipe, stage))
        self._server = _Server(recipe, stage)
        self._delivery = threading.Lock()
        self._wake, self._stopping = threading.Event(), False
        self._retry_at, self._problem = 0.0, ""
        self._sample = _system_metrics() if recipe.tracking.system_metrics else None
        self._sample_at = time.monotonic() + 1
        self._journal.append({"status": "RUNNING"})
        self.log_params({name: dataclasses.asdict(getattr(recipe, name)) for name in STAGES[stage]})
        self._deliver()
        self._thread = threading.Thread(target=self._run, name=f"tracking-{stage}", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        return self._server.ids.get(self._server.stage)

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._journal.append({"params": _flat(params)})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._journal.append({"metrics": values, "step": step, "time": int(time.time() * 1000)})

    def log_artifact(self, path: str, folder: str | None = None) -> None:
        self._journal.append({"artifact": os.path.abspath(path), "folder": folder})
        self._wake.set()

    def log_store(self, store_dir: str, digest: str) -> None:
        source = store_dir if storage.is_remote(store_dir) else os.path.abspath(store_dir)
        self._journal.append({"store": redact(source), "digest": digest})

    def register_model(
        self,
        model_dir: str,
        name: str,
        alias: str | None = None,
        tags: Mapping[str, str] | None = None,
        score: str | None = None,
    ) -> None:
        clean = {key: redact(str(value)) for key, value in (tags or {}).items()}
        path = os.path.abspath(model_dir)
        self._journal.append({"model": path, "name": name, "alias": alias, "tags": clean, "score": score})
        self._wake.set()

    def finish(self, ok: bool) -> None:
        if self._stopping:
            return
        self._journal.append({"status": "FINISHED" if ok else "FAILED"})
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self._deliver()
        if len(self._journal) or self._server.refused:
            kept = f"kept in {self._journal.path}, sent by the next start" if self._journal.kept else "lost"
            left = (
                f"{len(self._journal)} records were not sent ({self._problem}), {kept}"
                if len(self._journal)
                else ""
            )
            _say("tracking: " + "; ".join(part for part in (left, *self._server.refused[:1]) if part))
        self._journal.close()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(1.0)
            self._wake.clear()
            self._run_once()

    def _run_once(self) -> None:
        if self._sample and time.monotonic() >= self._sample_at:
            self._sample_at = time.monotonic() + _SYSTEM_SECONDS
            with contextlib.suppress(Exception):
                # Seconds as steps: they grow over resumes, whatever the server knows.
                self.log_metrics(self._sample(), step=int(time.time()))
        if time.monotonic() >= self._retry_at:
            self._deliver()

    def _deliver(self) -> None:
        with self._delivery:
            try:
                deliver(self._journal, self._server)
            except Exception as problem:
                self._problem = _short(problem)
                self._retry_at = time.monotonic() + _RETRY_SECONDS


def deliver(journal: Journal, server: _Server) -> None:
    """Sends all that the journal holds, or raises where the server is away."""
    while entries := journal.head(_POINTS):
        journal.done(server.send(entries))


def _catch_up(recipe: Recipe, stage: str) -> None:
    """Sends what earlier runs of the other stages could not, unless one is running now."""
    for other in STAGES:
        path = _journal_path(recipe, other)
        if other == stage or path is None or not os.path.exists(path):
            continue
        journal = Journal(path)
        with contextlib.suppress(Exception):
            if journal.kept:
                deliver(journal, _Server(recipe, other))
        journal.close()


class _Server:
    """The MLflow side of one stage's run. Methods raise when the server cannot be reached."""

    def __init__(self, recipe: Recipe, stage: str) -> None:
        self.stage, self._recipe = stage, recipe
        self.ids: dict[str, str] = {}
        self.refused: list[str] = []
        self._client: Any = None
        self._params: dict[str, str] = {}
        self._last: dict[str, tuple[int, float]] = {}
        """Metric -> step and value of its newest point on the server."""

    @property
    def _run_id(self) -> str:
        return self.ids[self.stage]

    def send(self, entries: list[Entry]) -> int:
        """Sends the first entry, or the run of metrics it begins; returns how many were dealt with."""
        from mlflow.exceptions import MlflowException

        if self._client is None:
            self._connect()
        first, count = entries[0], 1
        try:
            if "metrics" in first:
                count = self._send_metrics(entries)
            elif "params" in first:
                self._send_params(first["params"])
            elif "status" in first:
                self._send_status(first["status"])
            elif "artifact" in first:
                self._send_files(first["artifact"], first["folder"])
            elif "store" in first:
                self._send_store(first["store"], first["digest"])
            elif "model" in first:
                self._send_model(first)
        except (MlflowException, FileNotFoundError) as problem:
            if isinstance(problem, MlflowException) and problem.error_code not in _HOPELESS:
                raise
            self.refused.append(f"{next(iter(first))} was refused: {_short(problem)}")
        return count

    def _connect(self) -> None:
        for noisy in ("alembic", "mlflow", "urllib3"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        from mlflow.tracking import MlflowClient

        recipe = self._recipe
        uri = recipe.tracking.uri or f"sqlite:///{storage.join(recipe.output, 'mlflow.db')}"
        # Two processes migrating a fresh sqlite database break it; and tracking.json is read, then written.
        with _connecting(uri, recipe):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            experiment = self._experiment(client, uri)
            self._find_runs(client, experiment, redact(uri))
        self._params = dict(client.get_run(self._run_id).data.params)
        self._client = client

    def _experiment(self, client: Any, uri: str) -> str:
        name = self._recipe.tracking.experiment
        known = client.get_experiment_by_name(name)
        if known is not None:
            return str(known.experiment_id)
        local = uri.startswith("sqlite:") and not storage.is_remote(self._recipe.output)
        place = os.path.abspath(storage.join(self._recipe.output, "mlartifacts")) if local else None
        return str(client.create_experiment(name, artifact_location=place and f"file://{place}"))

    def _find_runs(self, client: Any, experiment: str, uri: str) -> None:
        """Fills ``ids`` from tracking.json as far as the server knows them, and creates what is missing."""
        path = storage.join(self._recipe.root, "tracking.json")
        saved: dict[str, str] = {}
        with contextlib.suppress(UserError):
            saved = storage.read_json(path) if storage.exists(path) else {}
        ids = {"uri": uri, **saved} if saved.get("uri", uri) == uri else {"uri": uri}
        parent, created = _known_or_new(client, ids.get("parent"), experiment, self._recipe.name, {})
        ids["parent"] = parent
        if created:
            params = _flat({name: getattr(self._recipe, name) for names in STAGES.values() for name in names})
            _log_params(client, parent, params)
            client.log_text(parent, redact(self._recipe.to_yaml()), "recipe.yaml")
        tags = {"mlflow.parentRunId": parent, "stage": self.stage}
        ids[self.stage], _ = _known_or_new(client, ids.get(self.stage), experiment, self.stage, tags)
        if ids != saved:
            storage.publish_json(path, ids)
        self.ids = ids

    def _send_metrics(self, entries: list[Entry]) -> int:
        from mlflow.entities import Metric

        points: list[Any] = []
        count = 0
        for entry in entries:
            if "metrics" not in entry or len(points) + len(entry["metrics"]) > _POINTS:
                break
            count += 1
            for name, value in entry["metrics"].items():
                step = entry["step"]
                if self._is_new(name, step, value):
                    points.append(Metric(name, value, entry["time"], step or 0))
                    self._last[name] = (step or 0, value)
        if points:
            try:
                self._client.log_batch(self._run_id, metrics=points)
            except Exception:
                self._last.clear()  # ask again what arrived
                raise
        return max(1, count)

    def _is_new(self, name: str, step: int | None, value: float) -> bool:
        if name not in self._last:
            history = self._client.get_metric_history(self._run_id, name)
            newest = max(history, key=lambda point: (point.step, point.timestamp), default=None)
            if newest is None:
                return True
            self._last[name] = (newest.step, newest.value)
        last_step, last_value = self._last[name]
        # Without a step (a score), the same value again is the same point and another value a new one.
        return step > last_step if step is not None else value != last_value

    def _send_params(self, params: dict[str, str]) -> None:
        for name, value in params.items():
            if self._params.get(name, value) != value:
                self._client.set_tag(self._run_id, f"resumed.{name}", value)
        fresh = {name: value for name, value in params.items() if name not in self._params}
        _log_params(self._client, self._run_id, fresh)
        self._params.update(fresh)

    def _send_status(self, status: str) -> None:
        parent = self.ids["parent"]
        if status == "RUNNING":
            self._client.update_run(self._run_id, status=status)
            self._client.update_run(parent, status=status)
            return
        self._client.set_terminated(self._run_id, status)
        others = [self._client.get_run(self.ids[name]).info.status for name in STAGES if name in self.ids]
        if status == "FAILED" or (len(others) == len(STAGES) and set(others) == {"FINISHED"}):
            self._client.set_terminated(parent, status)

    def _send_files(self, path: str, folder: str | None) -> None:
        send = self._client.log_artifacts if os.path.isdir(path) else self._client.log_artifact
        send(self._run_id, path, folder)

    def _send_store(self, source: str, digest: str) -> None:
        from mlflow.data.dataset_source_registry import resolve_dataset_source
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        with warnings.catch_warnings():  # two of MLflow's kinds of local directory fit, it says
            warnings.simplefilter("ignore")
            origin = resolve_dataset_source(source)
        # MLflow keeps 36 characters of a digest: the 32 of xxh3-128 without its name.
        dataset = MetaDataset(origin, name="store", digest=digest.rpartition(":")[2][:36])  # type: ignore[abstract]
        tag = InputTag("mlflow.data.context", "produced" if self.stage == "teacher" else "training")
        self._client.log_inputs(self._run_id, [DatasetInput(dataset._to_mlflow_entity(), [tag])])
        self._client.set_tag(self._run_id, "store.digest", digest)

    def _send_model(self, entry: Entry) -> None:
        name, client = entry["name"], self._client
        if not os.path.isdir(entry["model"]):
            raise FileNotFoundError(f"{entry['model']}: no such directory")
        client.log_artifacts(self._run_id, entry["model"], "model")
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        versions = client.search_model_versions(f"name = '{name}' and run_id = '{self._run_id}'")
        if versions:
            version = max(versions, key=lambda known: int(known.version)).version
            for key, value in entry["tags"].items():
                client.set_model_version_tag(name, version, key, value)
        else:
            source = f"{client.get_run(self._run_id).info.artifact_uri}/model"
            version = client.create_model_version(name, source, self._run_id, tags=entry["tags"]).version
        if entry["alias"] and self._deserves(entry, version):
            client.set_registered_model_alias(name, entry["alias"], version)

    def _deserves(self, entry: Entry, version: str) -> bool:
        """Whether ``version`` takes the alias from the version that holds it."""
        score, tags = entry.get("score"), entry["tags"]
        aliases = self._client.get_registered_model(entry["name"]).aliases
        if score is None or entry["alias"] not in aliases:
            return True
        holder = self._client.get_model_version(entry["name"], aliases[entry["alias"]])
        if holder.version == version or score not in holder.tags:
            return True
        comparable = holder.tags.get("tasks") == tags.get("tasks")
        return comparable and float(tags[score]) >= float(holder.tags[score])


def _connecting(uri: str, recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    if uri.startswith("sqlite:///"):
        return locked(urlsplit(uri).path[1:].partition("?")[0] + ".lock")
    if storage.is_remote(recipe.root):
        return contextlib.nullcontext()
    return locked(storage.join(recipe.root, ".tracking.lock"))


def _known_or_new(
    client: Any, run_id: str | None, experiment: str, name: str, tags: dict[str, str]
) -> tuple[str, bool]:
    """(id, whether it was created): the run where the server has it, undeleted, else a new one."""
    from mlflow.exceptions import MlflowException

    if run_id:
        try:
            if client.get_run(run_id).info.lifecycle_stage == "active":
                return run_id, False
        except MlflowException as problem:
            if problem.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    return str(client.create_run(experiment, run_name=name, tags=tags).info.run_id), True


def _log_params(client: Any, run_id: str, params: dict[str, str]) -> None:
    from mlflow.entities import Param

    items = [Param(name, value) for name, value in params.items()]
    for start in range(0, len(items), _PARAMS):
        client.log_batch(run_id, params=items[start : start + _PARAMS])


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested mappings and dataclasses as ``section.key`` -> text, without secrets."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        prefix = f"{name}." if name else ""
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}").items()}
    if re.search(r"passw|secret|credential|(api|access)_?key|(auth|access|api)_?token", name, re.IGNORECASE):
        return {name: "***"}
    return {name: redact(str(list(value) if isinstance(value, tuple) else value))[:_VALUE]}


def _system_metrics() -> Any:
    """A function that samples the machine as MLflow's own monitor names it; None without psutil."""
    try:
        import psutil
    except ImportError:
        return None
    process = psutil.Process()
    psutil.cpu_percent()

    def sample() -> dict[str, float]:
        memory = psutil.virtual_memory()
        return {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/system_memory_usage_percentage": memory.percent,
            "system/process_memory_megabytes": process.memory_info().rss / 1e6,
        }

    return sample


def _journal_path(recipe: Recipe, stage: str) -> str | None:
    return None if storage.is_remote(recipe.root) else storage.join(recipe.root, f"tracking-{stage}.jsonl")


def _short(problem: BaseException) -> str:
    """The first line of an error, without secrets."""
    return redact((str(problem).strip() or type(problem).__name__).splitlines()[0])[:200]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
