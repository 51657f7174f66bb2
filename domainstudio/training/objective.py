"""From a batch of images to the loss terms: noise it, let both models denoise it, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from domainstudio.models.schedule import alpha_bar, min_snr_weights, to_eps, to_x0, true_output
from domainstudio.training import losses
from domainstudio.training.wavelet import high_frequency

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.config import LossWeights, TrainingSettings
    from domainstudio.models.condition import Condition
    from domainstudio.models.denoiser import Denoiser, Prediction


@dataclass(frozen=True)
class NoisyBatch:
    """What both models see: N images of the target domain, then P images of prior preservation."""

    images: Tensor
    """The N training images, in [-1, 1], with shape (N, 3, H, W)."""
    x0: Tensor
    """Clean batch in the model's space, with shape (N + P, C, H, W)."""
    noise: Tensor
    """Standard normal, with the same shape."""
    timesteps: Tensor
    """Noise levels, integers in [0, T), with shape (N + P,)."""
    xt: Tensor
    """x0 with noise added, with the same shape."""
    condition: Condition
    """What the model in training is told, with N + P rows."""
    source_condition: Condition
    """What the source model is told, with N rows."""

    @property
    def number(self) -> int:
        """N, the images of the target domain."""
        return len(self.images)


@dataclass(frozen=True)
class Batch:
    """Clean images of one step, as `NoisyBatch` describes them."""

    images: Tensor
    x0: Tensor
    condition: Condition
    source_condition: Condition


def noisy_batch(
    denoiser: Denoiser,
    batch: Batch,
    settings: TrainingSettings,
    generator: torch.Generator,
    shared: torch.Generator,
) -> NoisyBatch:
    """Add noise to a batch; all draws are made on the CPU, so they are the same on every device.

    Args:
        denoiser: knows the noise levels.
        batch: what to add it to, on the training device.
        settings: how timesteps are drawn.
        generator: a CPU generator of this process.
        shared: a CPU generator that draws the same in every process, for a timestep that all share.
    """
    x0 = batch.x0
    noise_scheduler = denoiser.noise_scheduler
    top = max(1, round(settings.max_timestep * noise_scheduler.config.num_train_timesteps))
    if settings.timesteps == "shared":
        timesteps = torch.randint(top, (1,), generator=shared).expand(len(x0))
    else:
        timesteps = torch.randint(top, (len(x0),), generator=generator)
    timesteps = timesteps.to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    xt = noise_scheduler.add_noise(x0, noise, timesteps)
    return NoisyBatch(batch.images, x0, noise, timesteps, xt, batch.condition, batch.source_condition)


class Objective:
    """The loss terms of one method.

    Args:
        adapted: the model in training.
        source: the frozen reference, in eval mode; may be `None` for a method that compares no pairs.
        weights: which terms to compute, and how.
        gather: joins a tensor (N, ...) of all processes to (N·processes, ...), with gradients.
        autocast: makes the autocast context of the networks.
        decode: turns x0 into the images that the terms compare; by default the adapted model's own.
    """

    def __init__(
        self,
        adapted: Denoiser,
        source: Denoiser | None,
        weights: LossWeights,
        gather: Callable[[Tensor], Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if weights.pairwise and source is None:
            raise ValueError("pairwise terms need the source model")
        self.adapted, self.source, self.weights = adapted, source, weights
        self._gather, self._autocast, self._decode = gather, autocast, decode or adapted.decode

    def __call__(self, batch: NoisyBatch) -> dict[str, Tensor]:
        """Return every term whose weight is above 0, unweighted, each a float32 scalar."""
        with self._autocast():
            prediction = self.adapted.predict(batch.xt, batch.timesteps, batch.condition)
        x0_adapted = self._x0(self.adapted, prediction, batch) if self._needs_x0 else None
        return {
            **self._denoising_terms(batch, prediction),
            **self._detail_terms(batch, x0_adapted),
            **self._pairwise_terms(batch, x0_adapted),
        }

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of terms."""
        return torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()

    @property
    def _needs_x0(self) -> bool:
        weights = self.weights
        return (
            weights.pairwise or max(weights.high_frequency_mse, weights.laplacian, weights.reconstruction) > 0
        )

    def _denoising_terms(self, batch: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        noise_scheduler, weights, number, terms = self.adapted.noise_scheduler, self.weights, batch.number, {}
        truth = true_output(noise_scheduler, batch.x0, batch.noise, batch.timesteps)
        errors = losses.mean_squared_error(prediction.output, truth)
        errors = errors * min_snr_weights(noise_scheduler, batch.timesteps, weights.min_snr_gamma)
        if weights.simple > 0:
            terms["simple"] = errors[:number].mean()
        if weights.prior > 0:
            terms["prior"] = errors[number:].mean()
        if weights.vlb > 0 and prediction.variance is not None:
            x0, xt, timesteps = (part[:number] for part in (batch.x0, batch.xt, batch.timesteps))
            eps = to_eps(noise_scheduler, prediction.output[:number], xt, timesteps)
            terms["vlb"] = losses.variational_bound(
                x0, xt, eps, prediction.variance[:number], timesteps, noise_scheduler.alphas_cumprod
            ).mean()
        return terms

    def _detail_terms(self, batch: NoisyBatch, x0_adapted: Tensor | None) -> dict[str, Tensor]:
        weights, terms = self.weights, {}
        if x0_adapted is None:
            return {}
        truth = batch.x0[: batch.number] if weights.space == "latent" else batch.images
        if weights.high_frequency_mse > 0:
            terms["high_frequency_mse"] = losses.high_frequency_mse(x0_adapted, truth).mean()
        if weights.laplacian > 0:
            terms["laplacian"] = losses.laplacian_similarity(x0_adapted, truth).mean()
        if weights.reconstruction > 0:
            terms["reconstruction"] = losses.mean_squared_error(x0_adapted, truth).mean()
        return terms

    def _pairwise_terms(self, batch: NoisyBatch, x0_adapted: Tensor | None) -> dict[str, Tensor]:
        weights, number = self.weights, batch.number
        if not weights.pairwise or self.source is None or x0_adapted is None:
            return {}
        with torch.no_grad():
            with self._autocast():
                reference = self.source.predict(
                    batch.xt[:number], batch.timesteps[:number], batch.source_condition
                )
            x0_source = self._gather(self._x0(self.source, reference, batch))
        x0_adapted = self._gather(x0_adapted)
        trust = self._trust(self._gather(batch.timesteps[:number]))
        pairs = len(x0_source) * (len(x0_source) - 1)
        scale = 1.0 if weights.pairwise_reduction == "sum" else 1 / pairs
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
        """Return x0 of the target domain's N images in the space that the terms compare."""
        number = batch.number
        x0 = to_x0(
            model.noise_scheduler, prediction.output[:number], batch.xt[:number], batch.timesteps[:number]
        )
        if self.weights.space == "latent":
            return x0
        images = self._decode(x0)
        return images.clamp(-1, 1) if self.weights.clamp_x0 else images

    def _trust(self, timesteps: Tensor) -> Tensor:
        """Return each image's weight in the similarity terms."""
        a = alpha_bar(self.adapted.noise_scheduler, timesteps, timesteps)
        weighting = {"none": torch.ones_like(a), "alpha_bar": a, "one_minus_alpha_bar": 1 - a}
        return weighting[self.weights.noise_weighting]
