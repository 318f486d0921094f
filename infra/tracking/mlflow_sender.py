"""Sends the entries of a journal to MLflow, through MLflow's public API."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.files import storage
from infra.redaction import flatten, redact, short_message
from infra.tracking.database import connection_lock, sqlite_uri
from infra.tracking.journal import Entry
from infra.tracking.registered_model import register
from infra.tracking.tracked_runs import TrackedRun, parent_params, tracked_runs

if TYPE_CHECKING:
    from infra.settings.recipe import Recipe

IDS_FILE = "tracking.json"
"""Name of the JSON file with ``uri``, and run key (or ``parent``) -> the run's id in MLflow."""
ARTIFACTS_PLACEHOLDER = "artifacts-of-this-run:"
"""Notes link to artifacts of the nested run by addresses that begin with this. When a note is sent, the
address of the run's artifacts in MLflow replaces it."""
MAX_POINTS, _MAX_PARAMS = 1000, 100
"""MLflow's limits: metric points per request and parameters per request."""
_RECIPE_FILE = "recipe.yaml"
"""Name of the parent run's artifact with the recipe, and of the tag that says that it is stored."""
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE", "PERMISSION_DENIED")
"""Error codes of requests that it is useless to repeat."""


class RunSender:
    """Sends the entries of one nested run. Its methods raise an error if MLflow cannot be reached."""

    def __init__(self, recipe: Recipe, run: TrackedRun) -> None:
        # Imported here, in the main thread, because another thread could see a half-imported package.
        import mlflow.tracking  # noqa: F401

        self._run, self._recipe = run, recipe
        self.ids: dict[str, str] = {}
        self.refusals: list[str] = []
        """One message per entry that MLflow refused."""
        self.has_answered = False
        """Whether MLflow has answered yet; set early in ``_connect``, which makes about a dozen calls."""
        self._client: Any = None
        self._params: dict[str, str] = {}
        self._experiment_id, self._start_time = "", 0
        self._newest_points: dict[str, tuple[int, float]] = {}
        """Metric -> step and value of its newest point on the server."""

    @property
    def connected(self) -> bool:
        """Whether the run exists on the server, so that entries can be sent."""
        return self._client is not None

    @property
    def is_sqlite(self) -> bool:
        """Whether runs go to an SQLite file, which is always reachable but may take long to create."""
        return (self._recipe.tracking.uri or "sqlite:").startswith("sqlite:")

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the nested run; None if it is not known yet."""
        return self.ids.get(self._run.key)

    @property
    def _known_run_id(self) -> str:
        return self.ids[self._run.key]

    def send(self, entries: list[Entry]) -> int:
        """Sends the first entry; if it has metrics, also the entries with metrics that follow it. Returns the
        number of entries that were sent or refused, which can be discarded."""
        from mlflow.exceptions import MlflowException

        if self._client is None:
            self._connect()
        first, count = entries[0], 1
        if first.get("note"):
            page = f"#/experiments/{self._experiment_id}/runs/{self._known_run_id}/artifacts/"
            first = {**first, "note": first["note"].replace(ARTIFACTS_PLACEHOLDER, page)}
        senders = {
            "params": self._send_params, "status": self._send_status, "artifact": self._send_artifact,
            "dataset": self._send_dataset, "headline": self._send_headline, "child": self._send_child,
            "model": self._send_model,
        }  # fmt: skip
        try:
            if "metrics" in first:
                count = self._send_metrics(entries)
            for kind in senders.keys() & first.keys():
                senders[kind](first)
        except (MlflowException, FileNotFoundError) as problem:
            if isinstance(problem, MlflowException) and problem.error_code not in _REFUSALS:
                raise
            self.refusals.append(f"{next(iter(first))} was refused: {short_message(problem)}")
        return count

    def answers(self) -> bool:
        """Whether MLflow answers now."""
        try:
            self._client.get_run(self._known_run_id)
        except Exception:
            return False
        return True

    def _connect(self) -> None:
        for noisy in ("alembic", "mlflow", "urllib3"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        import mlflow
        from mlflow.tracking import MlflowClient

        recipe = self._recipe
        uri = recipe.tracking.uri or sqlite_uri(storage.join(recipe.output, "mlflow.db"))
        mlflow.set_tracking_uri(uri)  # MLflow resolves a version's source here, not at the client's URI
        # The lock keeps two processes from creating one SQLite database, and from overwriting tracking.json.
        with connection_lock(uri, recipe):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            experiment = self._find_or_create_experiment(client, uri)
            self.has_answered = True
            self._find_runs(client, experiment, redact(uri))
        run = client.get_run(self._known_run_id)
        self._params = dict(run.data.params)
        self._experiment_id, self._start_time = run.info.experiment_id, run.info.start_time
        self._client = client

    def _find_or_create_experiment(self, client: Any, uri: str) -> str:
        """Returns the id of the experiment, which is created if it does not exist."""
        name = self._recipe.tracking.experiment
        known = client.get_experiment_by_name(name)
        if known is not None:
            return str(known.experiment_id)
        location = None
        if uri.startswith("sqlite:") and not storage.is_remote(self._recipe.output):
            location = Path(storage.join(self._recipe.output, "mlartifacts")).absolute().as_uri()
        return str(client.create_experiment(name, artifact_location=location))

    def _find_runs(self, client: Any, experiment: str, uri: str) -> None:
        """Fills ``ids`` from tracking.json. Creates the parent run and this run if the server lacks them."""
        saved = self._saved_ids()
        ids = {"uri": uri, **saved} if saved.get("uri", uri) == uri else {"uri": uri}
        parent = _find_or_create_run(client, ids.get("parent"), experiment, self._recipe.name, {})
        key, tags = self._run.key, {"mlflow.parentRunId": parent, **self._run.tags}
        ids |= {"parent": parent, key: _find_or_create_run(client, ids.get(key), experiment, key, tags)}
        if ids != saved:  # at once, so that a failure of what follows creates no more runs
            storage.publish_json(storage.join(self._recipe.root, IDS_FILE), ids)
        self.ids = ids
        self._describe(client, parent)

    def _describe(self, client: Any, parent: str) -> None:
        """Logs the recipe to the parent run unless it is there: as parameters, and as a file, which is tried
        again at the next start if MLflow cannot store files now."""
        data = client.get_run(parent).data
        if not data.params:
            _log_params(client, parent, flatten(parent_params(self._recipe)))
        if _RECIPE_FILE in data.tags:
            return
        try:
            client.log_text(parent, redact(self._recipe.to_yaml()), _RECIPE_FILE)
            client.set_tag(parent, _RECIPE_FILE, "in the artifacts")
        except Exception as problem:  # of any kind of artifact store
            self.refusals.append(f"{_RECIPE_FILE} was not stored: {short_message(problem)}")

    def _saved_ids(self) -> dict[str, str]:
        """Returns the content of tracking.json, which every stage updates; {} if it is absent or damaged."""
        return storage.read_object(storage.join(self._recipe.root, IDS_FILE))

    def _send_metrics(self, entries: list[Entry]) -> int:
        from mlflow.entities import Metric

        points: list[Any] = []
        count = 0
        for entry in entries:
            if "metrics" not in entry or (count and len(points) + len(entry["metrics"]) > MAX_POINTS):
                break
            count += 1
            for name, value in entry["metrics"].items():
                step = entry["step"]
                if entry.get("clock"):  # the step is the seconds since the run was first started
                    step = max(0, entry["time"] - self._start_time) // 1000
                if self._is_new_point(name, step, value):
                    points.append(Metric(name, value, entry["time"], step or 0))
                    self._newest_points[name] = (step or 0, value)
        try:
            for start in range(0, len(points), MAX_POINTS):
                self._client.log_batch(self._known_run_id, metrics=points[start : start + MAX_POINTS])
        except Exception:
            self._newest_points.clear()  # it is unknown which points arrived: ask MLflow again
            raise
        return count

    def _is_new_point(self, name: str, step: int | None, value: float) -> bool:
        """Whether MLflow lacks this point of the metric ``name``."""
        if name not in self._newest_points:
            history = self._client.get_metric_history(self._known_run_id, name)
            newest = max(history, key=lambda point: (point.step, point.timestamp), default=None)
            if newest is None:
                return True
            self._newest_points[name] = (newest.step, newest.value)
        last_step, last_value = self._newest_points[name]
        # A metric without steps is a score: an equal value is the same point, another value is a new point.
        return step > last_step if step is not None else value != last_value

    def _send_model(self, entry: Entry) -> None:
        register(self._client, self._experiment_id, self._known_run_id, entry)

    def _send_params(self, entry: Entry) -> None:
        params: dict[str, str] = entry["params"]
        for name, value in params.items():
            if self._params.get(name, value) != value:  # MLflow refuses to change a parameter
                self._client.set_tag(self._known_run_id, f"resumed.{name}", value)
        fresh = {name: value for name, value in params.items() if name not in self._params}
        _log_params(self._client, self._known_run_id, fresh)
        self._params.update(fresh)

    def _send_status(self, entry: Entry) -> None:
        parent, status = self.ids["parent"], entry["status"]
        if status == "RUNNING":
            self._client.update_run(self._known_run_id, status=status)
            self._client.update_run(parent, status=status)
            return
        self._client.set_terminated(self._known_run_id, status)
        saved = self._saved_ids()
        known = self.ids | (saved if saved.get("uri") == self.ids["uri"] else {})
        keys = [run.key for run in tracked_runs(self._recipe)]
        statuses = {self._client.get_run(known[key]).info.status for key in keys if key in known}
        # The parent run ends when none of its nested runs on this server is running.
        if "RUNNING" not in statuses:
            self._client.set_terminated(parent, "FAILED" if "FAILED" in statuses else "FINISHED")

    def _send_dataset(self, entry: Entry) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow stores 36 characters; without the algorithm's name, our 32 digits fit. Longer ones are cut.
        digest = entry["digest"].rpartition(":")[2][:36]
        kind = entry["source"].partition("://")[0] if "://" in entry["source"] else "local"
        source = json.dumps({"uri": entry["source"]})
        tag = InputTag("mlflow.data.context", entry["context"])
        dataset = Dataset(entry["dataset"], digest, kind, source)
        self._client.log_inputs(self._known_run_id, [DatasetInput(dataset, [tag])])

    def _send_headline(self, entry: Entry) -> None:
        """Writes the metrics by which recipes are compared, and a description, to the parent run."""
        from mlflow.entities import Metric, RunTag

        points = [Metric(name, value, entry["time"], 0) for name, value in entry["headline"].items()]
        tags = [RunTag("mlflow.note.content", entry["note"])]
        self._client.log_batch(self.ids["parent"], metrics=points, tags=tags)

    def _send_child(self, entry: Entry) -> None:
        """Sends points of a run that is nested in this one. The first call creates it; a call with new points
        ends it. Points that MLflow has are left out, so a stage may send all points at every start."""
        from mlflow.entities import Metric

        key = f"{self._run.key}/{entry['child']}"
        if key not in self.ids:
            tags = {"mlflow.parentRunId": self._known_run_id, **self._run.tags, **entry["tags"]}
            arguments = self._saved_ids().get(key), self._experiment_id, entry["child"], tags
            self.ids[key] = _find_or_create_run(self._client, *arguments)
            known = {**self._saved_ids(), **self.ids}
            storage.publish_json(storage.join(self._recipe.root, IDS_FILE), known)
        points, run_id = [], self.ids[key]
        for name, value in entry["values"].items():
            history = self._client.get_metric_history(run_id, name)
            if (entry["step"], value) not in [(point.step, point.value) for point in history]:
                points.append(Metric(name, value, entry["time"], entry["step"]))
        if points:
            self._client.log_batch(run_id, metrics=points)
            self._client.set_terminated(run_id)

    def _send_artifact(self, entry: Entry) -> None:
        """Uploads a file or directory as artifacts; a remote file is downloaded first."""
        path, folder = entry["artifact"], entry["folder"]
        if storage.is_remote(path):
            with tempfile.TemporaryDirectory() as directory:
                copy = os.path.join(directory, path.rstrip("/").rpartition("/")[2])
                storage.publish_bytes(copy, storage.read_bytes(path))
                self._client.log_artifact(self._known_run_id, copy, folder)
            return
        send = self._client.log_artifacts if os.path.isdir(path) else self._client.log_artifact
        send(self._known_run_id, path, folder)


def _find_or_create_run(
    client: Any, run_id: str | None, experiment: str, name: str, tags: dict[str, str]
) -> str:
    """Returns ``run_id`` if MLflow has this run and it is not deleted, else the id of a new run."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.context.registry import resolve_tags

    if run_id:
        try:
            if client.get_run(run_id).info.lifecycle_stage == "active":
                return run_id
        except MlflowException as problem:
            if problem.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    tags = {**resolve_tags(), **tags}  # user, command and commit, as in mlflow.start_run
    return str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)


def _log_params(client: Any, run_id: str, params: dict[str, str]) -> None:
    from mlflow.entities import Param

    items = [Param(name, value) for name, value in params.items()]
    for start in range(0, len(items), _MAX_PARAMS):
        client.log_batch(run_id, params=items[start : start + _MAX_PARAMS])
