"""Noise levels of DDPM and its relatives: x_t = sqrt(ᾱ)·x0 + sqrt(1 - ᾱ)·noise; networks predict ε or v."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from domainstudio.errors import CheckpointError
from domainstudio.models.schedule import at_least_float32, per_image

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.config import LossWeights, TrainingSettings

_SPACINGS = ("leading", "linspace", "trailing")


class DiffusionSchedule:
    """The schedule of a model that was trained as a DDPM (arXiv 2006.11239); see `Schedule`.

    Args:
        noise_scheduler: gives ᾱ and the prediction type.
        where: its file, for errors.

    Raises:
        CheckpointError: what the network predicts has no conversion here.
    """

    def __init__(self, noise_scheduler: DDPMScheduler, where: str) -> None:
        self.noise_scheduler = noise_scheduler
        self.prediction_type: str = noise_scheduler.config.prediction_type
        self.num_train_timesteps: int = noise_scheduler.config.num_train_timesteps
        self.levels: Tensor = noise_scheduler.alphas_cumprod
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise CheckpointError(
                f"{where}: prediction_type {self.prediction_type!r} is not supported; use a model that "
                "predicts epsilon or v_prediction"
            )
        if (spacing := noise_scheduler.config.timestep_spacing) not in _SPACINGS:
            raise CheckpointError(f"{where}: timestep_spacing {spacing!r} is none of {', '.join(_SPACINGS)}")

    @classmethod
    def of(cls, scheduler: Any, where: str) -> DiffusionSchedule:
        """Return the forward process of a text-to-image pipeline's scheduler, whatever sampler it is.

        Raises:
            CheckpointError: its noise levels are not those of a DDPM, or what it predicts has no conversion.
        """
        if getattr(scheduler, "alphas_cumprod", None) is None:
            raise CheckpointError(
                f"{where}/scheduler is a {type(scheduler).__name__} whose noise levels are not those of a "
                "DDPM, which this pipeline needs; models of EDM are not supported"
            )
        options = {"clip_sample": False, "thresholding": False, "variance_type": "fixed_small"}
        plain: DDPMScheduler = DDPMScheduler.from_config(scheduler.config, **options)
        return cls(plain, f"{where}/scheduler/scheduler_config.json")

    def draw(
        self, number: int, settings: TrainingSettings, size: tuple[int, int], generator: torch.Generator
    ) -> Tensor:
        """Draw integers uniformly from the first `max_timestep` of the noise levels."""
        top = max(1, round(settings.max_timestep * self.num_train_timesteps))
        return torch.randint(top, (number,), generator=generator)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = sqrt(ᾱ)·x0 + sqrt(1 - ᾱ)·noise."""
        xt: Tensor = self.noise_scheduler.add_noise(x0, noise, timesteps)
        return xt

    def true_output(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise, or v = sqrt(ᾱ)·ε - sqrt(1 - ᾱ)·x0."""
        if self.prediction_type == "epsilon":
            return noise
        velocity: Tensor = self.noise_scheduler.get_velocity(x0, noise, timesteps)
        return velocity

    def to_x0(self, output: Tensor, xt: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean batch that a prediction implies.

        ε: x0 = (xt - sqrt(1 - ᾱ)·ε) / sqrt(ᾱ) (DDPM, arXiv 2006.11239, equation 15);
        v: x0 = sqrt(ᾱ)·xt - sqrt(1 - ᾱ)·v (arXiv 2202.00512, appendix D).
        """
        a = self.alpha_bar(timesteps, xt)
        output, xt = at_least_float32(output), at_least_float32(xt)
        if self.prediction_type == "epsilon":
            return (xt - (1 - a).sqrt() * output) / a.sqrt()
        return a.sqrt() * xt - (1 - a).sqrt() * output

    def alpha_bar(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Return ᾱ in float32, shaped (N, 1, ...) to multiply `like`, with shape (N, ...)."""
        return per_image(self.levels.to(like.device)[timesteps], like)

    def loss_weights(self, timesteps: Tensor, weights: LossWeights) -> Tensor:
        """Return the Min-SNR-γ weight of each image (arXiv 2303.09556, section 3.4), or 1 without γ.

        With SNR = ᾱ / (1 - ᾱ), min(SNR, γ) / SNR for ε and min(SNR, γ) / (SNR + 1) for v: both weigh the
        error of x0 by min(SNR, γ).
        """
        a, gamma = self.alpha_bar(timesteps, timesteps), weights.min_snr_gamma
        if gamma is None:
            return torch.ones_like(a)
        if self.prediction_type == "epsilon":  # γ(1 - ᾱ)/ᾱ: finite where SNR is not
            return (gamma * (1 - a) / a).clamp(max=1)
        return torch.minimum(a, gamma * (1 - a))

    def sampler(self, name: str, steps: int, size: tuple[int, int]) -> Any:
        """Return DDPM's sampler, DDIM with η = 0, or DPM-Solver++ of second order."""
        config: dict[str, Any] = dict(self.noise_scheduler.config)
        if name == "ddpm":
            made = DDPMScheduler.from_config(config)
        else:
            config.pop("variance_type", None)
            made = (
                DDIMScheduler.from_config(config)
                if name == "ddim"
                else DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
            )
        made.set_timesteps(steps)
        return made
