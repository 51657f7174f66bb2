"""Bring a pretrained model into models/sources, checked, and say what to write into params.yaml.

python -m stages.import_source sd15 stable-diffusion-v1-5/stable-diffusion-v1-5
python -m stages.import_source ours s3://bucket/models/ours
python -m stages.import_source best models:/domainstudio-ink-domainstudio@champion
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.storage.files import output_folder
from stages.cli import run

if TYPE_CHECKING:
    from domainstudio.models.denoiser import Denoiser


def main() -> None:
    """Copy a pipeline from a folder, the hub, S3 or MLflow's registry, and load it once to check it."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.import_source",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="what to call it: the key of sources in params.yaml")
    parser.add_argument("location", help="folder, hub id, s3://bucket/prefix or models:/name@alias")
    arguments = parser.parse_args()

    from domainstudio.models.kinds import kind_of
    from domainstudio.registry.importing import import_model

    folder = Path("models/sources") / _checked(arguments.name)
    with output_folder(folder) as partial:
        import_model(arguments.location, partial)
        denoiser = _load(partial, arguments.location)
    height, width = denoiser.resolution
    print(
        f"{folder}: a model of {height}x{width} pixels, {kind_of(folder)}\n"
        f"version it with: dvc add {folder}\n"
        f"then name it in params.yaml: sources: {arguments.name}: {{subjects: <file>}}, and set "
        f"prepare.resolution: {height}"
    )


def _checked(name: str) -> str:
    from pydantic import TypeAdapter, ValidationError

    from domainstudio.config import Name
    from domainstudio.errors import ConfigError

    try:
        return TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise ConfigError(
            f"{name!r} cannot be a key of sources: use lower-case letters, digits, - and _, such as sd15"
        ) from error


def _load(partial: Path, location: str) -> Denoiser:
    from domainstudio import models
    from domainstudio.errors import CheckpointError

    try:
        return models.load(partial)
    except CheckpointError as error:  # the copy is about to go, so name the original
        raise CheckpointError(str(error).replace(str(partial), location)) from error


if __name__ == "__main__":
    run(main)
