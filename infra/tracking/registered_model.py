"""Registers a model directory as a version that MLflow can load and serve; equal weights give one version."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
import warnings
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from infra.files import storage
from infra.tracking.journal import Entry

CODE = Path(__file__).with_name("served_model.py")
PACKAGES = ("mlflow", "numpy", "pandas", "safetensors", "torch", "transformers")
"""Packages that ``served_model`` imports or needs to read safetensors."""
EXAMPLE = "The weather was fine."
SOURCE = "models:/"
"""Beginning of a version's source; the id of the version's LoggedModel follows."""
WEIGHTS = "weights"
"""Name of a version's tag for the digest of its weights."""


def register(client: Any, experiment: str, run_id: str, entry: Entry) -> None:
    """Registers the directory ``entry["model"]`` as a new version, unless a version has the same weights.

    The new or existing version gets the tags, description and scores of ``entry``, and its alias unless a
    better version has that. Raises FileNotFoundError if the directory does not exist.
    """
    if not os.path.isdir(entry["model"]):
        raise FileNotFoundError(f"{entry['model']}: no such directory")
    name, tags = entry["name"], {**entry["tags"], WEIGHTS: _digest(entry["model"])}
    _ensure_name(client, name)
    version = _known_version(client, name, tags[WEIGHTS])
    if version is None:
        model = _logged_model(client, experiment, run_id, entry)
        version = client.create_model_version(
            name, f"{SOURCE}{model.model_id}", run_id, tags=tags, model_id=model.model_id,
            description=entry.get("note"),
        )  # fmt: skip
    else:
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, value)
        if entry.get("note"):
            client.update_model_version(name, version.version, entry["note"])
    _log_scores(client, run_id, version.source.removeprefix(SOURCE), entry)
    if entry["alias"] and _takes_alias(client, entry, version.version):
        client.set_registered_model_alias(name, entry["alias"], version.version)


def save(directory: str, target: str) -> None:
    """Writes the model in ``directory`` to ``target`` as an MLflow model, with a signature and an example.
    MLflow stores it as code ("models from code"), without pickle."""
    import mlflow.pyfunc
    import pandas
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    text, vector = ColSpec(DataType.string, "text"), ColSpec(Array(DataType.double), "vector")
    signature = ModelSignature(inputs=Schema([text]), outputs=Schema([vector]))
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as draft:
        warnings.simplefilter("ignore", UserWarning)  # about type hints in MLflow's own code
        copy = os.path.join(draft, "model")  # MLflow may take a path with special characters for a URL
        shutil.copytree(directory, copy)
        requirements = [f"{package}=={installed(package)}" for package in PACKAGES]
        mlflow.pyfunc.save_model(
            target, python_model=str(CODE), artifacts={"model": copy}, signature=signature,
            input_example=pandas.DataFrame({"text": [EXAMPLE]}), pip_requirements=requirements,
        )  # fmt: skip


def _logged_model(client: Any, experiment: str, run_id: str, entry: Entry) -> Any:
    """Creates a LoggedModel with the files of the directory, and returns it."""
    title, tags = re.sub(r"[/:.%\"']", "-", entry["name"]), entry["tags"]
    about = {"name": title, "source_run_id": run_id, "tags": tags, "model_type": "encoder"}
    model = client.create_logged_model(experiment, **about)
    with tempfile.TemporaryDirectory() as draft:
        target = os.path.join(draft, "model")
        save(entry["model"], target)
        client.log_model_artifacts(model.model_id, target)
    return client.finalize_logged_model(model.model_id, "READY")


def _digest(directory: str) -> str:
    """Returns the digest of the safetensors files in ``directory``; of all files if there are none."""
    files = sorted(name for name in os.listdir(directory) if os.path.isfile(os.path.join(directory, name)))
    weights = [name for name in files if name.endswith(".safetensors")] or files
    digests = [storage.digest_file(os.path.join(directory, name)) for name in weights]
    return storage.digest_bytes(" ".join(digests).encode())


def _known_version(client: Any, name: str, weights: str) -> Any:
    """Returns the newest version of a registered model whose weights have this digest, or None. MLflow's
    filter cannot express a name with a quote, so the versions of such a name are selected here."""
    query = f"name = '{name}'" if "'" not in name else ""
    versions = [version for version in client.search_model_versions(query) if version.name == name]
    same = [version for version in versions if version.tags.get(WEIGHTS) == weights]
    return max(same, key=lambda version: int(version.version), default=None)


def _log_scores(client: Any, run_id: str, model: str, entry: Entry) -> None:
    """Logs the scores of ``entry`` as metrics of the LoggedModel with the id ``model``."""
    from mlflow.entities import Metric

    now, scores = int(time.time() * 1000), entry.get("scores", {})
    points = [Metric(name, scores[name], now, 0, model_id=model, run_id=run_id) for name in scores]
    if points:
        client.log_batch(run_id, metrics=points)


def _ensure_name(client: Any, name: str) -> None:
    """Creates the registered model ``name`` if it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as problem:
        if problem.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name)


def _takes_alias(client: Any, entry: Entry, version: str) -> bool:
    """Returns whether ``version`` takes the alias from the version that has it now. If that version has a
    score, ``version`` must have the same ``tasks`` and at least the same score."""
    score, tags = entry.get("score"), entry["tags"]
    aliases = client.get_registered_model(entry["name"]).aliases
    if score is None or entry["alias"] not in aliases:
        return True
    holder = client.get_model_version(entry["name"], aliases[entry["alias"]])
    if holder.version == version or score not in holder.tags:
        return True
    comparable = holder.tags.get("tasks") == tags.get("tasks")
    return comparable and float(tags[score]) >= float(holder.tags[score])
