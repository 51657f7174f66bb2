"""Unconditional pixel-space models: `diffusers.UNet2DModel` in a DDPM or DDIM pipeline folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

from domainstudio.errors import CheckpointError
from domainstudio.models.denoiser import Prediction
from domainstudio.models.diffusion import check_prediction_type

if TYPE_CHECKING:
    from torch import Tensor, nn

    from domainstudio.config import NoiseSettings, UNetSettings

PIPELINES = {"DDPMPipeline", "DDIMPipeline"}


class UnconditionalDenoiser:
    """A UNet over RGB images: x0 is the image itself, in [-1, 1].

    Args:
        network: the UNet, with 3 output channels, or 6 where it learns the variance.
        scheduler: the scheduler saved with the model, which plain diffusers will sample with.
        pipeline: the class of the pipeline folder, kept when the model is saved.
    """

    def __init__(
        self, network: UNet2DModel, scheduler: DDPMScheduler | DDIMScheduler, pipeline: str = "DDIMPipeline"
    ) -> None:
        self.network: nn.Module = network
        self.scheduler = scheduler
        self.pipeline = pipeline
        self.noise_scheduler = DDPMScheduler.from_config(scheduler.config)
        self._config = network.config
        check_prediction_type(self.noise_scheduler, "scheduler/scheduler_config.json")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        size = self._config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self._config.in_channels, height, width

    @property
    def learned_variance(self) -> bool:
        """Whether the network's second half of channels is a variance (improved DDPM)."""
        return bool(self._config.out_channels == 2 * self._config.in_channels)

    def encode(self, images: Tensor) -> Tensor:
        """Return the images themselves."""
        return images

    def decode(self, x0: Tensor) -> Tensor:
        """Return x0 itself."""
        return x0

    def predict(self, xt: Tensor, timesteps: Tensor, condition: Any = None) -> Prediction:
        """Return the UNet's prediction, split from the variance where it has one."""
        output = self.network(xt, timesteps).sample
        if not self.learned_variance:
            return Prediction(output)
        prediction, variance = output.chunk(2, dim=1)
        return Prediction(prediction, variance)

    def to(self, device: torch.device | str) -> UnconditionalDenoiser:
        """Move the network to a device."""
        self.network.to(device)
        return self

    def save(self, folder: Path, *, half: bool = False) -> None:
        """Write the pipeline folder that `diffusers.DiffusionPipeline.from_pretrained` reads."""
        network = self.network
        if half:
            network = UNet2DModel.from_config(network.config)
            network.load_state_dict(self.network.state_dict())
            network.half()
        pipeline = getattr(diffusers, self.pipeline)(unet=network, scheduler=self.scheduler)
        pipeline.save_pretrained(folder, safe_serialization=True)

    @classmethod
    def load(cls, folder: Path, index: dict[str, Any]) -> UnconditionalDenoiser:
        """Read a pipeline folder in float32.

        Args:
            folder: the pipeline folder.
            index: its `model_index.json`.

        Raises:
            CheckpointError: a part is missing, damaged, not safetensors, or of an unknown kind.
        """
        try:
            network = UNet2DModel.from_pretrained(
                folder / "unet", use_safetensors=True, torch_dtype=torch.float32
            )
            scheduler_class = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}[
                index["scheduler"][1]
            ]
            scheduler = scheduler_class.from_pretrained(folder / "scheduler")
        except (OSError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder} is not a usable unconditional pipeline: {error}. It needs model_index.json, unet/ "
                "with diffusion_pytorch_model.safetensors and scheduler/ of DDPMScheduler or DDIMScheduler"
            ) from error
        if network.config.num_class_embeds or network.config.class_embed_type:
            raise CheckpointError(f"{folder} is class-conditional; this version adapts unconditional models")
        return cls(network, scheduler, index["_class_name"])

    @classmethod
    def new(cls, unet: UNetSettings, noise: NoiseSettings, resolution: int) -> UnconditionalDenoiser:
        """Make an untrained model, initialised from torch's global generator."""
        levels = unet.attention
        network = UNet2DModel(
            sample_size=resolution,
            in_channels=3,
            out_channels=6 if unet.learned_variance else 3,
            layers_per_block=unet.layers_per_block,
            block_out_channels=unet.block_out_channels,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in levels),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(levels)),
            attention_head_dim=unet.attention_head_dim,
            norm_num_groups=unet.norm_num_groups,
            dropout=unet.dropout,
        )
        common = {
            **noise.model_dump(),
            "timestep_spacing": "trailing",
        }
        if unet.learned_variance:
            return cls(network, DDPMScheduler(**common, variance_type="learned_range"), "DDPMPipeline")
        return cls(network, DDIMScheduler(**common), "DDIMPipeline")
