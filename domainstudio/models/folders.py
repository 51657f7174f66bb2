"""Folders of models: pipelines in diffusers' format, adapters, or two models. Reading them needs no torch."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from domainstudio.errors import CheckpointError

INDEX = "model_index.json"
"""A pipeline's index, by which its folder is known."""

RECORD = "adapter.json"
"""What adapters belong to, by which their folder is known."""


COMBINATION = "combination.json"
"""How two models draw together, by which a folder of both is known."""


def is_combination(folder: Path) -> bool:
    """Return whether a folder holds two models that draw together."""
    return (folder / COMBINATION).is_file()


def has_adapters(folder: Path) -> bool:
    """Return whether a folder holds adapters in place of a whole model."""
    return (folder / RECORD).is_file()


def has_text_encoder(folder: Path) -> bool:
    """Return whether a folder holds a pipeline that takes prompts; a missing or damaged index has none."""
    try:
        parts = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(parts, dict) and any(name.startswith("text_encoder") for name in parts)


def local_folder(name_or_path: str | Path) -> Path:
    """Return a pipeline's folder. A hub id is downloaded.

    Raises:
        CheckpointError: there is no such pipeline.
    """
    folder = Path(name_or_path)
    if (folder / INDEX).is_file():
        return folder
    name = str(name_or_path)
    if name.startswith("models:/"):
        raise CheckpointError(
            f"{name} is in MLflow's registry: load it with domainstudio.registry.loading.load, or bring it "
            "here with python -m stages.import_source"
        )
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


def read_index(folder: Path) -> dict[str, Any]:
    """Return a pipeline folder's index.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index, dict):
            raise ValueError("it must hold a mapping")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return index


def sample_size(config: Any, part: Path | str = "unet") -> tuple[int, int]:
    """Return height and width of a network's x0, by its configuration.

    Args:
        config: the configuration, of which `sample_size` is one side or both.
        part: the network's folder, for errors.

    Raises:
        CheckpointError: it is neither.
    """
    size = config.sample_size
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise CheckpointError(
            f"{part}/config.json: sample_size is {size!r}; set it to the height of x0, or to [height, width]"
        )
    return sides


def set_resolution(folder: Path, resolution: int) -> None:
    """Write the size of its images into a folder of a model of any size: `vae/config.json` names it there.

    Args:
        folder: the pipeline folder.
        resolution: height and width, in pixels.

    Raises:
        CheckpointError: the model's images have a size of their own, or a file is damaged.
    """
    path = folder / "vae" / "config.json"
    try:
        networks = [folder / part / "config.json" for part in ("unet", "transformer")]
        configs = [json.loads(each.read_text(encoding="utf-8")) for each in networks if each.is_file()]
        if any("sample_size" in config for config in configs) or not path.is_file():
            raise CheckpointError(f"{folder} draws images of its own size: leave --resolution out")
        config = json.loads(path.read_text(encoding="utf-8")) | {"sample_size": resolution}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: a config.json cannot be read: {error}. Copy it again") from error
    path.unlink()  # it may be a link to a file that is kept for the next import
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def digest(folder: str | Path) -> str:
    """Return the SHA-256 of a model folder's weights, configurations and vocabularies."""
    total = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if (
            path.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja")
            and path.name != "provenance.json"
        ):
            total.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def save_pipeline(pipeline: Any, folder: Path, *, half: bool = False) -> None:
    """Write a diffusers pipeline as safetensors, all in float32 or float16: the same model is the same files.

    The pipeline stays as it is.
    """
    from domainstudio.storage.weights import quiet

    with quiet("diffusers"):  # which warns of each part that a pipeline may lack
        _in_precision(pipeline, half).save_pretrained(folder, safe_serialization=True)
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:  # where it came from
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _in_precision(pipeline: Any, half: bool) -> Any:
    """Return a pipeline all of whose weights have one type, with copies of the parts that had others."""
    import torch

    dtype = torch.float16 if half else torch.float32

    def converted(part: Any) -> Any:
        if not isinstance(part, torch.nn.Module) or all(p.dtype == dtype for p in part.parameters()):
            return part
        copied = copy.deepcopy(part)
        return copied.half() if half else copied.float()

    parts = {name: converted(part) for name, part in pipeline.components.items()}
    names = (
        "requires_safety_checker",
        "force_zeros_for_empty_prompt",
        "is_distilled",
    )  # settings beside the parts
    options = {name: pipeline.config[name] for name in names if name in pipeline.config}
    return type(pipeline)(**parts, **options)
