"""Which data a run has used, by the hashes in `dvc.lock`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from domainstudio.config import Adaptation
from domainstudio.errors import ConfigError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MAX_DIGEST = 36
"""MLflow's limit: the length of DVC's hash of a folder, an md5 and `.dir`."""


@dataclass(frozen=True)
class Input:
    """Data that a run has used."""

    name: str
    path: str
    """Relative to the project's root."""
    digest: str
    """DVC's md5 of the output that holds it."""
    context: str
    """What it was used for."""


def lineage(adaptation: Adaptation, lock: str | Path = "dvc.lock") -> list[Input]:
    """List the inputs of an adaptation that `dvc.lock` knows.

    Args:
        adaptation: the resolved adaptation.
        lock: path of `dvc.lock`; without that file the list is empty.

    Returns:
        The few training images, the whole target domain, the source model and, where DVC has trained it,
        the images that it was trained with.

    Raises:
        ConfigError: the file cannot be read.
    """
    stages = _read(Path(lock))
    hashes = {
        path: digest for stage in stages for kind in ("deps", "outs") for path, digest in _files(stage, kind)
    }
    source = f"models/sources/{adaptation.source}"
    target = f"data/targets/{adaptation.target}"
    wanted = [
        (f"{adaptation.target}-shots", f"{target}/shots", target, "training"),
        (f"{adaptation.target}-domain", f"{target}/domain", target, "evaluation"),
        (f"{adaptation.source}-model", source, source, "source model"),
    ]
    for stage in stages:
        if source in dict(_files(stage, "outs")):
            data = [path for path, _ in _files(stage, "deps") if path.startswith("data/")]
            wanted += [(f"{adaptation.source}-images", path, path, "source training") for path in data]
    return [
        Input(name, path, hashes[out][:MAX_DIGEST], context)
        for name, path, out, context in wanted
        if out in hashes
    ]


def log_inputs(client: MlflowClient, run_id: str, inputs: Sequence[Input]) -> None:
    """Attach inputs to a run as MLflow datasets; those that it has already are not attached twice."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entries = [
        DatasetInput(
            Dataset(item.name, item.digest, "local", json.dumps({"uri": item.path})),
            [InputTag("mlflow.data.context", item.context)],
        )
        for item in inputs
    ]
    if entries:
        client.log_inputs(run_id, entries)


def _read(lock: Path) -> list[dict[str, Any]]:
    if not lock.is_file():
        return []
    try:
        content = yaml.safe_load(lock.read_text(encoding="utf-8")) or {}
        return list((content.get("stages") or {}).values())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{lock} cannot be read: {error}. Restore it with `git checkout {lock}`") from error


def _files(stage: dict[str, Any], kind: str) -> Iterator[tuple[str, str]]:
    for entry in stage.get(kind) or ():
        if digest := entry.get("md5"):
            yield str(entry["path"]), str(digest)
