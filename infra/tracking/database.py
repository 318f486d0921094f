"""The URI of an MLflow database in SQLite, and the lock that a process holds while it connects to MLflow."""

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
    """Returns the URI under which SQLAlchemy and MLflow find the database file ``path``. SQLAlchemy takes
    ``?`` as the start of a query and, since 2.1, ``%`` as an escape. So a path that contains one of them
    becomes a ``file:`` URI. Its slashes are quoted too, because MLflow would otherwise take the URI for a
    path and create the directories of that path."""
    if "?" not in path and "%" not in path:
        return f"sqlite:///{path}"
    from sqlalchemy.engine import URL

    name = "file:" + quote(os.path.abspath(path), safe="")
    return URL.create("sqlite", database=name, query={"uri": "true"}).render_as_string(hide_password=False)


def connection_lock(uri: str, recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    """Returns the lock to hold while the database and the recipe's runs are created. It does nothing if
    tracking goes to a server and the outputs are remote."""
    if recipe.tracking.uri is None:
        return locked(storage.join(recipe.output, "mlflow.db.lock"))
    if uri.startswith("sqlite:///"):
        return locked(uri.removeprefix("sqlite:///").partition("?")[0] + ".lock")
    if storage.is_remote(recipe.root):
        return contextlib.nullcontext()
    return locked(storage.join(recipe.root, ".tracking.lock"))
