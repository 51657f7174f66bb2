"""Flow matching against diffusers: its training scripts, recomputed from the scheduler, and its pipelines."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from safetensors.torch import load_file

from domainstudio import models
from domainstudio.config import FlowSettings, LoraSettings, LossWeights
from domainstudio.errors import ConfigError
from domainstudio.models import lora
from domainstudio.models.adapter_folder import KOHYA, WEIGHTS
from domainstudio.models.flow_schedule import FlowSchedule
from domainstudio.sampling import sample
from domainstudio.selection.adapters import AdapterFile, usable
from domainstudio.training.objective import Batch, Objective, noisy_batch
from tests.any_size import CHAT_LENGTH, FAMILIES
from tests.models import (
    PROMPT_LENGTH,
    tiny_sd3_pipeline,
    tiny_text_denoiser,
    tiny_text_images,
    training_settings,
)

TOLD = ["a red house", "two green trees"]
SEEDS = [5, 6]
PIPELINES: dict[str, Any] = {"sd3": tiny_sd3_pipeline, **{name: make for name, (_, make) in FAMILIES.items()}}
SIZE = {"height": 16, "width": 16}
"""What pipelines are called with whose transformers name no size."""


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(pipeline, **options):
    """Return what plain diffusers draws, as uint8 with shape (N, 3, H, W)."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        prompt=list(TOLD),  # Z-Image's changes the list
        generator=[generator(seed) for seed in SEEDS],
        output_type="np",
        **{
            "num_inference_steps": 4,
            **called(pipeline, **options),
        },
    ).images
    return (pictures.transpose(0, 3, 1, 2) * 255).round().astype(np.uint8)


def called(pipeline, guidance_scale=1.0, negative="", **options):
    """Return what a family's pipeline takes for guidance negative + w·(prompt - negative)."""
    name = type(pipeline).__name__
    if name == "ZImagePipeline":
        options |= {"guidance_scale": guidance_scale - 1, "negative_prompt": [negative] * len(TOLD), **SIZE}
    elif name == "FluxPipeline":
        options |= {"max_sequence_length": PROMPT_LENGTH, "guidance_scale": guidance_scale, **SIZE}
        if not pipeline.transformer.config.guidance_embeds:
            options |= {"true_cfg_scale": guidance_scale, "negative_prompt": [negative] * len(TOLD)}
    elif name == "QwenImagePipeline":
        options |= {"true_cfg_scale": guidance_scale, "negative_prompt": [negative] * len(TOLD), **SIZE}
    elif name == "Flux2KleinPipeline":
        options |= {"guidance_scale": guidance_scale, "max_sequence_length": CHAT_LENGTH, **SIZE}
        encoded, _ = pipeline.encode_prompt([negative] * len(TOLD), max_sequence_length=CHAT_LENGTH)
        options["negative_prompt_embeds"] = encoded
    else:
        options = {"max_sequence_length": PROMPT_LENGTH, **options, "guidance_scale": guidance_scale}
        options["negative_prompt"] = [negative] * len(TOLD) if negative else None
    return options


