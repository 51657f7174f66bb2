"""Seeded, batched and resumable generation from a model of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from domainstudio.config import SampleSettings
    from domainstudio.models.denoiser import Condition, Denoiser, Prediction

Images = NDArray[np.uint8]

DECODED_PIXELS = 4 * 512 * 512
"""Pixels per pass of a decoder, which holds a few hundred channels of each."""


def sample(
    denoiser: Denoiser,
    seeds: Sequence[int],
    conditions: Sequence[str] | None = None,
    *,
    negative: str = "",
    guidance_scale: float = 1.0,
    scheduler: str = "ddim",
    steps: int = 30,
    mixed_precision: str = "no",
) -> Images:
    """Draw one image per seed, in one batch.

    Args:
        denoiser: the model; its network is put into eval mode.
        seeds: the seed of each image's initial noise, and of the noise that `ddpm` adds.
        conditions: what the model is told for each image: prompts, or names of classes; `None`: nothing.
        negative: what guidance leads away from; "" is the model without a condition.
        guidance_scale: w of classifier-free guidance, negative + w·(condition - negative); 1 is without
            (arXiv 2207.12598; 1 + w there).
        scheduler: `ddpm`, `ddim` (η = 0) or `dpm-solver++` (second order).
        steps: denoising steps.
        mixed_precision: autocast type, `no`, `bf16` or `fp16`.

    Returns:
        Images, with shape (len(seeds), 3, H, W).
    """
    import torch

    from domainstudio.models.conditions import join
    from domainstudio.seeding import initial_noise

    denoiser.network.eval()
    device = next(denoiser.network.parameters()).device
    stepper = make_scheduler(denoiser, scheduler)
    stepper.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options: dict[str, Any] = {} if scheduler == "ddim" else {"generator": generators}
    xt = initial_noise(generators, denoiser.shape).to(device) * stepper.init_noise_sigma
    with torch.inference_mode():
        told = denoiser.condition(list(conditions) if conditions is not None else [""] * len(seeds))
        guided = guidance_scale != 1 and bool(told)
        if guided:
            told = join(denoiser.condition([negative] * len(seeds)), told)
        for timestep in stepper.timesteps:
            scaled = stepper.scale_model_input(xt, timestep)
            with _autocast(device, mixed_precision):
                prediction = _guided(denoiser, scaled, timestep, told, guidance_scale if guided else None)
            output = prediction.output
            if prediction.variance is not None and scheduler == "ddpm":
                output = torch.cat([output, prediction.variance], dim=1)
            xt = stepper.step(output, timestep, xt, **options).prev_sample
        parts = torch.split(xt, max(1, DECODED_PIXELS // (denoiser.resolution[0] * denoiser.resolution[1])))
        images = torch.cat([denoiser.decode(part) for part in parts]).clamp(-1, 1)
    return ((images + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def _guided(
    denoiser: Denoiser, xt: Tensor, timestep: Tensor, told: Condition, guidance_scale: float | None
) -> Prediction:
    """Return the prediction in float32; with guidance `told` holds the negative condition's rows first."""
    from dataclasses import replace

    import torch

    if guidance_scale is not None:
        xt = torch.cat([xt, xt])
    prediction = denoiser.predict(xt, timestep.expand(len(xt)).to(xt.device), told)
    output, variance = prediction.output.float(), prediction.variance
    if guidance_scale is not None:
        away, towards = output.chunk(2)
        output = away + guidance_scale * (towards - away)
    if variance is not None:
        variance = variance.float()[-len(output) :]  # with guidance the condition's own
    return replace(prediction, output=output, variance=variance)


def draw(
    denoiser: Denoiser, seeds: Sequence[int], conditions: Sequence[str] | None, settings: SampleSettings
) -> Images:
    """Draw one image per seed by the sampling stage's settings, in its batches; see `sample`."""
    batches = range(0, len(seeds), settings.batch_size)
    return np.concatenate(
        [
            sample(
                denoiser,
                seeds[start : start + settings.batch_size],
                conditions[start : start + settings.batch_size] if conditions else None,
                negative=settings.negative,
                guidance_scale=settings.guidance_scale,
                scheduler=settings.scheduler,
                steps=settings.steps,
                mixed_precision=settings.mixed_precision,
            )
            for start in batches
        ]
    )


def make_scheduler(denoiser: Denoiser, name: str) -> Any:
    """Return a diffusers scheduler of that name with the model's own noise levels."""
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    config = dict(denoiser.noise_scheduler.config)
    if name == "ddpm":
        return DDPMScheduler.from_config(config)
    config.pop("variance_type", None)
    if name == "ddim":
        return DDIMScheduler.from_config(config)
    return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")


def _autocast(device: torch.device, mixed_precision: str) -> Any:
    import torch

    if mixed_precision == "no":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision])


def default_device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
