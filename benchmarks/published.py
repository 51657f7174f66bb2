"""Published models by their sizes: what their `config.json` files say, without any weights.

The numbers are those of each pipeline's folder on the hub, under the name in `REPOSITORIES`. They are enough
to build the networks, count their parameters, and plan a training (`benchmarks.plan`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from torch import nn

REPOSITORIES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "flux2-klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "z-image": "Tongyi-MAI/Z-Image",
    "qwen-image": "Qwen/Qwen-Image",
}

_UNET_CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)

DENOISERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sd15": (
        "UNet2DConditionModel",
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": _UNET_CROSS,
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "sd35-medium": (
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "flux2-klein": (
        "Flux2Transformer2DModel",
        {
            "in_channels": 128,
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {"dim": 3840, "n_layers": 30, "n_heads": 30, "cap_feat_dim": 2560},
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        {
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 3584,
        },
    ),
}
"""Class in diffusers and configuration of each network that denoises."""

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_FLOW_VAE = {**_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

VAES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sd15": ("AutoencoderKL", {**_VAE, "sample_size": 512, "scaling_factor": 0.18215}),
    "sdxl": ("AutoencoderKL", {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025}),
    "sd35-medium": (
        "AutoencoderKL",
        {**_FLOW_VAE, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    ),
    "flux2-klein": ("AutoencoderKLFlux2", {"sample_size": 1024}),
    "z-image": (
        "AutoencoderKL",
        {**_FLOW_VAE, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    ),
    "qwen-image": ("AutoencoderKLQwenImage", {"base_dim": 96, "z_dim": 16}),
}
"""Class in diffusers and configuration of each VAE."""

_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}

TEXT_ENCODERS: Mapping[str, tuple[Mapping[str, int], ...]] = {"sd15": (_CLIP_L,), "sdxl": (_CLIP_L, _CLIP_G)}
"""CLIP's text encoders, of the models whose encoders may be trained. Others' prompts are encoded before."""


def denoiser(model: str) -> nn.Module:
    """Return the untrained network of a published model."""
    return _built(*DENOISERS[model])


def vae(model: str) -> nn.Module:
    """Return the untrained VAE of a published model."""
    return _built(*VAES[model])


def _built(name: str, config: Mapping[str, Any]) -> nn.Module:
    network: nn.Module = getattr(diffusers, name)(**config)
    return network
