"""Where a model came from: the data that its run used, by its hashes in `dvc.lock`, and all its settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from domainstudio.config import Adaptation
from domainstudio.errors import ConfigError
from domainstudio.project import SOURCE_IMAGES, SOURCE_MODELS, TARGETS

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from domainstudio.registry.results import Result

LOCK = Path("dvc.lock")

MAX_DIGEST = 36
"""MLflow's limit: as long as DVC's hash of a folder, an md5 and `.dir`."""


def origin(result: Result, tags: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that decided a model and its figures, the content of `lineage.json`.

    Args:
        result: The model's.
        tags: The run's tags, for the commit.

    Raises:
        ConfigError: `dvc.lock` cannot be read.
    """
    return {
        "format": 1,
        "adaptation": result.adaptation.model_dump(mode="json"),
        **(result.together.facts if result.together else {}),
        "key": result.record.key,
        "versions": result.record.versions,
        **result.tags,
        **{name: value for name, value in tags.items() if name.startswith("git.")},
        "conditions": dict(result.measurement.conditions),
        "metrics": result.metrics.get("samples"),
        "dvc": locked_stages(f"evaluate@{result.adaptation.name}"),
    }


def locked_stages(last: str) -> dict[str, dict[str, Any]]:
    """Return a stage of `dvc.lock` and all stages before it: md5 of dependencies and outputs, parameters.

    Without that file, or without the stage, the result is empty.

    Args:
        last: The stage's address.

    Raises:
        ConfigError: the file cannot be read.
    """
    stages = _locked()
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


def log_inputs(client: MlflowClient, run_id: str, adaptation: Adaptation) -> None:
    """Attach the data of an adaptation to its run, as MLflow datasets. Doing it again changes nothing.

    These are the few training images, the whole target domain, the source model, real images of its domain
    and, if DVC has trained it, its training images: as far as `dvc.lock` holds them.

    Raises:
        ConfigError: `dvc.lock` cannot be read.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entries = [
        DatasetInput(
            Dataset(name, digest[:MAX_DIGEST], "local", json.dumps({"uri": path})),
            [InputTag("mlflow.data.context", context)],
        )
        for name, path, digest, context in _used_data(adaptation)
    ]
    if entries:
        client.log_inputs(run_id, entries)


def _used_data(adaptation: Adaptation) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, path, hash and purpose of the data that `dvc.lock` holds. DVC hashes whole outputs."""
    stages = list(_locked().values())
    hashes = {
        path: digest for stage in stages for kind in ("deps", "outs") for path, digest in _files(stage, kind)
    }
    source = (SOURCE_MODELS / adaptation.source).as_posix()
    target = (TARGETS / adaptation.target).as_posix()
    images = (SOURCE_IMAGES / adaptation.source).as_posix()
    wanted = [
        (f"{adaptation.target}-shots", f"{target}/shots", target, "training"),
        (f"{adaptation.target}-domain", f"{target}/domain", target, "evaluation"),
        (f"{adaptation.source}-model", source, source, "source model"),
        (f"{adaptation.source}-images", images, images, "source domain"),
    ]
    for stage in stages:
        if source in dict(_files(stage, "outs")):
            origins = [path for path, _ in _files(stage, "deps") if not path.startswith("models/")]
            wanted += [(f"{adaptation.source}-training", path, path, "source training") for path in origins]
    for name, path, output, purpose in wanted:
        if output in hashes:
            yield name, path, hashes[output], purpose


def _locked() -> dict[str, dict[str, Any]]:
    if not LOCK.is_file():
        return {}
    try:
        content = yaml.safe_load(LOCK.read_text(encoding="utf-8")) or {}
        return dict(content.get("stages") or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{LOCK} cannot be read: {error}. Restore it with `git checkout {LOCK}`") from error


def _overlap(path: str, out: str) -> bool:
    """Tell whether one path is the other, or lies in it."""
    return f"{path}/".startswith(f"{out}/") or f"{out}/".startswith(f"{path}/")


def _files(stage: dict[str, Any], kind: str) -> Iterator[tuple[str, str]]:
    for entry in stage.get(kind) or ():
        if digest := entry.get("md5"):
            yield str(entry["path"]), str(digest)
