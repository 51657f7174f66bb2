"""Asks a tracking server in a moment whether it has a version. MLflow's client takes seconds to import."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from domainstudio.registry.tags import DIGEST, KEY, find_version
from domainstudio.tracking.server import TrackingUnavailableError, connect, shown_uri, tracking_uri

SECONDS = 10
"""How long a server may take to answer."""

_QUERY = """
    SELECT 1 FROM model_versions AS version
    JOIN model_version_tags AS key ON (key.name, key.version) = (version.name, version.version)
    JOIN model_version_tags AS digest ON (digest.name, digest.version) = (version.name, version.version)
    WHERE version.name = ? AND version.current_stage != 'Deleted_Internal'
    AND key.key = ? AND key.value = ? AND digest.key = ? AND digest.value = ?
"""
"""MLflow's own tables; a test compares the answer with that of its client."""


def has_version(model: str, key: str, digest: str, root: str | Path = ".") -> bool:
    """Tell whether the server of `tracking_uri(root)` has a version of a result.

    Args:
        model: Name of the registered model.
        key: The version's tag `KEY`.
        digest: Its tag `DIGEST`.
        root: The project's root.

    Raises:
        TrackingUnavailableError: The server does not answer, or refuses.
    """
    uri = tracking_uri(root)
    if uri.startswith("sqlite:///"):
        return _file_has(Path(uri.removeprefix("sqlite:///")), model, key, digest)
    if uri.startswith(("http://", "https://")):
        return _server_has(uri, model, key, digest)
    with connect(root) as client:
        return find_version(client, model, key, digest) is not None


def _file_has(path: Path, model: str, key: str, digest: str) -> bool:
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=SECONDS)) as connection:
            found = connection.execute(_QUERY, (model, KEY, key, DIGEST, digest)).fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):  # MLflow has not used the file yet
            return False
        raise TrackingUnavailableError(f"MLflow's database {path} cannot be read: {error}") from error
    return found is not None


def _server_has(uri: str, model: str, key: str, digest: str) -> bool:
    condition = f"name = '{model}' and tags.`{KEY}` = '{key}' and tags.`{DIGEST}` = '{digest}'"
    query = urlencode({"filter": condition, "max_results": 1})
    request = Request(f"{uri.rstrip('/')}/api/2.0/mlflow/model-versions/search?{query}")
    if authorization := _authorization():
        request.add_header("Authorization", authorization)
    try:
        with urlopen(request, timeout=SECONDS) as answer:
            return bool(json.load(answer).get("model_versions"))
    except HTTPError as error:
        if error.code == 404:
            return False
        raise TrackingUnavailableError(f"MLflow at {shown_uri()} answers {error.code}") from error
    except (URLError, OSError, ValueError) as error:
        raise TrackingUnavailableError(f"MLflow at {shown_uri()} does not answer: {error}") from error


def _authorization() -> str | None:
    """Return the header that MLflow's client would send, by the same variables."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return f"Bearer {token}"
    if not (user := os.environ.get("MLFLOW_TRACKING_USERNAME")):
        return None
    text = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
    return f"Basic {base64.b64encode(text.encode()).decode()}"
