"""Flow matching against diffusers: SD3's training script, recomputed from its scheduler, and the pipeline."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from domainstudio import models
from domainstudio.config import FlowSettings, LoraSettings, LossWeights
from domainstudio.models import lora
from domainstudio.models.flow_schedule import FlowSchedule
from domainstudio.sampling import sample
from domainstudio.training.objective import Batch, Objective, noisy_batch
from tests.models import (
    PROMPT_LENGTH,
    tiny_sd3_pipeline,
    tiny_text_denoiser,
    tiny_text_images,
    training_settings,
)

TOLD = ["a red house", "two green trees"]
SEEDS = [5, 6]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(pipeline, **options):
    """Return what plain diffusers draws, as uint8 with shape (N, 3, H, W)."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        TOLD,
        generator=[generator(seed) for seed in SEEDS],
        output_type="np",
        **{
            "num_inference_steps": 4,
            "guidance_scale": 1.0,
            "max_sequence_length": PROMPT_LENGTH,
            **options,
        },
    ).images
    return (pictures.transpose(0, 3, 1, 2) * 255).round().astype(np.uint8)


def difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


@pytest.mark.parametrize("density", ["logit_normal", "uniform", "mode"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timesteps_are_those_that_the_script_takes_from_the_schedulers_table(density, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = FlowSettings(density=density, logit_mean=0.5, logit_std=0.8)
    settings = training_settings(flow=flow)
    found = FlowSchedule(scheduler).draw(200, settings, (8, 8), generator(1))
    u = compute_density_for_timestep_sampling(density, 200, 0.5, 0.8, 1.29, generator=generator(1))
    indices = (u * 1000).long().clamp(max=999)
    torch.testing.assert_close(found, scheduler.timesteps[indices])
    assert found.unique().numel() > 100


@pytest.mark.parametrize("precondition_outputs", [0, 1])
def test_a_steps_loss_is_that_of_the_script(precondition_outputs):
    """The script weighs the error of x0 by 1 where it preconditions outputs, else that of the velocity."""
    denoiser = tiny_text_denoiser("sd3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    images = torch.from_numpy(tiny_text_images(2)).float() / 127.5 - 1
    x0 = denoiser.x0(denoiser.encode(images), generator(0))
    batch = Batch(images, x0, denoiser.condition(TOLD), {})
    noisy = noisy_batch(denoiser, batch, training_settings(), generator(1), generator(2))
    weights = LossWeights(flow_weighting="sigma_squared" if precondition_outputs else "none")
    found = Objective(denoiser, weights)(noisy)["simple"]

    pipeline = tiny_sd3_pipeline()
    draw = generator(1)
    with torch.no_grad():
        model_input = pipeline.vae.encode(images).latent_dist.sample(generator(0))
        model_input = (model_input - 0.0609) * 1.5305
        u = compute_density_for_timestep_sampling("logit_normal", 2, 0.0, 1.0, generator=draw)
        timesteps = scheduler.timesteps[(u * 1000).long()]
        noise = torch.randn(model_input.shape, generator=draw)
        steps = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
        sigmas = scheduler.sigmas[steps].view(-1, 1, 1, 1)
        noisy_input = (1.0 - sigmas) * model_input + sigmas * noise
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            TOLD, None, None, do_classifier_free_guidance=False, max_sequence_length=PROMPT_LENGTH
        )
        prediction = pipeline.transformer(
            hidden_states=noisy_input,
            timestep=timesteps,
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
        ).sample
        target = noise - model_input
        if precondition_outputs:
            prediction, target = prediction * -sigmas + noisy_input, model_input
        weights = compute_loss_weighting_for_sd3("logit_normal", sigmas)
        expected = (weights * (prediction - target) ** 2).mean()
    torch.testing.assert_close(noisy.xt, noisy_input)
    torch.testing.assert_close(found.detach(), expected)


def test_weights_and_levels_follow_from_their_definitions():
    schedule = FlowSchedule(FlowMatchEulerDiscreteScheduler())
    sigma = torch.tensor([0.2, 0.5, 0.9])
    snr = ((1 - sigma) / sigma).square()
    t = sigma * 1000
    torch.testing.assert_close(schedule.alpha_bar(t, t), snr / (1 + snr))
    plain = compute_loss_weighting_for_sd3("cosmap", sigma)
    torch.testing.assert_close(schedule.loss_weights(t, LossWeights(flow_weighting="cosmap")), plain)
    # the error of x0 = x_t - σ·v is σ² times that of v: Min-SNR weighs it by min(SNR, γ)
    found = schedule.loss_weights(t, LossWeights(min_snr_gamma=5.0))
    torch.testing.assert_close(found, sigma.square() * snr.clamp(max=5))
    x0, noise = torch.randn((2, 3, 1, 8, 8), generator=generator(0))
    xt = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(schedule.to_x0(schedule.true_output(x0, noise, t), xt, t), x0)


def test_the_resolutions_shift_is_that_of_the_pipelines_sampler():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    schedule = FlowSchedule(scheduler, grid=lambda steps: np.linspace(1.0, 1 / steps, steps).tolist())
    settings = training_settings(flow=FlowSettings(shift="resolution", density="uniform"))
    found = schedule.draw(500, settings, (64, 64), generator(0)).sort().values
    mu = 1024 * 0.65 / 3840 + 0.5 - 0.65 / 15  # a line from 0.5 at 256 tokens to 1.15 at 4096
    scheduler.set_timesteps(1000, sigmas=np.linspace(1.0, 0.001, 1000).tolist(), mu=mu)
    distance = (found[:, None] - scheduler.timesteps[None]).abs().min(dim=1).values
    assert distance.max() < 1e-2
    torch.testing.assert_close(schedule.sampler("ddim", 1000, (64, 64)).timesteps, scheduler.timesteps)
    low = training_settings(flow=FlowSettings(shift=1.0), max_timestep=0.1)
    assert schedule.draw(500, low, (64, 64), generator(0)).max() <= 100


@pytest.mark.parametrize(("guidance_scale", "negative"), [(1.0, ""), (5.0, ""), (5.0, "a blue cup")])
def test_samples_are_those_of_plain_diffusers(guidance_scale, negative):
    found, other = (
        sample(
            tiny_text_denoiser("sd3"), SEEDS, told, negative=negative, guidance_scale=guidance_scale, steps=4
        )
        for told in (TOLD, TOLD[::-1])
    )
    told = [negative] * 2 if negative else None
    expected = drawn(tiny_sd3_pipeline(), guidance_scale=guidance_scale, negative_prompt=told)
    assert difference(found, expected) <= 1
    assert expected.std() > 10
    assert difference(other, expected) > 2


def test_a_pipeline_without_t5_draws_the_same(tmp_path):
    tiny_sd3_pipeline(t5=False).save_pretrained(tmp_path / "plain")
    denoiser = models.load(tmp_path / "plain")
    denoiser.save(tmp_path / "ours")
    found = sample(denoiser, SEEDS, TOLD, steps=4)
    without = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "ours", **without)
    assert difference(found, drawn(pipeline, max_sequence_length=256)) <= 1


@pytest.mark.parametrize("text_encoder", [False, True])
def test_adapters_draw_the_same_in_plain_diffusers(tmp_path, monkeypatch, text_encoder):
    monkeypatch.chdir(tmp_path)
    tiny_text_denoiser("sd3").save(Path("source"))
    denoiser = models.load("source")
    lora.attach(denoiser, LoraSettings(rank=4, alpha=8.0, text_encoder=text_encoder), seed=0)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in denoiser.network.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator(index)) * 0.2)
    denoiser.save(Path("adapters"))
    found = sample(denoiser, SEEDS, TOLD, steps=4)
    assert difference(sample(models.load("adapters"), SEEDS, TOLD, steps=4), found) <= 1

    pipeline = StableDiffusion3Pipeline.from_pretrained("source")
    before = drawn(copy.deepcopy(pipeline))
    pipeline.load_lora_weights("adapters")
    assert difference(drawn(pipeline), found) <= 1
    assert difference(before, found) > 2
