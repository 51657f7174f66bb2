"""Folders of adapters, which DomainStudio and other programs load on top of their source model.

* `pytorch_lora_weights.safetensors`, for DomainStudio and diffusers: `pipeline.load_lora_weights(folder)`.
  Its keys are peft's under `unet.`, `text_encoder.` and `text_encoder_2.`; rank and alpha are in the file's
  metadata, and a program that does not read them takes alpha = rank.
* `kohya.safetensors`, for ComfyUI, AUTOMATIC1111, SD.Next, InvokeAI and kohya's own scripts; of
  text-to-image models only. It names alpha beside each pair of matrices. ComfyUI reads the keys of both
  files, but alpha from this one only. A transformer's layers have the names of OneTrainer, or those of
  SimpleTuner where ComfyUI reads these only (Z-Image).
* `adapter.json`: which model the adapters belong to, and what `loading` needs to attach them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from domainstudio.config import LoraSettings
from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models import lora
from domainstudio.models.adapters import Adapters
from domainstudio.models.folders import RECORD, digest, local_folder
from domainstudio.storage.weights import check_finite, check_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.denoiser import Denoiser

    Weights: TypeAlias = Mapping[str, Mapping[str, Tensor]]
    """Adapter weights of each part, by the keys of files."""

WEIGHTS = "pytorch_lora_weights.safetensors"
KOHYA = "kohya.safetensors"


def save(denoiser: Denoiser, folder: Path, pipeline: str, *, half: bool = False) -> None:
    """Write a model's adapters.

    Args:
        denoiser: a model with adapters.
        folder: where to write.
        pipeline: class of the source model's pipeline.
        half: store float16.

    Raises:
        CheckpointError: the source model was not loaded from a folder that the adapters could belong to.
    """
    adapters = denoiser.adapters
    if adapters is None or not adapters.base_digest:
        raise CheckpointError(
            f"{folder}: adapters are saved as a change of the model in a folder, and this model was not "
            "loaded from one: save the source model, load it and adapt that, or use lora.save_merged"
        )
    weights = {
        name: {key: _stored(value, half) for key, value in lora.weights_of(name, part).items()}
        for name, part in lora.parts_of(denoiser.network).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_diffusers(weights, adapters, folder / WEIGHTS)
    if len(weights) > 1:
        prefix = getattr(denoiser.network, "kohya_prefix", "")
        _write_kohya(weights, adapters.alpha, prefix, folder / KOHYA)
    settings = adapters.settings
    record = {
        "format": 1,
        "base": denoiser.name_or_path,
        "base_digest": adapters.base_digest,
        "pipeline": pipeline,
        "rank": settings.rank,
        "alpha": adapters.alpha,
        "modules": settings.modules,
        "text_encoder": settings.text_encoder,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> tuple[str, Path, Adapters]:
    """Read what a folder's adapters belong to.

    Returns:
        Folder or hub id of their source model, its local folder, and the adapters' settings.

    Raises:
        CheckpointError: the record cannot be read, or the source model is not there.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != 1:
            raise ValueError(f"format {record['format']} is unknown to this version of DomainStudio")
        names = ("rank", "alpha", "modules", "text_encoder")
        settings = LoraSettings(**{name: record[name] for name in names})
        base, adapters = str(record["base"]), Adapters(settings, str(record["base_digest"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Adapt again") from error
    try:
        return base, local_folder(base), adapters
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} holds adapters, and their source model is not there: {error}. Run from the project's "
            f"root, bring {base} back, or set base in {path} to where that model is now"
        ) from error


def attach(denoiser: Denoiser, folder: Path, adapters: Adapters) -> None:
    """Give the source model a folder's adapters, in place.

    Raises:
        CheckpointError: they belong to another model, do not fit, or are damaged.
        MissingExtraError: peft is not installed.
    """
    base = denoiser.name_or_path
    if (found := digest(local_folder(base))) != adapters.base_digest:
        raise CheckpointError(
            f"{folder} holds adapters of a model with SHA-256 {adapters.base_digest}, and {base} is another "
            f"one now, {found}: bring the old one back, or adapt again"
        )
    try:
        lora.inject(denoiser, adapters, seed=0)
    except ConfigError as error:
        raise CheckpointError(f"{folder / RECORD} does not fit {base}: {error}") from error
    _read_weights(denoiser, folder / WEIGHTS)


def _stored(value: Tensor, half: bool) -> Tensor:
    return value.detach().cpu().to(torch.float16 if half else torch.float32).contiguous()


def _write_diffusers(weights: Weights, adapters: Adapters, path: Path) -> None:
    """Write what a pipeline's `save_lora_weights` writes, but the same bytes every time.

    Safetensors writes several entries of metadata in random order, so there is one. It holds the options that
    every version of peft knows.
    """
    from safetensors.torch import save_file

    options: dict[str, Any] = {}
    for name, part in weights.items():
        if part:
            options[f"{name}.r"] = adapters.settings.rank
            options[f"{name}.lora_alpha"] = adapters.alpha
            options[f"{name}.target_modules"] = list(adapters.modules(name))
    metadata = {"lora_adapter_metadata": json.dumps(options, sort_keys=True)}
    save_file(_joined(weights), path, metadata=metadata)


def _write_kohya(weights: Weights, alpha: float, transformer_prefix: str, path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    prefix = "lora_te1_" if "text_encoder_2" in weights else "lora_te_"
    transformer = re.compile("^transformer_")
    converted = {
        # the converter writes the rank for alpha
        transformer.sub(transformer_prefix, key.replace("lora_te1_", prefix)): torch.tensor(alpha)
        if key.endswith(".alpha")
        else value
        for key, value in convert_state_dict_to_kohya(_joined(weights)).items()
    }
    save_file(converted, path, metadata={"format": "pt"})


def _joined(weights: Weights) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, part in weights.items() for key, value in part.items()}


def _read_weights(denoiser: Denoiser, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    parts = lora.parts_of(denoiser.network).items()
    wanted = _joined({name: lora.weights_of(name, part) for name, part in parts})
    try:
        found = load_file(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} does not fit {RECORD} beside it: {error}. Adapt again") from error
    check_shapes(found, wanted, path)
    check_finite(found, path)
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(found[key])
