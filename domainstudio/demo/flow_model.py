"""A small flow-matching model of one's own: SD3's transformer around a text model's VAE and text encoder."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn

if TYPE_CHECKING:
    from domainstudio.config import FlowModelSettings


_GATES = ("norm1.linear", "norm1_context.linear", "proj_out")
"""Layers whose outputs gate the others'."""


def new_flow_pipeline(settings: FlowModelSettings, text: Any) -> StableDiffusion3Pipeline:
    """Return an untrained transformer around trained parts, initialised from torch's global generator.

    SD3's layout has three text encoders. The one of the text model is the first and the second, T5 is left
    out, and its tokenizer says that one token of zeros stands for it. So plain diffusers draws the same with
    `max_sequence_length=1`.

    Args:
        settings: sizes of the transformer.
        text: a `StableDiffusionPipeline`; its VAE and text encoder are shared.
    """
    vae, tokenizer = text.vae, text.tokenizer
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it
    encoder = _with_projection(text.text_encoder)
    no_t5 = copy.deepcopy(tokenizer)
    no_t5.model_max_length = 1
    return StableDiffusion3Pipeline(
        transformer=_new_transformer(settings, text, 2 * encoder.config.hidden_size),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=settings.shift),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=copy.deepcopy(encoder),
        tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None,
        tokenizer_3=no_t5,
    )


def _with_projection(encoder: Any) -> Any:
    """Return CLIP's text encoder with a projection of its pooled output that changes nothing."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = encoder.config.hidden_size
    config = CLIPTextConfig(**{**encoder.config.to_dict(), "projection_dim": width})
    projected = CLIPTextModelWithProjection(config).float()  # the folder's precision is in its config
    projected.text_model.load_state_dict(getattr(encoder, "text_model", encoder).state_dict())
    nn.init.eye_(projected.text_projection.weight)
    return projected.eval()


def _new_transformer(settings: FlowModelSettings, text: Any, width: int) -> SD3Transformer2DModel:
    side, channels = text.unet.config.sample_size, text.vae.config.latent_channels
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=settings.patch_size,
        in_channels=channels,
        out_channels=channels,
        num_layers=settings.num_layers,
        attention_head_dim=settings.attention_head_dim,
        num_attention_heads=settings.num_attention_heads,
        joint_attention_dim=width,
        caption_projection_dim=settings.num_attention_heads * settings.attention_head_dim,
        pooled_projection_dim=width,
        pos_embed_max_size=side // settings.patch_size,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        # every block starts as the identity (adaLN-Zero of DiT, arXiv 2212.09748, section 3.2)
        if isinstance(module, nn.Linear) and name.endswith(_GATES):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer
