"""Bringing a pretrained pipeline into the project: from the hub, S3, MLflow's registry or another folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from domainstudio.errors import CheckpointError
from domainstudio.storage import s3
from domainstudio.storage.files import link_or_copy
from domainstudio.tracking.server import connect

SUFFIXES = frozenset({".json", ".txt", ".safetensors", ".md", ".model"})
"""Files of a pipeline folder that are taken; pickled weights (.bin, .ckpt) can run code and never are."""


def import_model(location: str, folder: Path) -> None:
    """Copy a diffusers pipeline into `folder`, which must be empty.

    Args:
        location: a folder, a hub id such as `owner/name`, `s3://bucket/prefix`, or `models:/name@alias` of
            MLflow's registry.
        folder: where to write.

    Raises:
        CheckpointError: nothing is there that can be used.
        DataError: S3 cannot be reached, refuses, or has nothing there.
        TrackingError: MLflow cannot be reached, or knows no such model.
    """
    if location.startswith("s3://"):
        _from_s3(location, folder)
    elif location.startswith("models:/"):
        _from_registry(location, folder)
    else:
        from domainstudio import models

        _copy(models.local_folder(location), folder)
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{location} holds no diffusers pipeline: there is no model_index.json in it. Name the folder "
            "that has one, or convert a checkpoint in one file: from_single_file(...).save_pretrained(...)"
        )
    if not any(folder.rglob("*.safetensors")):
        raise CheckpointError(
            f"{location} has no weights as safetensors; pickled ones are never read. Save the pipeline with "
            "save_pretrained(..., safe_serialization=True)"
        )


def _from_s3(location: str, folder: Path) -> None:
    """Fetch the objects that are new or have changed since an earlier import, and link all of them."""
    wanted = [item for item in s3.list_objects(location) if _is_wanted(Path(item.path))]
    for item in wanted:
        if not s3.is_safe(item.path):
            raise CheckpointError(f"{item.url} is not a safe path: rename that object")
    for item in wanted:
        link_or_copy(s3.cached(item), folder / item.path)


def _from_registry(location: str, folder: Path) -> None:
    """Copy the pipeline inside a registered model."""
    with TemporaryDirectory() as place:
        with connect():
            import mlflow

            downloaded = mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=place)
        for index in sorted(Path(downloaded).rglob("model_index.json"))[:1]:
            _copy(index.parent, folder)


def _copy(source: Path, folder: Path) -> None:
    for path in sorted(source.rglob("*")):
        part = path.relative_to(source)
        if path.is_file() and _is_wanted(part):
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / part)


def _is_wanted(path: Path) -> bool:
    """Tell whether a file belongs to the pipeline; weights beside its index are for other programs."""
    return path.suffix in SUFFIXES and (len(path.parts) > 1 or path.suffix != ".safetensors")
