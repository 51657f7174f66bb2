"""What pixel-space models share: a `diffusers.UNet2DModel` in a DDPM or DDIM pipeline folder."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models import adapter_folder, lora
from domainstudio.models.denoiser import Prediction
from domainstudio.models.diffusion_schedule import DiffusionSchedule
from domainstudio.models.folders import read_index, sample_size, save_pipeline
from domainstudio.storage.weights import load_part

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, VQModel
    from torch import Tensor, nn

    from domainstudio.config import NoiseSettings, UNetSettings
    from domainstudio.models.adapters import Adapters
    from domainstudio.models.condition import Condition

    Parts: TypeAlias = tuple[UNet2DModel, DDPMScheduler | DDIMScheduler, str]
    """UNet, scheduler, and the class of the pipeline folder."""


class PixelDenoiser(ABC):
    """A UNet over RGB images: x0 is the image itself, in [-1, 1]. Its kinds differ in their condition.

    Args:
        network: the UNet, with 3 output channels, or 6 where it learns the variance.
        scheduler: the scheduler saved with the model, which plain diffusers will sample with.
        pipeline: the class of the pipeline folder, kept when the model is saved.
    """

    pipelines = frozenset({"DDPMPipeline", "DDIMPipeline"})
    kind: str
    conditional: bool
    name_or_path = ""
    adapters: Adapters | None = None
    classes: tuple[str, ...] = ()
    vae: AutoencoderKL | VQModel | None = None
    text_encoders = ()
    guidance_patch = 0

    def __init__(
        self, network: UNet2DModel, scheduler: DDPMScheduler | DDIMScheduler, pipeline: str = "DDIMPipeline"
    ) -> None:
        self.network: nn.Module = network
        self.scheduler = scheduler
        self.pipeline = pipeline
        noise_scheduler: DDPMScheduler = DDPMScheduler.from_config(scheduler.config)
        self.schedule = DiffusionSchedule(noise_scheduler, "scheduler/scheduler_config.json")
        self._config = network.config

    @classmethod
    def reads(cls, folder: Path) -> bool:
        """Return whether a folder's UNet takes classes if and only if this kind does."""
        return _has_classes(folder) == cls.conditional

    @classmethod
    def load(cls, folder: Path, half: torch.dtype | None = None) -> Self:
        """Read a pipeline folder (see `loading.Kind`)."""
        return cls(*read_parts(folder, half))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        return self._config.in_channels, *sample_size(self._config)

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        return self.shape[1:]

    @property
    def multiple(self) -> int:
        """What sides must be multiples of: the UNet halves them between its levels, the wavelet once."""
        return max(2, 1 << len(self._config.block_out_channels) - 1)

    @property
    def learned_variance(self) -> bool:
        """Whether the network's second half of channels is a variance (improved DDPM)."""
        return bool(self._config.out_channels == 2 * self._config.in_channels)

    def train(
        self, *, unet: bool = True, text_encoders: bool = False, new_tokens: Mapping[str, str] | None = None
    ) -> None:
        """Choose whether the UNet is trained; text is refused (see `Denoiser.train`)."""
        if text_encoders or new_tokens:
            raise ConfigError(
                "the model has no text encoder to train: set finetune.train_text_encoder to false, and no "
                "prompts.new_tokens"
            )
        self.network.requires_grad_(unet)

    def encode(self, images: Tensor) -> Tensor:
        """Return the images themselves."""
        return images

    def x0(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images themselves."""
        return encoded

    def decode(self, x0: Tensor) -> Tensor:
        """Return x0 itself."""
        return x0

    @abstractmethod
    def condition(self, values: Sequence[str], size: tuple[int, int] | None = None) -> Condition:
        """Return the condition of one class each (see `Denoiser.condition`)."""

    def condition_key(self, values: Sequence[str], size: tuple[int, int] | None = None) -> None:
        """Return `None`: there is nothing to keep."""
        return

    def predict(self, xt: Tensor, timesteps: Tensor, condition: Condition) -> Prediction:
        """Return the UNet's prediction, split from the variance where it has one."""
        output = self.network(xt, timesteps, **condition).sample
        if not self.learned_variance:
            return Prediction(output)
        prediction, variance = output.chunk(2, dim=1)
        return Prediction(prediction, variance)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the UNet's activations in the backward pass."""
        self.network.enable_gradient_checkpointing()  # type: ignore[operator]

    def frozen_source(self) -> Self:
        """Return a frozen copy, or the network without adapters."""
        source = copy.copy(self)
        if self.adapters is None:
            source.network = copy.deepcopy(self.network).requires_grad_(False).eval()
        else:
            source.network = lora.SourceView(self.network)
        return source

    def to(self, device: torch.device | str) -> Self:
        """Move the network to a device."""
        self.network.to(device)
        return self

    def save(self, folder: Path, *, half: bool = False) -> None:
        """Write the pipeline folder that `diffusers.DiffusionPipeline.from_pretrained` reads, or adapters."""
        if self.adapters is not None:
            adapter_folder.save(self, folder, self.pipeline, half=half)
            return
        pipeline = getattr(diffusers, self.pipeline)(unet=self.network, scheduler=self.scheduler)
        save_pipeline(pipeline, folder, half=half)


def read_parts(folder: Path, half: torch.dtype | None = None) -> Parts:
    """Read a pipeline folder's parts, the network in float32 or in a type of 16 bits.

    Raises:
        CheckpointError: a part is missing, damaged, not safetensors, or of an unknown kind.
    """
    index = read_index(folder)
    dtype = half or torch.float32
    try:
        network = load_part(UNet2DModel, folder / "unet", local_files_only=True, torch_dtype=dtype)
        scheduler_class = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}[
            index["scheduler"][1]
        ]
        scheduler = scheduler_class.from_pretrained(folder / "scheduler")
        sample_size(network.config, folder / "unet")
    except (OSError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} is not a usable pipeline: {error}. It needs model_index.json, unet/ "
            "with diffusion_pytorch_model.safetensors and scheduler/ of DDPMScheduler or DDIMScheduler"
        ) from error
    return network, scheduler, index["_class_name"]


def new_parts(
    unet: UNetSettings,
    noise: NoiseSettings,
    resolution: int,
    embeddings: int | None = None,
    channels: int = 3,
) -> Parts:
    """Make the untrained parts of a model, initialised from torch's global generator.

    Args:
        unet: the network.
        noise: the forward diffusion.
        resolution: height and width of x0: of images in pixels, or of latents.
        embeddings: rows of the class embedding; `None` makes none.
        channels: channels of x0.
    """
    levels = unet.attention
    network = UNet2DModel(
        sample_size=resolution,
        in_channels=channels,
        out_channels=2 * channels if unet.learned_variance else channels,
        layers_per_block=unet.layers_per_block,
        block_out_channels=unet.block_out_channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in levels),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(levels)),
        attention_head_dim=unet.attention_head_dim,
        norm_num_groups=unet.norm_num_groups,
        dropout=unet.dropout,
        num_class_embeds=embeddings,
    )
    common = {**noise.model_dump(), "timestep_spacing": "trailing"}
    if unet.learned_variance:
        return network, DDPMScheduler(**common, variance_type="learned_range"), "DDPMPipeline"
    return network, DDIMScheduler(**common), "DDIMPipeline"


def _has_classes(folder: Path) -> bool:
    """Return whether a folder's UNet takes a class; false where its configuration cannot be read."""
    try:
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        return bool(config.get("num_class_embeds") or config.get("class_embed_type"))
    except (OSError, ValueError, AttributeError):
        return False
