"""Small real models for tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from domainstudio.config import LossWeights, NoiseSettings, TrainingSettings, UNetSettings
from domainstudio.data import ImageRecord, ImageSet
from domainstudio.metrics.features import Features
from domainstudio.models.class_conditional import ClassConditionalDenoiser
from domainstudio.models.latent import LatentDenoiser
from domainstudio.models.unconditional import UnconditionalDenoiser

RESOLUTION = 8
CLASSES = ("animal", "face", "person")


def close(a, b) -> None:
    """Assert that two models computed the same. The last bits depend on where in memory they do it."""
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=2e-5, rtol=1e-4)


def tiny_denoiser(seed: int = 0, *, learned_variance: bool = False, **noise) -> UnconditionalDenoiser:
    """Return an untrained UNet of 8x8 pixels with attention."""
    torch.manual_seed(seed)
    return UnconditionalDenoiser.new(_tiny_unet(learned_variance), NoiseSettings(**noise), RESOLUTION)


def tiny_class_denoiser(
    classes: Sequence[str] = CLASSES, seed: int = 0, *, learned_variance: bool = False, **noise
) -> ClassConditionalDenoiser:
    """Return the same UNet with classes and a null class, untrained."""
    torch.manual_seed(seed)
    unet = _tiny_unet(learned_variance)
    return ClassConditionalDenoiser.new(unet, NoiseSettings(**noise), RESOLUTION, classes)


def _tiny_unet(learned_variance: bool) -> UNetSettings:
    return UNetSettings(
        block_out_channels=(8, 16),
        attention=(False, True),
        attention_head_dim=8,
        norm_num_groups=4,
        learned_variance=learned_variance,
    )


def tiny_latent_denoiser(seed: int = 0, *, quantized: bool = False, **noise: Any) -> LatentDenoiser:
    """Return an untrained UNet of the 8x8 latents of an untrained VAE or VQ model, for images of 16x16."""
    torch.manual_seed(0)
    vae = _tiny_vq_model() if quantized else tiny_vae(0.5)
    torch.manual_seed(seed)
    return LatentDenoiser.around(vae, _tiny_unet(False), NoiseSettings(**noise), TEXT_RESOLUTION)


def tiny_images(number: int = 6, seed: int = 0, side: int = RESOLUTION) -> np.ndarray:
    """Return random uint8 images, with shape (number, 3, side, side)."""
    return np.random.default_rng(seed).integers(0, 256, (number, 3, side, side), dtype=np.uint8)


def image_set(
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    origin: str = "images",
    labels: Sequence[str | None] | None = None,
) -> ImageSet:
    """Return a set of these images, with the hashes of their pixels and, where given, captions and labels."""
    number, side = len(images), images.shape[-1]
    texts = zip(images, captions or [""] * number, labels or [None] * number, strict=True)
    records = tuple(
        ImageRecord(str(i), sha256(image.tobytes()).hexdigest(), side, side, f"{i}.png", caption, label)
        for i, (image, caption, label) in enumerate(texts)
    )
    return ImageSet(images, records, origin)


def training_settings(**changes) -> TrainingSettings:
    """Return settings of a training of a few steps."""
    return TrainingSettings(
        **{"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2, **changes}
    )


class Averages:
    """A feature network small enough to check by hand: mean colour, and the pixels themselves."""

    name, digest, recipe = "averages", "0", "plain"

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        x = images.float() / 255
        return Features(self.name, self.digest, x.mean((2, 3)).numpy(), x.flatten(1).numpy())


PLAIN = LossWeights()
DOMAINSTUDIO = LossWeights(image=0.5, high_frequency=0.5, high_frequency_mse=0.05)
PAIRWISE_L2 = LossWeights(pairwise_l2=0.5, laplacian=0.5, reconstruction=1.0)


PROMPTS = ["a red house", "a small boat", "two green trees", "a dog in the snow", "a blue cup", "the moon"]
PROMPT_LENGTH = 16
TEXT_RESOLUTION = 16
"""Pixels of the tiny text-to-image models' images; their latents have half of it."""

_SCHEDULE = {  # of the published folders
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "skip_prk_steps": True,
}
_SCHEDULES = {
    "sd1": ("PNDMScheduler", {}),
    "sd2": ("DDIMScheduler", {"prediction_type": "v_prediction"}),
    "demo": ("DDIMScheduler", {"prediction_type": "v_prediction"}),
    "sdxl": ("EulerDiscreteScheduler", {"prediction_type": "epsilon", "timestep_spacing": "leading"}),
}


