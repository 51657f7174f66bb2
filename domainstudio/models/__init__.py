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
    """Load a model as safetensors, from a local pipeline folder or by its hub id.

    Args:
        location: a folder with `model_index.json`; anything else of the form `owner/name` is a hub id.

    Raises:
        CheckpointError: nothing is there, or it is not a model that can be adapted.
    """
    from domainstudio.models import unconditional

    folder = _local(location)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/model_index.json cannot be read: {error}") from error
    if index.get("_class_name") in unconditional.PIPELINES:
        return unconditional.UnconditionalDenoiser.load(folder, index)
    raise CheckpointError(
        f"{folder} is a {index.get('_class_name')}; this version adapts {sorted(unconditional.PIPELINES)}"
    )


def digest(folder: str | Path) -> str:
    """Return the SHA-256 of a model folder's weights and configurations: names and contents, sorted."""
    total = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix in (".safetensors", ".json") and path.name != "provenance.json":
            total.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _local(location: str | Path) -> Path:
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
