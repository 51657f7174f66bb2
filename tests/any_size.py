"""Small real models for tests of the families whose networks take images of any size."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from domainstudio.models.flux_1 import Flux1Denoiser
from domainstudio.models.flux_2 import Flux2Denoiser
from domainstudio.models.qwen_image import QwenImageDenoiser
from domainstudio.models.z_image import ZImageDenoiser
from tests.models import TINY_VAE, copied_tokenizer, tiny_t5, tiny_text_encoder, tiny_vae

CHAT_LENGTH = 48
"""Tokens of a prompt for the tiny language models, which read bytes."""


def tiny_z_image_pipeline(seed: int = 0):
    """Return an untrained Z-Image pipeline of 16x16 pixels and 8x8 latents."""
    torch.manual_seed(seed)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    ).eval()
    with torch.no_grad():
        for layer in transformer.layers:
            layer.attention.to_v.weight.mul_(8)  # prompts matter as much as in a trained model
    return diffusers.ZImagePipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(0.3611, shift_factor=0.1159),
        text_encoder=_tiny_qwen("Qwen3Model", 2, 16),
        tokenizer=_tiny_chat_tokenizer(),
    )


def tiny_flux_1_pipeline(seed: int = 0, *, distilled: bool = True):
    """Return an untrained FLUX.1 pipeline of 16x16 pixels and 8x8 latents, told its guidance or not."""
    torch.manual_seed(seed)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=distilled,
    ).eval()
    with torch.no_grad():
        transformer.transformer_blocks[0].attn.add_v_proj.weight.mul_(20)  # prompts matter, as if trained
        transformer.proj_out.weight.mul_(4)
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(0.3611, shift_factor=0.1159),
        text_encoder=tiny_text_encoder("CLIPTextModel", 16),
        tokenizer=copied_tokenizer("<|endoftext|>"),
        text_encoder_2=tiny_t5(48),
        tokenizer_2=copied_tokenizer("!"),
    )


def tiny_flux_2_pipeline(seed: int = 0):
    """Return an untrained Flux.2 klein pipeline of 16x16 pixels and 4x4 positions of packed latents."""
    torch.manual_seed(seed)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()
    with torch.no_grad():
        transformer.transformer_blocks[0].attn.add_v_proj.weight.mul_(40)  # prompts matter, as if trained
        transformer.proj_out.weight.mul_(4)
    vae = diffusers.AutoencoderKLFlux2(**TINY_VAE, latent_channels=4).eval()
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.2, 2.0)
    return diffusers.Flux2KleinPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=_tiny_qwen("Qwen3ForCausalLM", 27, 8),  # the pipeline reads its layers 9, 18 and 27
        tokenizer=_tiny_chat_tokenizer(),
    )


def tiny_qwen_image_pipeline(seed: int = 0):
    """Return an untrained Qwen-Image pipeline of 16x16 pixels and 8x8 latents."""
    torch.manual_seed(seed)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.attn.add_v_proj.weight.mul_(20)  # prompts matter, as if trained
        transformer.proj_out.weight.mul_(4)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.3, 0.1, 0.2, 0.0],
        latents_std=[0.5, 1.5, 0.8, 1.2],
    ).eval()
    vae.register_to_config(sample_size=16)
    words = {
        "vocab_size": len(_tiny_system_tokenizer()),
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    text = {
        **words,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    eyes = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=eyes, tie_word_embeddings=False)
    return diffusers.QwenImagePipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=_tiny_system_tokenizer(),
    )


def _tiny_system_tokenizer():
    """Return a tokenizer of bytes that knows the words of Qwen-Image's template, which are 34 tokens."""
    told = (
        "Describe| the| image| by| detailing| color|,| shape| size| texture| quantity| text| spatial"
        "| relationships| of| objects| and| background|:|system|user"
    )
    tokenizer = _tiny_chat_tokenizer()
    tokenizer.add_tokens(told.split("|"))
    tokenizer.model_max_length = CHAT_LENGTH + 34
    return tokenizer


def _tiny_qwen(name: str, layers: int, width: int):
    config = transformers.Qwen3Config(
        vocab_size=len(_tiny_chat_tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,  # prompts differ as much as in a trained model
        tie_word_embeddings=True,
    )
    return getattr(transformers, name)(config).eval()


def _tiny_chat_tokenizer():
    """Return a tokenizer of bytes with a chat's template, as Qwen3 has it."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*sorted(ByteLevel.alphabet()), *special]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        extra_special_tokens=special[1:],
        model_max_length=CHAT_LENGTH,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% if not enable_thinking %}no{% endif %}{% endif %}"
    )
    return tokenizer


FAMILIES: dict[str, tuple[Any, Any]] = {
    "z-image": (ZImageDenoiser, tiny_z_image_pipeline),
    "flux-1": (Flux1Denoiser, tiny_flux_1_pipeline),
    "flux-1-guided": (Flux1Denoiser, partial(tiny_flux_1_pipeline, distilled=False)),
    "flux-2": (Flux2Denoiser, tiny_flux_2_pipeline),
    "qwen-image": (QwenImageDenoiser, tiny_qwen_image_pipeline),
}
"""Class and untrained pipeline of each family; `flux-1` is distilled for guidance."""