def tiny_text_pipeline(kind: str = "sd1", seed: int = 0):
    """Return an untrained diffusers pipeline of 16x16 pixels and 8x8 latents.

    Args:
        kind: `sd1` (ε), `sd2` (v), `demo` (v, and the text beside the timestep) or `sdxl` (two text
            encoders, ε).
        seed: of the weights.
    """
    import diffusers

    torch.manual_seed(seed)
    name, options = _SCHEDULES[kind]
    parts = {
        "vae": tiny_vae(0.13025 if kind == "sdxl" else 0.18215),
        "unet": _tiny_text_unet(kind),
        "scheduler": getattr(diffusers, name).from_config({**_SCHEDULE, **options}),
        "tokenizer": copied_tokenizer("!" if kind == "sd2" else "<|endoftext|>"),
        "text_encoder": tiny_text_encoder("CLIPTextModel", 16),
    }
    if kind == "sdxl":
        parts["tokenizer_2"] = copied_tokenizer("!")
        parts["text_encoder_2"] = tiny_text_encoder("CLIPTextModelWithProjection", 24)
        return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def tiny_sd3_pipeline(seed: int = 0, *, t5: bool = True):
    """Return an untrained SD3 pipeline of 16x16 pixels and 8x8 latents, with T5 or without.

    Prompts have `PROMPT_LENGTH` tokens for all text encoders.
    """
    import diffusers

    torch.manual_seed(seed)
    return diffusers.StableDiffusion3Pipeline(
        transformer=_tiny_sd3_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(1.5305, shift_factor=0.0609),
        text_encoder=tiny_text_encoder("CLIPTextModelWithProjection", 16),
        tokenizer=copied_tokenizer("<|endoftext|>"),
        text_encoder_2=tiny_text_encoder("CLIPTextModelWithProjection", 24),
        tokenizer_2=copied_tokenizer("!"),
        text_encoder_3=tiny_t5(48) if t5 else None,
        tokenizer_3=copied_tokenizer("!") if t5 else None,
    )


def tiny_pixart_pipeline(seed: int = 0, *, alpha: bool = False, sized: bool = False):
    """Return an untrained PixArt-Σ (or α) pipeline of 16x16 pixels, told the image's size or not."""
    import diffusers

    torch.manual_seed(seed)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=TEXT_RESOLUTION // 2,
        num_layers=2,
        attention_head_dim=18,  # a third of all channels tells resolution and aspect ratio
        num_attention_heads=2,
        cross_attention_dim=36,
        in_channels=4,
        out_channels=8,
        caption_channels=48,
        use_additional_conditions=sized,
    ).eval()
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.attn2.to_v.weight.mul_(30.0)  # prompts matter as much as in a trained model
    kind = diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline
    return kind(
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear"),
        vae=tiny_vae(0.13025),
        text_encoder=tiny_t5(48),
        tokenizer=copied_tokenizer("!"),
    )


def tiny_text_denoiser(kind: str = "sd1", seed: int = 0):
    """Return an untrained model of 16x16 pixels, of any family or one of `tiny_text_pipeline`."""
    from domainstudio.models.pixart import PixArtDenoiser
    from domainstudio.models.stable_diffusion import StableDiffusionDenoiser
    from domainstudio.models.stable_diffusion_3 import StableDiffusion3Denoiser
    from tests.any_size import FAMILIES

    if kind in FAMILIES:
        family, make = FAMILIES[kind]
        return family(make(seed), f"tiny-{kind}")
    if kind == "pixart":
        return PixArtDenoiser(tiny_pixart_pipeline(seed), "tiny-pixart")
    if kind == "sd3":
        return StableDiffusion3Denoiser(tiny_sd3_pipeline(seed), "tiny-sd3")
    return StableDiffusionDenoiser(tiny_text_pipeline(kind, seed), f"tiny-{kind}")


def tiny_text_images(number: int = 6, seed: int = 0) -> np.ndarray:
    """Return random uint8 images, with shape (number, 3, 16, 16)."""
    return tiny_images(number, seed, TEXT_RESOLUTION)


TINY_VAE: dict[str, Any] = {
    "sample_size": TEXT_RESOLUTION,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def tiny_vae(scaling_factor: float, **options: Any):
    from diffusers import AutoencoderKL

    return AutoencoderKL(**TINY_VAE, scaling_factor=scaling_factor, **options).eval()


def _tiny_vq_model():
    from diffusers import VQModel

    return VQModel(
        sample_size=TEXT_RESOLUTION,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).eval()


def _tiny_text_unet(kind: str):
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {"cross_attention_dim": 16}
    if kind == "sdxl":
        options = {
            "cross_attention_dim": 16 + 24,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 12,
        }
    elif kind == "demo":
        options |= {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    unet = UNet2DConditionModel(
        sample_size=TEXT_RESOLUTION // 2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        use_linear_projection=kind != "sd1",
        **options,
    ).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2.to_v" in name:  # prompts matter as much as in a trained model
                parameter.mul_(8)
    return unet


def _tiny_sd3_transformer():
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=TEXT_RESOLUTION // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=16,
    ).eval()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if (
                "add_v_proj" in name or "norm_out" in name or name.startswith("proj_out")
            ) and "weight" in name:
                parameter.mul_(8)  # prompts matter as much as in a trained model
    return transformer


def tiny_t5(width: int):
    from transformers import T5Config, T5EncoderModel

    tokenizer = _tiny_tokenizer("!")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


@cache
def _tiny_tokenizer(pad: str):
    from domainstudio.demo.text_model import new_tokenizer

    tokenizer = new_tokenizer(PROMPTS, 600, PROMPT_LENGTH)
    tokenizer.pad_token = pad
    return tokenizer


def copied_tokenizer(pad: str):
    return copy.deepcopy(_tiny_tokenizer(pad))  # a test may add tokens to it


def tiny_text_encoder(name: str, width: int):
    import transformers

    tokenizer = _tiny_tokenizer("!")
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return getattr(transformers, name)(config).eval()
