"""Published models as denoisers, untrained, so that the project's own trainer can take a step with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import diffusers
import torch
import transformers
from torch import Tensor, nn

from benchmarks import published
from domainstudio.models import lora
from domainstudio.models.denoiser import Denoiser, Prediction
from domainstudio.models.flow_schedule import FlowSchedule
from domainstudio.models.latents import decode_latents, draw_latents, encode_images
from domainstudio.models.stable_diffusion import StableDiffusionDenoiser

LATENT = 8
"""Pixels along a side that a latent of each of these VAEs stands for."""

TOKENS = {"sd15": 77, "sdxl": 77, "sd35-medium": 77 + 256, "flux2-klein": 512, "z-image": 128}
"""Tokens of a prompt: those of the pipelines. Z-Image takes as many as a prompt has; this is a long one."""


def denoiser(model: str, resolution: int) -> Denoiser:
    """Return an untrained published model.

    Args:
        model: a key of `published.DENOISERS`.
        resolution: height and width of the images, in pixels.
    """
    network, vae = published.denoiser(model), published.vae(model)
    if model not in published.TEXT_ENCODERS:
        return cast("Denoiser", BareDenoiser(model, network, vae, resolution))
    network.register_to_config(sample_size=resolution // LATENT)  # type: ignore[operator]
    return StableDiffusionDenoiser(_pipeline(model, network, vae), model)


def condition(model: str, rows: int, resolution: int) -> dict[str, Tensor]:
    """Return encoded prompts of a model, with shape (rows, 1, ...)."""
    config = published.DENOISERS[model][1]
    names = ("cross_attention_dim", "joint_attention_dim", "cap_feat_dim")
    width = next(config[name] for name in names if name in config)
    made = {"encoder_hidden_states": torch.zeros(rows, 1, TOKENS[model], width)}
    if model == "sdxl":
        made["text_embeds"] = torch.zeros(rows, 1, 1280)
        made["time_ids"] = torch.full((rows, 1, 6), float(resolution))
    if model == "sd35-medium":
        made["text_embeds"] = torch.zeros(rows, 1, config["pooled_projection_dim"])
    return made


def _pipeline(model: str, unet: nn.Module, vae: nn.Module) -> Any:
    parts: dict[str, Any] = {
        "unet": unet,
        "vae": vae,
        "scheduler": diffusers.DDPMScheduler(steps_offset=1, clip_sample=False),
    }
    kinds = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    for suffix, kind, config in zip(("", "_2"), kinds, published.TEXT_ENCODERS[model], strict=False):
        parts[f"tokenizer{suffix}"] = transformers.CLIPTokenizer()
        parts[f"text_encoder{suffix}"] = kind(transformers.CLIPTextConfig(**config))
    if model == "sdxl":
        return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**parts, **options)


class _Network(nn.Module):
    """A transformer called as its family's pipeline calls it, under the name of the part that is trained."""

    def __init__(self, model: str, transformer: nn.Module) -> None:
        super().__init__()
        self.model, self.unet = model, transformer

    def forward(self, xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        text = condition["encoder_hidden_states"]
        if self.model == "sd35-medium":
            options = {"timestep": timesteps, "pooled_projections": condition["text_embeds"]}
            output: Tensor = self.unet(xt, encoder_hidden_states=text, **options).sample
            return output
        if self.model == "z-image":
            listed = self.unet(list(xt[:, :, None].unbind()), timesteps / 1000, list(text.unbind())).sample
            return torch.stack(listed)[:, :, 0]
        tokens, places = xt.flatten(2).transpose(1, 2), torch.zeros(xt.shape[2] * xt.shape[3], 4)
        output = self.unet(
            tokens, text, timesteps / 1000, img_ids=places, txt_ids=torch.zeros(text.shape[1], 4)
        ).sample
        return output.transpose(1, 2).reshape(xt.shape)


@dataclass
class BareDenoiser:
    """What a training step asks of a denoiser, for a model of flow matching."""

    model: str
    transformer: nn.Module
    vae: Any
    side: int

    kind = "bare"
    conditional = True
    classes = ()
    text_encoders = ()
    learned_variance = False
    name_or_path = ""
    adapters: Any = None

    def __post_init__(self) -> None:
        self.network: nn.Module = _Network(self.model, self.transformer)
        self.vae.requires_grad_(False).eval()
        self.schedule = FlowSchedule(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
        self.packed = 2 if self.model == "flux2-klein" else 1
        if not hasattr(self.vae.config, "scaling_factor"):
            self.vae.register_to_config(scaling_factor=1.0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one latent."""
        side = self.side // LATENT // self.packed
        return self.vae.config.latent_channels * self.packed**2, side, side

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of its images."""
        return self.side, self.side

    @property
    def multiple(self) -> int:
        """What sides must be multiples of."""
        return 2 * LATENT

    def train(self, **_: Any) -> None:
        """Train the whole network."""
        self.network.requires_grad_(True)

    def encode(self, images: Tensor) -> Tensor:
        """Return mean and deviation of the latents."""
        return encode_images(images, self.vae)

    def x0(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """Return latents, packed as the network takes them."""
        return nn.functional.pixel_unshuffle(draw_latents(encoded, self.vae, generator), self.packed)

    def decode(self, x0: Tensor) -> Tensor:
        """Return the images of latents."""
        return decode_latents(nn.functional.pixel_shuffle(x0, self.packed), self.vae)

    def predict(self, xt: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Prediction:
        """Return the network's prediction."""
        return Prediction(self.network(xt, timesteps, condition))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations of network and VAE."""
        self.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        self.vae.enable_gradient_checkpointing()

    def frozen_source(self) -> Self:
        """Return a frozen copy, or the network without adapters."""
        source = copy.copy(self)
        if self.adapters is not None:
            source.network = lora.SourceView(self.network)
        else:
            source.network = copy.deepcopy(self.network).eval().requires_grad_(False)
        return source

    def to(self, device: torch.device | str) -> Self:
        """Move both parts."""
        self.network.to(device)
        self.vae.to(device)
        return self
