"""Seeded, batched and resumable generation from a model of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from domainstudio.config import SampleSettings
    from domainstudio.models.condition import Condition
    from domainstudio.models.denoiser import Denoiser

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
        conditions: the prompt or class of each image; `None` draws without a condition.
        negative: prompt or class that guidance leads away from; "" is the model without a condition.
        guidance_scale: w of classifier-free guidance, negative + w·(condition - negative); 1 is without
            (arXiv 2207.12598; 1 + w there). A model that is distilled for guidance is told w instead.
        scheduler: `ddpm`, `ddim` (η = 0) or `dpm-solver++` (second order). For flow matching `ddim` is
            Euler's method, and `ddpm` adds fresh noise at every step.
        steps: denoising steps.
        mixed_precision: autocast type, `no`, `bf16` or `fp16`; see `precision.autocast`.

    Returns:
        Images, with shape (len(seeds), 3, H, W).

    Raises:
        ConfigError: the model has fewer noise levels than `steps`, or takes no negative prompt.
        DataError: a prediction or an image is not finite.
    """
    import torch

    from domainstudio.precision import autocast
    from domainstudio.seeding import initial_noise

    check_steps(denoiser, steps)
    denoiser.network.eval()
    device = next(denoiser.network.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    _, height, width = denoiser.shape
    stepper = denoiser.schedule.sampler(scheduler, steps, (height, width))
    xt = initial_noise(generators, denoiser.shape).to(device)
    with torch.inference_mode():
        condition = denoiser.condition(list(conditions) if conditions is not None else [""] * len(seeds))
        condition, guidance_scale = _guided(denoiser, condition, negative, guidance_scale, len(seeds))
        finite = torch.tensor(True, device=device)  # asked for once: a GPU need not wait in each step
        for timestep in stepper.timesteps:
            with autocast(mixed_precision, denoiser.network):
                output = _predict(denoiser, xt, timestep, condition, guidance_scale, scheduler == "ddpm")
            finite &= torch.isfinite(output).all()
            xt = stepper.step(output, timestep, xt, generator=generators).prev_sample
        _check_finite(finite, "a prediction")
        images = _decode(denoiser, xt)
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def _guided(
    denoiser: Denoiser, condition: Condition, negative: str, scale: float, number: int
) -> tuple[Condition, float]:
    """Return the network's rows, those of the negative text first, and the scale of classifier-free guidance.

    A distilled network is told the scale in its condition's `guidance`, and takes no negative text.
    """
    import torch

    from domainstudio.models.condition import concatenate

    told = [name for name in condition if name.rpartition(".")[2] == "guidance"]
    if told and negative:
        raise ConfigError(
            "sample.negative: the model is distilled for guidance and takes no negative prompt: leave it out"
        )
    if told:
        return {**condition, **{name: torch.full_like(condition[name], scale) for name in told}}, 1.0
    if not condition or scale == 1:
        return condition, 1.0
    return concatenate(denoiser.condition([negative] * number), condition), scale


def _predict(
    denoiser: Denoiser,
    xt: Tensor,
    timestep: Tensor,
    condition: Condition,
    guidance_scale: float,
    with_variance: bool,
) -> Tensor:
    """Return what a scheduler steps with, in float32; for guidance `condition` begins with the negative rows.

    A learned variance, where it is asked for, is further channels.
    """
    import torch

    guided = guidance_scale != 1
    rows = torch.cat([xt, xt]) if guided else xt
    prediction = denoiser.predict(rows, timestep.expand(len(rows)).to(xt.device), condition)
    output = prediction.output.float()
    if guided:
        negative, positive = output.chunk(2)
        output = _mixed(negative, positive, guidance_scale, denoiser.guidance_patch)
    if not with_variance or prediction.variance is None:
        return output
    return torch.cat([output, prediction.variance.float()[-len(xt) :]], dim=1)  # that of the condition itself


def _mixed(negative: Tensor, positive: Tensor, scale: float, patch: int) -> Tensor:
    """Return negative + scale·(positive - negative).

    Where there are patches, each gets the norm of that of `positive`, over channels and `patch`² positions,
    as in Qwen-Image's pipeline.
    """
    from torch.nn import functional

    mixed = negative + scale * (positive - negative)
    if not patch:
        return mixed
    wanted, found = (
        functional.pixel_unshuffle(each, patch).norm(dim=1, keepdim=True) for each in (positive, mixed)
    )
    return mixed * functional.interpolate(wanted / found, scale_factor=patch)


def _decode(denoiser: Denoiser, x0: Tensor) -> Tensor:
    """Return the images of x0, in about [-1, 1], decoded a few at a time."""
    import torch

    height, width = denoiser.resolution
    parts = torch.split(x0, max(1, DECODED_PIXELS // (height * width)))
    images = torch.cat([denoiser.decode(part) for part in parts])
    _check_finite(torch.isfinite(images).all(), "an image that was decoded")
    return images


def _check_finite(finite: Tensor, what: str) -> None:
    if not finite:
        raise DataError(
            f"{what} is not finite: the model's weights are damaged, or too large for mixed_precision. "
            "Use sample.mixed_precision: no, and if that does not help another state of the training"
        )


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


def check_steps(denoiser: Denoiser, steps: int) -> None:
    """Check that a model can draw in so many denoising steps.

    Raises:
        ConfigError: it has fewer noise levels.
    """
    levels = denoiser.schedule.num_train_timesteps
    if steps > levels:
        raise ConfigError(f"sample.steps must be at most {levels}, the model's noise levels, got {steps}")


def default_device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
