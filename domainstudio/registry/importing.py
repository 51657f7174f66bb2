"""Imports a pretrained pipeline into the project: from the hub, S3, MLflow's registry or a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from domainstudio import git
from domainstudio.config import Name
from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models.folders import COMBINATION, set_resolution
from domainstudio.project import SOURCE_MODELS
from domainstudio.storage import s3
from domainstudio.storage.files import link_or_copy, output_folder
from domainstudio.tracking.server import connect

if TYPE_CHECKING:
    from domainstudio.models.denoiser import Denoiser

SUFFIXES = frozenset({".json", ".txt", ".safetensors", ".md", ".model", ".jinja"})
"""Files of a pipeline that are copied. Pickled weights (.bin, .ckpt) can run code and are never copied."""


def import_source(
    name: str, location: str, *, replace: bool = False, resolution: int | None = None
) -> tuple[Path, Denoiser]:
    """Copy a pipeline into `models/sources/<name>`, and load it once to check it.

    Args:
        name: Its key of `sources` in params.yaml.
        location: As `import_model`.
        replace: Whether it may take the place of another one.
        resolution: Height and width of its images, for a model that takes any size; by default the one that
            its folder names.

    Returns:
        The folder and the loaded model.

    Raises:
        ConfigError: the name cannot be a key of `sources`, or there is such a source already.
        CheckpointError: there is no usable pipeline at `location`.
        DataError: S3 cannot be reached, refuses, or has nothing there.
        TrackingError: MLflow cannot be reached, or knows no such model.
    """
    from domainstudio import models

    try:
        folder = SOURCE_MODELS / TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise ConfigError(
            f"{name!r} cannot be a key of sources: use lower-case letters, digits, - and _, such as sd15"
        ) from error
    if not replace:
        _refuse_another(folder)
    with output_folder(folder) as partial:
        import_model(location, partial)
        try:
            if resolution is not None:
                set_resolution(partial, resolution)
            denoiser = models.load(partial)
        except CheckpointError as error:  # name the original, because the copy will be deleted
            raise CheckpointError(str(error).replace(str(partial), location)) from error
    return folder, denoiser


def _refuse_another(folder: Path) -> None:
    tracked = git.tracks(".", folder)
    if tracked or folder.exists():
        where = "git tracks files there" if tracked else "it is there already"
        raise ConfigError(
            f"{folder}: {where}, and every adaptation of this source would change. Choose another name, or "
            "give --replace"
        )


def import_model(location: str, folder: Path) -> None:
    """Copy a diffusers pipeline into an empty folder.

    Args:
        location: A folder, a hub id such as `owner/name`, `s3://bucket/prefix`, or `models:/name@alias` of
            MLflow's registry.
        folder: Where to write.

    Raises:
        CheckpointError: there is no usable pipeline at `location`.
        DataError: S3 cannot be reached, refuses, or has nothing there.
        TrackingError: MLflow cannot be reached, or knows no such model.
    """
    fetch = next((fetch for start, fetch in ORIGINS.items() if location.startswith(start)), _from_folder)
    fetch(location, folder)
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


def _from_folder(location: str, folder: Path) -> None:
    """Copy a folder, or a model of the hub."""
    from domainstudio import models

    _copy(models.local_folder(location), folder)


def _from_s3(location: str, folder: Path) -> None:
    """Download the objects that have changed since an earlier import, and link all of them."""
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
        if next(Path(downloaded).rglob(COMBINATION), None) is not None:
            raise CheckpointError(
                f"{location} is two models at work together, and one is adapted at a time: download it, and "
                "import its folder artifacts/pipeline/adapted or artifacts/pipeline/source"
            )
        for index in sorted(Path(downloaded).rglob("model_index.json"))[:1]:
            _copy(index.parent, folder)


ORIGINS: Mapping[str, Callable[[str, Path], None]] = {"s3://": _from_s3, "models:/": _from_registry}
"""What fetches a model, by the start of its location. Others are folders or models of the hub."""


def _copy(source: Path, folder: Path) -> None:
    for path in sorted(source.rglob("*")):
        part = path.relative_to(source)
        if path.is_file() and _is_wanted(part):
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / part)


def _is_wanted(path: Path) -> bool:
    """Tell whether a file belongs to the pipeline. Weights beside model_index.json are for other programs."""
    return path.suffix in SUFFIXES and (len(path.parts) > 1 or path.suffix != ".safetensors")
