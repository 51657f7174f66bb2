"""PixArt against plain diffusers: samples, folders, adapters, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from domainstudio import models
from domainstudio.config import LoraSettings
from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models import lora
from domainstudio.models.pixart import PixArtDenoiser
from domainstudio.sampling import sample
from tests.models import PROMPT_LENGTH, tiny_pixart_pipeline, tiny_text_denoiser

TOLD = ["A red House", "two green trees"]
SEEDS = [5, 6]


def drawn(pipeline, **options):
    """Return what plain diffusers draws with DDIM, as uint8 with shape (N, 3, H, W)."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        TOLD,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        max_sequence_length=PROMPT_LENGTH,
        use_resolution_binning=False,
        num_inference_steps=4,
        output_type="np",
        **options,
    ).images
    return (pictures.transpose(0, 3, 1, 2) * 255).round().astype(np.uint8)


def difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize(("guidance_scale", "negative"), [(1.0, ""), (5.0, "a blue cup")])
def test_samples_are_those_of_plain_diffusers(alpha, guidance_scale, negative, tmp_path):
    tiny_pixart_pipeline(alpha=alpha).save_pretrained(tmp_path)
    denoiser = models.load(tmp_path)
    assert denoiser.resolution == (16, 16) and denoiser.shape == (4, 8, 8) and not denoiser.learned_variance
    options = {"guidance_scale": guidance_scale, "negative": negative, "steps": 4}
    found, other = (sample(denoiser, SEEDS, told, **options) for told in (TOLD, TOLD[::-1]))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    expected = drawn(pipeline, guidance_scale=guidance_scale, negative_prompt=negative)
    assert difference(found, expected) <= 1
    assert difference(other, expected) > 2


def test_resolution_and_aspect_ratio_are_told_where_the_transformer_takes_them():
    pipeline = tiny_pixart_pipeline(alpha=True, sized=True)
    denoiser = PixArtDenoiser(pipeline, "alpha")
    condition = denoiser.condition(["a red house"] * 2, (32, 16))
    sizes = {"resolution": torch.tensor([[32.0, 16.0]] * 2), "aspect_ratio": torch.tensor([[2.0]] * 2)}
    assert all(torch.equal(condition[name], value) for name, value in sizes.items())
    xt, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    hidden, mask, *_ = pipeline.encode_prompt(["a red house"] * 2, False, max_sequence_length=PROMPT_LENGTH)
    texts = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
    plain = pipeline.transformer(xt, timestep=timesteps, added_cond_kwargs=sizes, **texts).sample
    torch.testing.assert_close(denoiser.predict(xt, timesteps, condition).output, plain[:, :4])
    square = denoiser.predict(xt, timesteps, denoiser.condition(["a red house"] * 2)).output
    assert not torch.allclose(square, plain[:, :4], atol=1e-3)


def test_adapters_are_kept_and_fused_into_a_pipeline_of_diffusers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_text_denoiser("pixart").save(tmp_path / "source")
    denoiser = models.load("source")
    source = sample(denoiser, SEEDS, TOLD, steps=4)
    lora.attach(denoiser, LoraSettings(rank=4, alpha=8.0), seed=0)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in denoiser.network.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.2)
    denoiser.save(tmp_path / "adapters")
    adapted = models.load("adapters")
    found = sample(adapted, SEEDS, TOLD, steps=4)
    assert difference(found, source) > 2
    assert difference(sample(adapted.frozen_source(), SEEDS, TOLD, steps=4), source) <= 1
    lora.save_merged(adapted, tmp_path / "whole")
    whole = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert difference(drawn(whole, guidance_scale=1.0), found) <= 1


def test_t5_is_not_trained_and_parts_of_other_models_are_refused():
    denoiser = tiny_text_denoiser("pixart")
    with pytest.raises(ConfigError, match="a PixArtSigmaPipeline is a language model, which is not"):
        denoiser.train(text_encoders=True)
    pipeline = tiny_pixart_pipeline()
    pipeline.text_encoder.config.d_model = 24
    with pytest.raises(CheckpointError, match="reads text of 48 channels and the text encoder makes 24"):
        PixArtDenoiser(pipeline, "here")