def predicted(pipeline, xt, timesteps):
    """Return the velocity as the family's script asks the transformer for it."""
    if type(pipeline).__name__ == "ZImagePipeline":
        embeddings, _ = pipeline.encode_prompt(list(TOLD), do_classifier_free_guidance=False)
        images = list(xt.unsqueeze(2).unbind(dim=0))
        listed = pipeline.transformer(images, (1000 - timesteps) / 1000, embeddings, return_dict=False)[0]
        return -torch.stack(listed, dim=0).squeeze(2)
    if type(pipeline).__name__ == "FluxPipeline":
        embeddings, pooled, text_ids = pipeline.encode_prompt(TOLD, max_sequence_length=PROMPT_LENGTH)
        guided = pipeline.transformer.config.guidance_embeds
        packed = pipeline.transformer(
            hidden_states=pipeline._pack_latents(xt, *xt.shape),
            timestep=timesteps / 1000,
            guidance=torch.tensor([3.5]).expand(len(xt)) if guided else None,
            pooled_projections=pooled,
            encoder_hidden_states=embeddings,
            txt_ids=text_ids,
            img_ids=pipeline._prepare_latent_image_ids(len(xt), 4, 4, xt.device, xt.dtype),
        ).sample
        return pipeline._unpack_latents(packed, 16, 16, pipeline.vae_scale_factor)
    if type(pipeline).__name__ == "Flux2KleinPipeline":
        embeddings, text_ids = pipeline.encode_prompt(TOLD, max_sequence_length=CHAT_LENGTH)
        ids = pipeline._prepare_latent_ids(xt)
        packed = pipeline.transformer(
            hidden_states=pipeline._pack_latents(xt),
            timestep=timesteps / 1000,
            encoder_hidden_states=embeddings,
            txt_ids=text_ids,
            img_ids=ids,
        ).sample
        return pipeline._unpack_latents_with_ids(packed, ids)
    if type(pipeline).__name__ == "QwenImagePipeline":
        embeddings, mask = pipeline.encode_prompt(TOLD)
        packed = pipeline.transformer(
            hidden_states=pipeline._pack_latents(xt[:, None], *xt.shape),
            encoder_hidden_states=embeddings,
            encoder_hidden_states_mask=mask,
            timestep=timesteps / 1000,
            img_shapes=[(1, 4, 4)] * len(xt),
        ).sample
        return pipeline._unpack_latents(packed, 16, 16, pipeline.vae_scale_factor)[:, :, 0]
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        TOLD, None, None, do_classifier_free_guidance=False, max_sequence_length=PROMPT_LENGTH
    )
    texts = {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
    return pipeline.transformer(hidden_states=xt, timestep=timesteps, **texts).sample


def latents(pipeline, images):
    """Return the latents that the family's script trains on."""
    vae = pipeline.vae
    if type(pipeline).__name__ == "QwenImagePipeline":
        drawn = vae.encode(images[:, :, None]).latent_dist.sample(generator(0))[:, :, 0]
        mean, std = (
            torch.tensor(each).view(1, -1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (drawn - mean) * (1.0 / std)
    drawn = vae.encode(images).latent_dist.sample(generator(0))
    if type(pipeline).__name__ == "Flux2KleinPipeline":
        mean, variance = (each.view(1, -1, 1, 1) for each in (vae.bn.running_mean, vae.bn.running_var))
        packed = pipeline._patchify_latents(drawn)
        return (packed - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)
    return (drawn - vae.config.shift_factor) * vae.config.scaling_factor


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


@pytest.mark.parametrize(
    ("family", "precondition_outputs"),
    [("sd3", 0), ("sd3", 1), ("z-image", 0), ("flux-1", 0), ("flux-2", 0), ("qwen-image", 0)],
)
def test_a_steps_loss_is_that_of_the_script(family, precondition_outputs):
    """SD3's weighs the error of x0 by 1 where it preconditions outputs, else that of the velocity."""
    denoiser = tiny_text_denoiser(family)
    by_resolution = family.startswith(("flux", "qwen"))  # a shift that is not in the table
    shift = {} if by_resolution else {"shift": 3.0}
    scheduler = FlowMatchEulerDiscreteScheduler(**shift)
    images = torch.from_numpy(tiny_text_images(2)).float() / 127.5 - 1
    x0 = denoiser.x0(denoiser.encode(images), generator(0))
    batch = Batch(images, x0, denoiser.condition(TOLD), {})
    noisy = noisy_batch(denoiser, batch, training_settings(), generator(1), generator(2))
    weights = LossWeights(flow_weighting="sigma_squared" if precondition_outputs else "none")
    found = Objective(denoiser, weights)(noisy)["simple"]

    pipeline = PIPELINES[family]()
    draw = generator(1)
    with torch.no_grad():
        model_input = latents(pipeline, images)
        u = compute_density_for_timestep_sampling("logit_normal", 2, 0.0, 1.0, generator=draw)
        timesteps = scheduler.timesteps[(u * 1000).long()]
        noise = torch.randn(model_input.shape, generator=draw)
        steps = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
        sigmas = scheduler.sigmas[steps].view(-1, 1, 1, 1)
        noisy_input = (1.0 - sigmas) * model_input + sigmas * noise
        prediction, target = predicted(pipeline, noisy_input, timesteps), noise - model_input
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


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize(("guidance_scale", "negative"), [(1.0, ""), (5.0, ""), (5.0, "a blue cup")])
def test_samples_are_those_of_plain_diffusers(family, guidance_scale, negative):
    if family == "flux-1" and negative:
        with pytest.raises(ConfigError, match=r"sample\.negative: the model is distilled for guidance"):
            sample(tiny_text_denoiser(family), SEEDS, TOLD, negative=negative, steps=4)
        return
    denoiser, options = tiny_text_denoiser(family), {"negative": negative, "guidance_scale": guidance_scale}
    found, other = (sample(denoiser, SEEDS, told, steps=4, **options) for told in (TOLD, TOLD[::-1]))
    expected = drawn(PIPELINES[family](), **options)
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


@pytest.mark.parametrize(
    ("family", "text_encoder"),
    [
        ("sd3", False),
        ("sd3", True),
        ("z-image", False),
        ("flux-1", False),
        ("flux-2", False),
        ("qwen-image", False),
    ],
)
def test_adapters_draw_the_same_in_plain_diffusers(tmp_path, monkeypatch, family, text_encoder):
    monkeypatch.chdir(tmp_path)
    tiny_text_denoiser(family).save(Path("source"))
    denoiser = models.load("source")
    settings = LoraSettings(rank=4, alpha=8.0, text_encoder=text_encoder)
    if family == "flux-2":  # its blocks of one stream too
        settings = settings.model_copy(update={"modules": (*settings.modules, "to_qkv_mlp_proj")})
    lora.attach(denoiser, settings, seed=0)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in denoiser.network.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator(index)) * 0.2)
    denoiser.save(Path("adapters"))
    found = sample(denoiser, SEEDS, TOLD, steps=4)
    assert difference(sample(models.load("adapters"), SEEDS, TOLD, steps=4), found) <= 1

    pipeline = DiffusionPipeline.from_pretrained("source")
    before = drawn(copy.deepcopy(pipeline))
    pipeline.load_lora_weights("adapters")
    assert difference(drawn(pipeline), found) <= 1
    assert difference(before, found) > 2

    named = {"z-image": "lycoris_layers_0_", "qwen-image": "lycoris_transformer_blocks_0_"}.get(
        family, "lora_transformer_transformer_blocks_0_"
    )
    assert any(key.startswith(named) for key in load_file(f"adapters/{KOHYA}")), "as ComfyUI names it"
    file = AdapterFile(Path("adapters", WEIGHTS), "a", 1)  # as that of another trainer
    [candidate], _ = usable(models.load("source"), [file], "source")
    assert difference(sample(candidate.load(), SEEDS, TOLD, steps=4), found) <= 1
