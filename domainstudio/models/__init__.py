"""Models of every kind behind one protocol, loaded from diffusers pipeline folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.errors import CheckpointError

if TYPE_CHECKING:
    from domainstudio.models.denoiser import Denoiser


def load(location: str | Path) -> Denoiser:
    """Load a model as safetensors, from a local folder or by its hub id.

    Args:
        location: a pipeline folder with `model_index.json`, or a folder of adapters with `adapter.json`;
            anything else of the form `owner/name` is a hub id.

    Raises:
        CheckpointError: nothing is there, or it is not a model that can be adapted.
    """
    from domainstudio.models import adapter_folder

    folder = Path(location)
    if not (folder / adapter_folder.RECORD).is_file():
        denoiser = _load_pipeline(local_folder(location))
        denoiser.location = folder.as_posix()
        return denoiser
    if (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} holds a pipeline (model_index.json) and adapters ({adapter_folder.RECORD}): delete "
            "what is out of date"
        )
    return adapter_folder.load(folder)


def _load_pipeline(folder: Path) -> Denoiser:
    from domainstudio.models import class_conditional, text_to_image, unconditional

    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/model_index.json cannot be read: {error}") from error
    if index.get("_class_name") in unconditional.PIPELINES:
        if class_conditional.has_classes(folder):
            return class_conditional.ClassConditionalDenoiser.load(folder, index)
        return unconditional.UnconditionalDenoiser.load(folder, index)
    if index.get("_class_name") in text_to_image.PIPELINES:
        return text_to_image.TextToImageDenoiser.load(folder, index)
    known = sorted(unconditional.PIPELINES | text_to_image.PIPELINES)
    raise CheckpointError(
        f"{folder} is a {index.get('_class_name')}; these can be adapted: {', '.join(known)}"
    )


def digest(folder: str | Path) -> str:
    """Return the SHA-256 of a model folder's weights, configurations and vocabularies."""
    total = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix in (".safetensors", ".json", ".txt", ".model") and path.name != "provenance.json":
            total.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def local_folder(location: str | Path) -> Path:
    """Return the pipeline folder at a location, downloaded where it is a hub id.

    Raises:
        CheckpointError: nothing is there.
    """
    folder = Path(location)
    if (folder / "model_index.json").is_file():
        return folder
    name = str(location)
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "models/")):
        raise CheckpointError(
            f"{folder} has no model_index.json: name a diffusers pipeline folder, or a hub id such as "
            "google/ddpm-ema-celebahq-256"
        )
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the hub model {name!r} cannot be downloaded: {error}") from error
