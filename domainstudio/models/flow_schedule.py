"""Noise levels of flow matching: x_t = (1 - σ)·x0 + σ·noise; networks predict the velocity noise - x0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from domainstudio.errors import CheckpointError
from domainstudio.models.schedule import at_least_float32, per_image

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.config import FlowSettings, LossWeights, TrainingSettings


class FlowSchedule:
    """The schedule of rectified flow (arXiv 2209.03003) as SD3 has it (arXiv 2403.03206); see `Schedule`.

    Timesteps are T·σ in float32, as diffusers tells them to networks.

    Args:
        noise_scheduler: gives T and how σ is shifted: statically (SD3), or by the resolution (Flux).
        patch: positions of x0, along a side, that the network sees as one token.
        grid: σ before the shift that the family's pipeline gives its sampler, by the number of steps; `None`
            leaves it to the sampler.
        mu: logarithm of the resolution's shift, by tokens and steps; `None` is Flux's line between two sizes.
    """

    prediction_type = "flow"

    def __init__(
        self,
        noise_scheduler: FlowMatchEulerDiscreteScheduler,
        *,
        patch: int = 2,
        grid: Callable[[int], Sequence[float]] | None = None,
        mu: Callable[[int, int], float] | None = None,
    ) -> None:
        self.noise_scheduler, self.patch, self._grid = noise_scheduler, patch, grid
        self._mu = mu or self._mu_by_tokens
        self.num_train_timesteps: int = noise_scheduler.config.num_train_timesteps
        self.levels: Tensor = noise_scheduler.sigmas.flip(0)

    @classmethod
    def of(cls, scheduler: Any, where: str, **options: Any) -> FlowSchedule:
        """Return the forward process of a pipeline's scheduler, whatever sampler it is.

        Args:
            scheduler: of flow matching.
            where: the pipeline, for errors.
            options: of this class.

        Raises:
            CheckpointError: it is not of flow matching.
        """
        config = scheduler.config
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not config.get("use_flow_sigmas"):
            raise CheckpointError(
                f"{where}/scheduler is a {type(scheduler).__name__}, which is not of flow matching, as this "
                "pipeline needs: bring the model's own scheduler_config.json"
            )
        made = FlowMatchEulerDiscreteScheduler.from_config(config)
        if "flow_shift" in config:  # the same setting by another sampler's name
            made = FlowMatchEulerDiscreteScheduler.from_config(config, shift=config["flow_shift"])
        return cls(made, **options)

    def draw(
        self, number: int, settings: TrainingSettings, size: tuple[int, int], generator: torch.Generator
    ) -> Tensor:
        """Draw timesteps as diffusers' training scripts do: a place u in the scheduler's table of T levels.

        The table begins with the most noise. `max_timestep` leaves out its beginning.
        """
        top = max(1, round(settings.max_timestep * self.num_train_timesteps))
        places = (_density(number, settings.flow, generator) * top).long().clamp(0, top - 1)
        sigmas = self._shifted(settings.flow, size)
        return sigmas.flip(0)[self.num_train_timesteps - top + places] * self.num_train_timesteps

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = (1 - σ)·x0 + σ·noise."""
        sigma = self._sigma(timesteps, x0).to(x0.dtype)
        return (1 - sigma) * x0 + sigma * noise

    def true_output(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the velocity, noise - x0."""
        return noise - x0

    def to_x0(self, output: Tensor, xt: Tensor, timesteps: Tensor) -> Tensor:
        """Return x0 = x_t - σ·v, in at least float32."""
        xt, output = at_least_float32(xt), at_least_float32(output)
        return xt - self._sigma(timesteps, xt) * output

    def alpha_bar(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Return (1 - σ)² / ((1 - σ)² + σ²), shaped (N, 1, ...) to multiply `like`, with shape (N, ...)."""
        sigma = self._sigma(timesteps, like)
        signal, noise = (1 - sigma).square(), sigma.square()
        return signal / (signal + noise)

    def loss_weights(self, timesteps: Tensor, weights: LossWeights) -> Tensor:
        """Return the weight of each image's error of velocity, with shape (N,).

        `flow_weighting` is 1, σ² (the error of x0, as x0 = x_t - σ·v) or cosmap's 2 / (π·(1 - 2σ + 2σ²))
        (arXiv 2403.03206, section 3.1). Min-SNR-γ weighs the error of x0 by min(SNR, γ), with
        SNR = (1 - σ)² / σ² (arXiv 2303.09556): so that of the velocity by min((1 - σ)², γ·σ²).
        """
        sigma, gamma = self._sigma(timesteps, timesteps), weights.min_snr_gamma
        weighting = {
            "none": torch.ones_like(sigma),
            "sigma_squared": sigma.square(),
            "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square())),
        }
        found = weighting[weights.flow_weighting]
        if gamma is not None:
            found = found * torch.minimum((1 - sigma).square(), gamma * sigma.square())
        return found

    def sampler(self, name: str, steps: int, size: tuple[int, int]) -> Any:
        """Return Euler's method, which is DDIM here; with fresh noise (`ddpm`); or DPM-Solver++."""
        config: dict[str, Any] = dict(self.noise_scheduler.config)
        mu = self._mu(self._tokens(size), steps) if config["use_dynamic_shifting"] else None
        if name == "dpm-solver++":
            shift = config["shift"] if mu is None else math.exp(mu)
            solver = DPMSolverMultistepScheduler(
                num_train_timesteps=self.num_train_timesteps,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=shift,
            )
            solver.set_timesteps(steps)
            return solver
        made = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=name == "ddpm")
        made.set_timesteps(steps, sigmas=self._grid(steps) if self._grid else None, mu=mu)
        return made

    def _sigma(self, timesteps: Tensor, like: Tensor) -> Tensor:
        return per_image(timesteps.to(like.device).float() / self.num_train_timesteps, like)

    def _shifted(self, flow: FlowSettings, size: tuple[int, int]) -> Tensor:
        """Return σ of T levels, from little noise to much: shift·σ / (1 + (shift - 1)·σ) of even ones.

        (SD3, arXiv 2403.03206, equation 23.)
        """
        if flow.shift == "scheduler":
            return self.levels
        even = torch.arange(1, self.num_train_timesteps + 1) / self.num_train_timesteps
        by_size = flow.shift == "resolution"
        shift = math.exp(self._mu_by_tokens(self._tokens(size), 0)) if by_size else float(flow.shift)
        return shift * even / (1 + (shift - 1) * even)

    def _tokens(self, size: tuple[int, int]) -> int:
        return (size[0] // self.patch) * (size[1] // self.patch)

    def _mu_by_tokens(self, tokens: int, steps: int) -> float:
        """Return Flux's logarithm of the shift: a line in the number of tokens between two sizes."""
        config = self.noise_scheduler.config
        least, most = config.base_image_seq_len, config.max_image_seq_len
        slope = (config.max_shift - config.base_shift) / (most - least)
        return float(tokens * slope + config.base_shift - slope * least)


def _density(number: int, flow: FlowSettings, generator: torch.Generator) -> Tensor:
    """Draw u in [0, 1) by SD3's densities (arXiv 2403.03206, section 3.1), with shape (number,)."""
    if flow.density == "logit_normal":
        size = (number,)
        return torch.normal(flow.logit_mean, flow.logit_std, size, generator=generator).sigmoid()
    u = torch.rand(number, generator=generator)
    if flow.density == "mode":
        return 1 - u - flow.mode_scale * (torch.cos(math.pi * u / 2).square() - 1 + u)
    return u
