"""Which results are released: what `dvc repro` registers, what is a trial, and what a server lacks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from domainstudio import git
from domainstudio.config import Settings
from domainstudio.project import REGISTRY
from domainstudio.registry.presence import has_version
from domainstudio.storage.files import write_json

EXPERIMENT_VARIABLE = "DVC_EXP_NAME"
"""Environment variable that `dvc exp run` sets: the experiment's name."""


def trial(adaptation: str, settings: Settings, root: str | Path = ".") -> str | None:
    """Return why the present result of an adaptation is a trial, or None if it is to be registered.

    A registered version names a commit. So only settings that are in a commit are released without a person's
    command.
    """
    if name := os.environ.get(EXPERIMENT_VARIABLE):
        return f"{name} is an experiment of DVC"
    if adaptation not in settings.registry.models:
        return "registry.models of params.yaml does not name it"
    if git.changed(root, "params.yaml"):
        return "params.yaml has changes that are not committed"
    return None


def path(adaptation: str) -> Path:
    """Return the file that says what an adaptation's result is registered as."""
    return REGISTRY / f"{adaptation}.json"


def read(adaptation: str, root: str | Path = ".") -> dict[str, Any] | None:
    """Return what an adaptation's result is registered as; None if it was neither registered nor tried.

    Its `model` is None after a trial.
    """
    try:
        content = json.loads((Path(root) / path(adaptation)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write(adaptation: str, entry: Mapping[str, str | None]) -> None:
    """Record what an adaptation's result is registered as."""
    write_json(path(adaptation), {"format": 1, **entry})


def withdraw_lacking(adaptation: str, settings: Settings) -> bool:
    """Remove the record of a released result that this server lacks, so that DVC registers it again.

    Returns:
        Whether it was removed.

    Raises:
        TrackingUnavailableError: The server does not answer, or refuses.
    """
    if lacking := _is_lacking(adaptation, settings):
        path(adaptation).unlink()
    return lacking


def _is_lacking(adaptation: str, settings: Settings) -> bool:
    if (entry := read(adaptation)) is None or trial(adaptation, settings):
        return False
    if (model := entry.get("model")) is None:
        return True
    moved = model != settings.registry.models[adaptation]
    return moved or not has_version(model, str(entry.get("key")), str(entry.get("digest")))
