"""Diffusion models of every kind behind one protocol, `denoiser.Denoiser`, in diffusers' folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.models.folders import digest, has_adapters, local_folder

if TYPE_CHECKING:
    import torch

    from domainstudio.models.denoiser import Denoiser

__all__ = ["digest", "has_adapters", "kind_of", "load", "local_folder"]


def load(name_or_path: str | Path, half: torch.dtype | None = None) -> Denoiser:
    """Load a model from safetensors files.

    Args:
        name_or_path: a folder with a pipeline (`model_index.json`), adapters (`adapter.json`) or two models
            that draw together (`combination.json`); anything else of the form `owner/name` is a hub id.
        half: a type of 16 bits for weights that are only drawn with or stay frozen, else float32. VAE and
            adapters are float32 always, and so are text encoders where it is float16, which theirs overflow.

    Raises:
        CheckpointError: there is no model, or none that can be adapted.
        MissingExtraError: a package that it needs is not installed.
    """
    from domainstudio.models import loading  # which needs torch

    return loading.load(name_or_path, half)


def kind_of(folder: Path) -> str:
    """Return the kind of the model in a folder, such as text-to-image. Adapters are of their model's kind.

    Raises:
        CheckpointError: there is no model, or none that can be adapted, or adapters without their model.
    """
    from domainstudio.models import loading

    return loading.kind_of(folder)
