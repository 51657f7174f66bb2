"""Unconditional models of latents (arXiv 2112.10752): `UNet2DModel` and VAE in an `LDMPipeline` folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DModel, VQModel

from domainstudio.errors import CheckpointError
from domainstudio.models import adapter_folder
from domainstudio.models.folders import read_index, save_pipeline
from domainstudio.models.latents import decode_latents, draw_latents, encode_images, factor
from domainstudio.models.pixel import new_parts, read_parts
from domainstudio.models.unconditional import UnconditionalDenoiser
from domainstudio.storage.weights import load_part

if TYPE_CHECKING:
    from typing import TypeAlias

    from torch import Tensor

    from domainstudio.config import NoiseSettings, UNetSettings

    Encoder: TypeAlias = AutoencoderKL | VQModel

ENCODERS: Mapping[str, type[Encoder]] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


class LatentDenoiser(UnconditionalDenoiser):
    """A UNet without conditions over scaled latents.

    Args:
        network: the UNet.
        scheduler: the scheduler saved with the model.
        vae: encoder and decoder, frozen: `AutoencoderKL`, or a `VQModel` as of CompVis/ldm-celebahq-256.
    """

    kind = "latent"
    vae: Encoder
    pipelines = frozenset({"LDMPipeline"})

    def __init__(self, network: UNet2DModel, scheduler: DDPMScheduler | DDIMScheduler, vae: Encoder) -> None:
        super().__init__(network, scheduler, "LDMPipeline")
        self.vae = vae.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: Path, half: torch.dtype | None = None) -> Self:
        """Read a pipeline folder (see `loading.Kind`)."""
        network, scheduler, _ = read_parts(folder, half)
        return cls(network, scheduler, read_encoder(folder / "vqvae", _encoder_kind(folder)))

    @classmethod
    def around(
        cls, vae: Encoder, unet: UNetSettings, noise: NoiseSettings, resolution: int
    ) -> LatentDenoiser:
        """Make an untrained model of a trained VAE's latents, initialised from torch's global generator.

        Args:
            vae: the VAE, with its scaling factor.
            unet: the network.
            noise: the forward diffusion.
            resolution: height and width of the images, in pixels.
        """
        side = resolution // factor(vae)
        network, scheduler, _ = new_parts(unet, noise, side, channels=vae.config.latent_channels)
        # latents have no range, unlike images
        return cls(network, type(scheduler).from_config(scheduler.config, clip_sample=False), vae)

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        _, height, width = self.shape
        return height * factor(self.vae), width * factor(self.vae)

    @property
    def multiple(self) -> int:
        """What sides must be multiples of: the VAE divides them, then the UNet halves them."""
        return super().multiple * factor(self.vae)

    def encode(self, images: Tensor) -> Tensor:
        """Return mean and standard deviation of the latents, with shape (N, 2C, H, W); a VQ model's is 0."""
        return encode_images(images, self.vae)

    def x0(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """Draw latents with a CPU generator, moved and scaled as the UNet expects them."""
        return draw_latents(encoded, self.vae, generator)

    def decode(self, x0: Tensor) -> Tensor:
        """Return the images of scaled latents; gradients flow through the frozen VAE."""
        return decode_latents(x0, self.vae)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations of the UNet and of the decoder."""
        super().enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    def to(self, device: torch.device | str) -> Self:
        """Move both parts to a device."""
        self.vae.to(device)
        return super().to(device)

    def save(self, folder: Path, *, half: bool = False) -> None:
        """Write the pipeline folder that `diffusers.DiffusionPipeline.from_pretrained` reads, or adapters."""
        if self.adapters is not None:
            adapter_folder.save(self, folder, self.pipeline, half=half)
            return
        pipeline = diffusers.LDMPipeline(vqvae=self.vae, unet=self.network, scheduler=self.scheduler)
        save_pipeline(pipeline, folder, half=half)


def read_encoder(folder: Path, kind: type[Encoder]) -> Encoder:
    """Read an encoder and decoder in float32.

    A VQ model whose configuration names no scaling factor is older than that setting of diffusers, and its
    latents are not scaled. So is CompVis/ldm-celebahq-256, to which newer versions of diffusers give the
    factor of Stable Diffusion (github.com/huggingface/diffusers/issues/6725).

    Args:
        folder: with `config.json` and weights as safetensors.
        kind: its class.

    Raises:
        CheckpointError: it is missing, damaged, not safetensors, or of another kind.
    """
    try:
        config = folder / "config.json"
        if not config.is_file():  # diffusers would look for a model of that name on the hub
            raise FileNotFoundError(f"there is no {config}")
        encoder: Encoder = load_part(kind, folder, torch_dtype=torch.float32)
        if kind is VQModel and "scaling_factor" not in kind.load_config(folder):
            encoder.register_to_config(scaling_factor=1.0)
    except (OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} is not a usable {kind.__name__}: {error}. It needs config.json and "
            "diffusion_pytorch_model.safetensors"
        ) from error
    return encoder


def _encoder_kind(folder: Path) -> type[Encoder]:
    name = read_index(folder).get("vqvae", ["", ""])[1]
    if name not in ENCODERS:
        raise CheckpointError(f"{folder} encodes with {name!r}; these are known: {', '.join(ENCODERS)}")
    return ENCODERS[name]
