"""From a batch of images to the loss terms: noise it, let both models denoise it, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from domainstudio import losses
from domainstudio.models.diffusion import alpha_bar, to_eps, to_x0, true_output
from domainstudio.wavelet import high_frequency

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.config import LossWeights, TrainingSettings
    from domainstudio.models.denoiser import Denoiser, Prediction


@dataclass(frozen=True)
class NoisyBatch:
    """What both models see, every field of the same length N."""

    x0: Tensor
    """Clean batch in the model's space, with shape (N, C, H, W)."""
    noise: Tensor
    """Standard normal, with the same shape."""
    timesteps: Tensor
    """Noise levels, integers in [0, T), with shape (N,)."""
    xt: Tensor
    """x0 with noise added, with the same shape."""


def noisy_batch(
    denoiser: Denoiser,
    images: Tensor,
    settings: TrainingSettings,
    generator: torch.Generator,
    shared: torch.Generator,
) -> NoisyBatch:
    """Add noise to images; all draws are made on the CPU, so they are the same on every device.

    Args:
        denoiser: encodes, and knows the noise levels.
        images: in [-1, 1], with shape (N, 3, H, W), on the training device.
        settings: how timesteps are drawn.
        generator: a CPU generator of this process.
        shared: a CPU generator that draws the same in every process, for a timestep that all share.
    """
    x0 = denoiser.encode(images)
    noise_scheduler = denoiser.noise_scheduler
    top = max(1, round(settings.max_timestep * noise_scheduler.config.num_train_timesteps))
    if settings.timesteps == "shared":
        timesteps = torch.randint(top, (1,), generator=shared).expand(len(x0))
    else:
        timesteps = torch.randint(top, (len(x0),), generator=generator)
    timesteps = timesteps.to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    xt = noise_scheduler.add_noise(x0, noise, timesteps)
    return NoisyBatch(x0, noise, timesteps, xt)


class Objective:
    """The loss terms of one method.

    Args:
        adapted: the model in training.
        source: the frozen reference, in eval mode; may be `None` for a method that compares no pairs.
        weights: which terms to compute, and how.
        gather: joins a tensor (N, ...) of all processes to (N·processes, ...), with gradients.
        autocast: makes the autocast context of the networks.
    """

    def __init__(
        self,
        adapted: Denoiser,
        source: Denoiser | None,
        weights: LossWeights,
        gather: Callable[[Tensor], Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        if weights.needs_source and source is None:
            raise ValueError("pairwise terms need the source model")
        if source is not None:
            source.network.eval().requires_grad_(False)
        self.adapted, self.source, self.weights = adapted, source, weights
        self._gather, self._autocast = gather, autocast

    def __call__(self, batch: NoisyBatch) -> dict[str, Tensor]:
        """Return every term whose weight is above 0, unweighted, each a float32 scalar."""
        with self._autocast():
            prediction = self.adapted.predict(batch.xt, batch.timesteps)
        return {
            **self._denoising_terms(batch, prediction),
            **self._detail_terms(batch, prediction),
            **self._pairwise_terms(batch, prediction),
        }

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of terms."""
        return torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()

    def _denoising_terms(self, batch: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        noise_scheduler, terms = self.adapted.noise_scheduler, {}
        if self.weights.simple > 0:
            truth = true_output(noise_scheduler, batch.x0, batch.noise, batch.timesteps)
            terms["simple"] = losses.mean_squared_error(prediction.output, truth).mean()
        if self.weights.vlb > 0 and prediction.variance is not None:
            eps = to_eps(noise_scheduler, prediction.output, batch.xt, batch.timesteps)
            terms["vlb"] = losses.variational_bound(
                batch.x0, batch.xt, eps, prediction.variance, batch.timesteps, noise_scheduler.alphas_cumprod
            ).mean()
        return terms

    def _detail_terms(self, batch: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        weights = self.weights
        if not (weights.high_frequency_mse > 0 or weights.laplacian > 0 or weights.reconstruction > 0):
            return {}
        x0_adapted = self._x0(self.adapted, prediction, batch)
        images = self.adapted.decode(batch.x0)
        terms = {}
        if weights.high_frequency_mse > 0:
            terms["high_frequency_mse"] = losses.high_frequency_mse(x0_adapted, images).mean()
        if weights.laplacian > 0:
            terms["laplacian"] = losses.laplacian_similarity(x0_adapted, images).mean()
        if weights.reconstruction > 0:
            terms["reconstruction"] = losses.mean_squared_error(x0_adapted, images).mean()
        return terms

    def _pairwise_terms(self, batch: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        weights = self.weights
        if not weights.pairwise or self.source is None:
            return {}
        with torch.no_grad(), self._autocast():
            reference = self.source.predict(batch.xt, batch.timesteps)
        x0_adapted = self._gather(self._x0(self.adapted, prediction, batch))
        with torch.no_grad():
            x0_source = self._gather(self._x0(self.source, reference, batch))
        trust = self._trust(self._gather(batch.timesteps))
        number = len(x0_source)
        scale = 1.0 if weights.pairwise_reduction == "sum" else 1 / (number * (number - 1))
        terms = {}
        if weights.image > 0:
            terms["image"] = scale * (trust * self._divergence(x0_adapted, x0_source)).sum()
        if weights.high_frequency > 0:
            rows = self._divergence(high_frequency(x0_adapted), high_frequency(x0_source))
            terms["high_frequency"] = scale * (trust * rows).sum()
        if weights.pairwise_l2 > 0:
            terms["pairwise_l2"] = losses.pairwise_l2(x0_adapted, x0_source)
        return terms

    def _divergence(self, adapted: Tensor, source: Tensor) -> Tensor:
        if self.weights.pairwise_center:
            adapted, source = adapted - adapted.mean(dim=0), source - source.mean(dim=0)
        return losses.pairwise_similarity_kl(adapted, source, self.weights.pairwise_temperature)

    def _x0(self, model: Denoiser, prediction: Prediction, batch: NoisyBatch) -> Tensor:
        x0 = model.decode(to_x0(model.noise_scheduler, prediction.output, batch.xt, batch.timesteps))
        return x0.clamp(-1, 1) if self.weights.clamp_x0 else x0

    def _trust(self, timesteps: Tensor) -> Tensor:
        """Return each image's weight in the similarity terms."""
        a = alpha_bar(self.adapted.noise_scheduler, timesteps, timesteps)
        weighting = {"none": torch.ones_like(a), "alpha_bar": a, "one_minus_alpha_bar": 1 - a}
        return weighting[self.weights.noise_weighting]
