"""Loads registered versions: `load("models:/name@alias")`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from domainstudio import models
from domainstudio.errors import CheckpointError
from domainstudio.tracking.server import connect

if TYPE_CHECKING:
    from domainstudio.models.denoiser import Denoiser


def load(uri: str, root: str | Path = ".") -> Denoiser:
    """Return the model of a version as it is served: adapters are fused, and a source model takes part.

    Args:
        uri: such as `models:/domainstudio-sunglasses@champion` or `models:/domainstudio-sunglasses/3`.
        root: the project's root.

    Raises:
        CheckpointError: the version holds no model that can be used here.
        TrackingError: MLflow cannot be reached, or knows no such version.
    """
    with TemporaryDirectory() as place:
        with connect(root):
            folder = download(uri, Path(place))
        denoiser = models.load(folder)
    denoiser.name_or_path = ""  # the folder is gone
    return denoiser


def download(uri: str, place: Path) -> Path:
    """Copy a version into a folder, and return where its pipeline, or its two, lie there.

    Raises:
        CheckpointError: the version names a folder outside of its own.
    """
    import mlflow
    from mlflow.models import Model

    location = mlflow.artifacts.download_artifacts(uri, dst_path=str(place))
    stored = Model.load(location).flavors["python_function"]["artifacts"]["pipeline"]["path"]
    folder = Path(location, stored).resolve()
    if not folder.is_relative_to(place.resolve()):
        raise CheckpointError(f"MLmodel names {stored!r}, which lies outside of the model's folder")
    return folder
