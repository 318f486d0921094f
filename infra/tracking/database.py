"""The database of a recipe that names no server: a file of SQLite beside its outputs."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING
from urllib.parse import quote

from infra.files import storage
from infra.files.locks import locked

if TYPE_CHECKING:
    from infra.settings.recipe import Recipe


def sqlite_uri(path: str) -> str:
    """The URI of a database file as SQLAlchemy and MLflow read it.

    ``?`` begins a query, and since SQLAlchemy 2.1 ``%41`` is an A: such a path is given as SQLite's own URI.
    Its slashes are quoted too: MLflow takes the text as it stands for a path, and makes its directories.
    """
    if "?" not in path and "%" not in path:
        return f"sqlite:///{path}"
    from sqlalchemy.engine import URL

    name = "file:" + quote(os.path.abspath(path), safe="")
    return URL.create("sqlite", database=name, query={"uri": "true"}).render_as_string(hide_password=False)


def connecting(uri: str, recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    """The lock under which a process makes the database and the recipe's runs, where a file can be locked."""
    if recipe.tracking.uri is None:
        return locked(storage.join(recipe.output, "mlflow.db.lock"))
    if uri.startswith("sqlite:///"):
        return locked(uri.removeprefix("sqlite:///").partition("?")[0] + ".lock")
    if storage.is_remote(recipe.root):
        return contextlib.nullcontext()
    return locked(storage.join(recipe.root, ".tracking.lock"))
