"""Loads models of every kind. A new kind is a class in a file of its own, and one line in `KINDS`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from domainstudio.errors import CheckpointError
from domainstudio.models import adapter_folder, combination_folder
from domainstudio.models.class_conditional import ClassConditionalDenoiser
from domainstudio.models.combined import combine
from domainstudio.models.denoiser import Denoiser
from domainstudio.models.flux_1 import Flux1Denoiser
from domainstudio.models.flux_2 import Flux2Denoiser
from domainstudio.models.folders import (
    INDEX,
    RECORD,
    has_adapters,
    is_combination,
    local_folder,
    read_index,
)
from domainstudio.models.latent import LatentDenoiser
from domainstudio.models.pixart import PixArtDenoiser
from domainstudio.models.qwen_image import QwenImageDenoiser
from domainstudio.models.stable_diffusion import StableDiffusionDenoiser
from domainstudio.models.stable_diffusion_3 import StableDiffusion3Denoiser
from domainstudio.models.unconditional import UnconditionalDenoiser
from domainstudio.models.z_image import ZImageDenoiser

if TYPE_CHECKING:
    import torch


class Kind(Denoiser, Protocol):
    """What a kind's class knows of folders, beside the methods of `Denoiser`."""

    pipelines: frozenset[str]
    """Classes of the pipeline folders that it reads."""

    @classmethod
    def reads(cls, folder: Path) -> bool:
        """Return whether a folder of one of `pipelines` holds a model of this kind."""
        ...

    @classmethod
    def load(cls, folder: Path, half: torch.dtype | None = None) -> Denoiser:
        """Read a pipeline folder, in float32 or with frozen weights of 16 bits.

        Raises:
            CheckpointError: a part is missing, damaged, not safetensors, or does not fit the others.
            MissingExtraError: a package that it needs is not installed.
        """
        ...


KINDS: tuple[type[Kind], ...] = (
    UnconditionalDenoiser,
    LatentDenoiser,
    ClassConditionalDenoiser,
    StableDiffusionDenoiser,
    StableDiffusion3Denoiser,
    PixArtDenoiser,
    ZImageDenoiser,
    Flux1Denoiser,
    Flux2Denoiser,
    QwenImageDenoiser,
)
"""Of these, the first that knows a folder's pipeline class and UNet reads the folder."""


def load(name_or_path: str | Path, half: torch.dtype | None = None) -> Denoiser:
    """Load a model or adapters (see `models.load`)."""
    folder = Path(name_or_path)
    if is_combination(folder):
        return _load_combination(folder)
    if not has_adapters(folder):
        return _load_pipeline(local_folder(name_or_path), folder, half)
    if (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds a pipeline ({INDEX}) and adapters ({RECORD}): delete what is out of date"
        )
    base, pipeline, adapters = adapter_folder.read_record(folder)
    denoiser = _load_pipeline(pipeline, Path(base), half)
    adapter_folder.attach(denoiser, folder, adapters)
    return denoiser


def kind_of(folder: Path) -> str:
    """Return the kind of the model in a folder (see `models.kind_of`)."""
    if is_combination(folder):
        folder = folder / combination_folder.ADAPTED
    if has_adapters(folder):
        _, folder, _ = adapter_folder.read_record(folder)
    return _kind(folder).kind


def _load_combination(folder: Path) -> Denoiser:
    combination, wording = combination_folder.read_record(folder)
    source, adapted = (folder / part for part in (combination_folder.SOURCE, combination_folder.ADAPTED))
    return combine(load(source), load(adapted), combination, wording)


def _load_pipeline(folder: Path, name_or_path: Path, half: torch.dtype | None) -> Denoiser:
    denoiser = _kind(folder).load(folder, half)
    denoiser.name_or_path = name_or_path.as_posix()
    return denoiser


def _kind(folder: Path) -> type[Kind]:
    name = read_index(folder).get("_class_name")
    for kind in KINDS:
        if name in kind.pipelines and kind.reads(folder):
            return kind
    known = sorted({pipeline for kind in KINDS for pipeline in kind.pipelines})
    raise CheckpointError(f"{folder} is a {name}; these can be adapted: {', '.join(known)}")
