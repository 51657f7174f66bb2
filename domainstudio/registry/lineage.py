"""The data that a run used, by its hashes in `dvc.lock`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from domainstudio.config import Adaptation
from domainstudio.errors import ConfigError
from domainstudio.project import SOURCE_MODELS, TARGETS

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MAX_DIGEST = 36
"""MLflow's limit: as long as DVC's hash of a folder, an md5 and `.dir`."""


@dataclass(frozen=True)
class Input:
    """Data that a run used."""

    name: str
    path: str
    """Relative to the project's root."""
    digest: str
    """DVC's md5 of the output that holds it."""
    context: str
    """Its purpose, such as `training`."""


def lineage(adaptation: Adaptation, lock: str | Path = "dvc.lock") -> list[Input]:
    """List the inputs of an adaptation that `dvc.lock` holds.

    Args:
        adaptation: The resolved adaptation.
        lock: Path of `dvc.lock`. If it is missing the list is empty.

    Returns:
        The few training images, the whole target domain, the source model and, if DVC has trained it, its
        training images.

    Raises:
        ConfigError: the file cannot be read.
    """
    stages = list(_read(Path(lock)).values())
    hashes = {
        path: digest for stage in stages for kind in ("deps", "outs") for path, digest in _files(stage, kind)
    }
    source = (SOURCE_MODELS / adaptation.source).as_posix()
    target = (TARGETS / adaptation.target).as_posix()
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


def locked_stages(last: str, lock: str | Path = "dvc.lock") -> dict[str, dict[str, Any]]:
    """Return a stage of `dvc.lock` and all stages before it: md5 of dependencies and outputs, parameters.

    Args:
        last: The stage's address.
        lock: Path of `dvc.lock`. Without that file, or without the stage, the result is empty.

    Raises:
        ConfigError: the file cannot be read.
    """
    stages = _read(Path(lock))
    makers = {path: name for name, stage in stages.items() for path, _ in _files(stage, "outs")}
    found: dict[str, dict[str, Any]] = {}
    todo = [last] if last in stages else []
    while todo:
        if (name := todo.pop()) not in found:
            stage = stages[name]
            files = {kind: dict(_files(stage, kind)) for kind in ("deps", "outs")}
            found[name] = {**files, "params": stage.get("params") or {}}
            todo += [maker for path in files["deps"] for out, maker in makers.items() if _overlap(path, out)]
    return dict(sorted(found.items()))


def log_inputs(client: MlflowClient, run_id: str, inputs: Sequence[Input]) -> None:
    """Attach inputs to a run as MLflow datasets. Those that it has already are not attached twice."""
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


def _read(lock: Path) -> dict[str, dict[str, Any]]:
    if not lock.is_file():
        return {}
    try:
        content = yaml.safe_load(lock.read_text(encoding="utf-8")) or {}
        return dict(content.get("stages") or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{lock} cannot be read: {error}. Restore it with `git checkout {lock}`") from error


def _overlap(path: str, out: str) -> bool:
    """Tell whether one path is the other, or lies in it."""
    return f"{path}/".startswith(f"{out}/") or f"{out}/".startswith(f"{path}/")


def _files(stage: dict[str, Any], kind: str) -> Iterator[tuple[str, str]]:
    for entry in stage.get(kind) or ():
        if digest := entry.get("md5"):
            yield str(entry["path"]), str(digest)
