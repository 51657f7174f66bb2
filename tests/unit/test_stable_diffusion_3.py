"""Stable Diffusion 3's parts and prompts: what is refused, what is cut, and what can be trained."""

import pytest
import torch
from diffusers import DDIMScheduler

from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models.stable_diffusion_3 import StableDiffusion3Denoiser
from tests.models import PROMPT_LENGTH, tiny_sd3_pipeline, tiny_text_denoiser


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("text_encoder_3", {"d_model": 24}, "reads text of 48 channels and text_encoder_3 makes 24"),
        (
            "text_encoder_2",
            {"projection_dim": 8},
            "reads 24 channels of pooled text and the text encoders make 20",
        ),
        (
            "vae",
            {"latent_channels": 16},
            "makes latents of 16 channels, the transformer reads 4 and writes 4",
        ),
    ],
)
def test_parts_of_different_models_are_refused(part, values, message):
    pipeline = tiny_sd3_pipeline()
    config = getattr(pipeline, part).config
    if part == "vae":
        pipeline.vae.register_to_config(**values)
    else:
        config.update(values)
    with pytest.raises(CheckpointError, match=f"here: the .*{message}: the parts belong"):
        StableDiffusion3Denoiser(pipeline, "here")


def test_a_scheduler_of_another_family_is_refused():
    pipeline = tiny_sd3_pipeline()
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(CheckpointError, match=r"here/scheduler is a DDIMScheduler, which is not of flow"):
        StableDiffusion3Denoiser(pipeline, "here")


def test_t5_reads_what_is_cut_for_the_clips_and_without_it_nothing_is_cut():
    pipeline, long = tiny_sd3_pipeline(), "a red house " * 6  # 20 tokens
    pipeline.tokenizer_3.model_max_length = 2 * PROMPT_LENGTH
    denoiser = StableDiffusion3Denoiser(pipeline, "with T5")
    told = denoiser.condition([long])["encoder_hidden_states"]
    assert told.shape == (1, 3 * PROMPT_LENGTH, 48)
    shorter = denoiser.condition(["a red house " * 5 + "a"])["encoder_hidden_states"]
    torch.testing.assert_close(told[:, :PROMPT_LENGTH], shorter[:, :PROMPT_LENGTH])
    assert not torch.allclose(told[:, PROMPT_LENGTH:], shorter[:, PROMPT_LENGTH:])
    with pytest.raises(ConfigError, match=r"has \d+ tokens and the model takes 32"):
        denoiser.condition([long * 2])
    without = StableDiffusion3Denoiser(tiny_sd3_pipeline(t5=False), "without")
    with pytest.raises(ConfigError, match=r"has 20 tokens and the model takes 16"):
        without.condition([long])


def test_new_words_and_training_are_for_the_clips():
    denoiser = tiny_text_denoiser("sd3")
    denoiser.train(text_encoders=True, new_tokens={"[V]": "red"})
    trained = [any(p.requires_grad for p in encoder.parameters()) for encoder in denoiser.text_encoders]
    assert trained == [True, True, False]
    assert ["[V]" in tokenizer.get_vocab() for tokenizer in denoiser.tokenizers] == [True, True, False]
    tokens = denoiser.condition(["a [V] house"])
    assert set(tokens) == {"input_ids", "t5"}
    xt, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    denoiser.predict(xt, timesteps, tokens).output.square().mean().backward()
    added = [each.get_input_embeddings().added.grad for each in denoiser.text_encoders[:2]]
    assert all(gradient is not None and gradient.any() for gradient in added)
