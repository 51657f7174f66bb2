"""Published models as denoisers, untrained, so that the project's own trainer can take a step with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from benchmarks import published
from domainstudio.models.flux_2 import Flux2Denoiser
from domainstudio.models.language_model import LanguageModelDenoiser
from domainstudio.models.qwen_image import ConditionedQwenImage, QwenImageDenoiser
from domainstudio.models.stable_diffusion import StableDiffusionDenoiser
from domainstudio.models.stable_diffusion_3 import StableDiffusion3Denoiser
from domainstudio.models.z_image import ConditionedZImage, ZImageDenoiser

if TYPE_CHECKING:
    from domainstudio.models.text_to_image import TextToImageDenoiser

LATENT = 8
"""Pixels along a side that a latent of each of these VAEs stands for."""

TOKENS = {
    "sd15": 77,
    "sdxl": 77,
    "sd35-medium": 77 + 256,
    "flux2-klein": 512,
    "z-image": 128,
    "qwen-image": 128,
}
"""Tokens of a prompt: those of the pipelines. Z-Image and Qwen-Image take as many as a prompt has; this is a
long one."""


class _WholePrompts(ConditionedZImage):
    """Z-Image, whose prompts have no padding to cut off: fake tensors cannot say how long each is."""

    def texts(self, condition: Mapping[str, Tensor]) -> list[Tensor]:
        return list(condition["prompt_embeds"].unbind())


class _PlannedZImage(ZImageDenoiser):
    network_class = _WholePrompts


class _WholeQwenPrompts(ConditionedQwenImage):
    """Qwen-Image, in the same way."""

    def texts(self, condition: Mapping[str, Tensor]) -> tuple[Tensor, None]:
        return condition["prompt_embeds"], None


class _PlannedQwenImage(QwenImageDenoiser):
    network_class = _WholeQwenPrompts


def denoiser(model: str, resolution: int) -> TextToImageDenoiser:
    """Return an untrained published model.

    Args:
        model: a key of `published.DENOISERS`.
        resolution: height and width of the images, in pixels.
    """
    network: Any = published.denoiser(model)
    vae: Any = published.vae(model)
    if "sample_size" in network.config:
        network.register_to_config(sample_size=resolution // LATENT)
    vae.register_to_config(sample_size=resolution)
    kind, make = _FAMILIES[model]
    made: TextToImageDenoiser = kind(make(model, network, vae), model)
    return made


def condition(model: str, rows: int, resolution: int) -> dict[str, Tensor]:
    """Return encoded prompts of a model, with shape (rows, 1, ...)."""
    config = published.DENOISERS[model][1]
    widths = ("cross_attention_dim", "joint_attention_dim", "cap_feat_dim")
    width = next(config[name] for name in widths if name in config)
    by_language_model = issubclass(_FAMILIES[model][0], LanguageModelDenoiser)
    name = "prompt_embeds" if by_language_model else "encoder_hidden_states"
    made = {name: torch.zeros(rows, 1, TOKENS[model], width)}
    if model == "sdxl":
        made["text_embeds"] = torch.zeros(rows, 1, 1280)
        made["time_ids"] = torch.full((rows, 1, 6), float(resolution))
    if model == "sd35-medium":
        made["pooled_projections"] = torch.zeros(rows, 1, config["pooled_projection_dim"])
    return made


def _stable_diffusion(model: str, unet: nn.Module, vae: nn.Module) -> Any:
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


def _stable_diffusion_3(model: str, transformer: nn.Module, vae: nn.Module) -> Any:
    parts: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    for suffix, width in (("", 768), ("_2", 1280)):
        config = transformers.CLIPTextConfig(**_AWAY, projection_dim=width)
        parts[f"text_encoder{suffix}"] = transformers.CLIPTextModelWithProjection(config)
        parts[f"tokenizer{suffix}"] = transformers.CLIPTokenizer()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts)


def _told_by_qwen(model: str, transformer: nn.Module, vae: nn.Module) -> Any:
    flux = model == "flux2-klein"
    config = transformers.Qwen3Config(**{**_AWAY, "hidden_size": 2560}, num_key_value_heads=1, head_dim=2)
    encoder = (transformers.Qwen3ForCausalLM if flux else transformers.Qwen3Model)(config)
    shift: dict[str, Any] = {"use_dynamic_shifting": True} if flux else {"shift": 3.0}
    return (diffusers.Flux2KleinPipeline if flux else diffusers.ZImagePipeline)(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shift),
        text_encoder=encoder,
        tokenizer=transformers.Qwen2Tokenizer(),
    )


def _told_by_qwen_vl(model: str, transformer: nn.Module, vae: nn.Module) -> Any:
    text = {**_AWAY, "hidden_size": 3584, "num_key_value_heads": 1}
    eyes = {"depth": 0, "hidden_size": 2, "intermediate_size": 2, "num_heads": 1, "out_hidden_size": 2}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=eyes)
    return diffusers.QwenImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=transformers.Qwen2Tokenizer(),
    )


_AWAY: dict[str, Any] = {
    "vocab_size": 2,
    "hidden_size": 2,
    "intermediate_size": 2,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "max_position_embeddings": 2,
}
"""Of text encoders that are away during training: next to nothing is left of them."""

_FAMILIES: Mapping[str, tuple[Any, Any]] = {
    "sd15": (StableDiffusionDenoiser, _stable_diffusion),
    "sdxl": (StableDiffusionDenoiser, _stable_diffusion),
    "sd35-medium": (StableDiffusion3Denoiser, _stable_diffusion_3),
    "flux2-klein": (Flux2Denoiser, _told_by_qwen),
    "z-image": (_PlannedZImage, _told_by_qwen),
    "qwen-image": (_PlannedQwenImage, _told_by_qwen_vl),
}
"""The project's class of each model, and what makes its pipeline."""
