"""From a batch of images to the loss terms: noise it, let both models denoise it, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from domainstudio.distributed import gather_with_gradients
from domainstudio.training import losses
from domainstudio.training.wavelet import high_frequency

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.config import LossWeights, TrainingSettings
    from domainstudio.models.condition import Condition
    from domainstudio.models.denoiser import Denoiser, Prediction


@dataclass(frozen=True)
class Batch:
    """Clean images of one step: N of the target domain, then P of prior preservation."""

    images: Tensor
    """The N training images, in [-1, 1], with shape (N, 3, H, W); (N, 0) where nothing looks at them."""
    x0: Tensor
    """Clean batch in the model's space, with shape (N + P, C, H, W)."""
    condition: Condition
    """Condition of the model in training, with N + P rows."""
    source_condition: Condition
    """Condition of the source model, with N rows."""

    @property
    def number(self) -> int:
        """N, the images of the target domain."""
        return len(self.images)


@dataclass(frozen=True)
class NoisyBatch(Batch):
    """A batch with noise, which both models see."""

    noise: Tensor
    """Standard normal, with the shape of `x0`."""
    timesteps: Tensor
    """Noise levels, in [0, T], with shape (N + P,)."""
    xt: Tensor
    """x0 with noise added, with the same shape."""


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
    x0, schedule = batch.x0, denoiser.schedule
    number, draw = (1, shared) if settings.timesteps == "shared" else (len(x0), generator)
    size = x0.shape[2], x0.shape[3]
    timesteps = schedule.draw(number, settings, size, draw).expand(len(x0)).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    xt = schedule.add_noise(x0, noise, timesteps)
    return NoisyBatch(**vars(batch), noise=noise, timesteps=timesteps, xt=xt)


@dataclass(frozen=True)
class Pairs:
    """Both models' x0 of the global batch, whose pairs are compared.

    Attributes:
        adapted: the adapted model's, with shape (N, ...).
        source: the source model's, with the same shape.
        trust: weight of each image in the pairwise terms, with shape (N,).
        weights: how similarities are compared.
    """

    adapted: Tensor
    source: Tensor
    trust: Tensor
    weights: LossWeights

    def divergence(self, features: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the divergence of the two models' similarities among features of x0, a scalar."""
        adapted, source, weights = features(self.adapted), features(self.source), self.weights
        if weights.pairwise_center:
            adapted, source = adapted - adapted.mean(dim=0), source - source.mean(dim=0)
        rows = losses.pairwise_similarity_kl(adapted, source, weights.pairwise_temperature)
        scale = 1.0 if weights.pairwise_reduction == "sum" else 1 / (len(source) * (len(source) - 1))
        return scale * (self.trust * rows).sum()


DETAIL_TERMS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "high_frequency_mse": losses.high_frequency_mse,
    "laplacian": losses.laplacian_similarity,
    "reconstruction": losses.mean_squared_error,
}
"""Terms that compare each x0 with its own training image: two (N, ...) → (N,)."""

PAIRWISE_TERMS: Mapping[str, Callable[[Pairs], Tensor]] = {
    "image": lambda pairs: pairs.divergence(lambda x0: x0),
    "high_frequency": lambda pairs: pairs.divergence(high_frequency),
    "pairwise_l2": lambda pairs: (pairs.trust * losses.pairwise_l2(pairs.adapted, pairs.source)).mean(),
}
"""Terms that compare how the images of a batch differ, adapted against source: a scalar."""


class Objective:
    """The loss terms of one method. A new term is a line in one of the tables, and a field of `LossWeights`.

    Args:
        adapted: the model in training.
        weights: which terms to compute, and how.
        source: the frozen reference, in eval mode; may be `None` for a method that compares no pairs.
        decode: turns x0 into the images that the terms compare; by default the adapted model's own.
        exact: whether it makes the training images of their own latents. If not, the terms compare with what
            it makes of these, so that a perfect prediction has no error.
    """

    def __init__(
        self,
        adapted: Denoiser,
        weights: LossWeights,
        source: Denoiser | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        *,
        exact: bool = True,
    ) -> None:
        if weights.pairwise and source is None:
            raise ValueError("pairwise terms need the source model")
        self.adapted, self.source, self.weights = adapted, source, weights
        self.decode, self.exact = decode or adapted.decode, exact

    def __call__(
        self, batch: NoisyBatch, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> dict[str, Tensor]:
        """Return every term whose weight is above 0, unweighted, each a float32 scalar.

        Args:
            batch: this process's share of the global batch. Pairs are formed over the whole of it.
            autocast: makes the autocast context of the networks.
        """
        with autocast():
            prediction = self.adapted.predict(batch.xt, batch.timesteps, batch.condition)
        details, pairwise = self._active(DETAIL_TERMS), self._active(PAIRWISE_TERMS)
        x0 = self._x0(self.adapted, prediction, batch) if details or pairwise else batch.x0
        terms = self._denoising_terms(batch, prediction)
        if details:
            truth = self._truth(batch)
            terms |= {name: DETAIL_TERMS[name](x0, truth).mean() for name in details}
        if self.weights.prior_reconstruction > 0:
            terms["prior_reconstruction"] = self._prior_reconstruction(prediction, batch)
        if pairwise:
            pairs = self._pairs(batch, x0, autocast)
            terms |= {name: PAIRWISE_TERMS[name](pairs) for name in pairwise}
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of terms."""
        return torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()

    @property
    def looks_at_pixels(self) -> bool:
        """Whether a term compares with the training images themselves."""
        return bool(self._active(DETAIL_TERMS)) and self.weights.space != "latent" and self.exact

    def _active(self, terms: Iterable[str]) -> list[str]:
        return [name for name in terms if getattr(self.weights, name) > 0]

    def _denoising_terms(self, batch: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        schedule, weights, number, terms = self.adapted.schedule, self.weights, batch.number, {}
        truth = schedule.true_output(batch.x0, batch.noise, batch.timesteps)
        errors = losses.mean_squared_error(prediction.output, truth)
        errors = errors * schedule.loss_weights(batch.timesteps, weights)
        if weights.simple > 0:
            terms["simple"] = errors[:number].mean()
        if weights.prior > 0:
            terms["prior"] = errors[number:].mean()
        if weights.vlb > 0 and prediction.variance is not None:
            x0, xt, timesteps = (part[:number] for part in (batch.x0, batch.xt, batch.timesteps))
            predicted_x0 = schedule.to_x0(prediction.output[:number], xt, timesteps)
            terms["vlb"] = losses.variational_bound(
                x0, xt, predicted_x0, prediction.variance[:number], timesteps, schedule.levels
            ).mean()
        return terms

    def _prior_reconstruction(self, prediction: Prediction, batch: NoisyBatch) -> Tensor:
        """Return the error of x0 on the P images of the source domain, in the model's own space."""
        rows, schedule = slice(batch.number, None), self.adapted.schedule
        x0 = schedule.to_x0(prediction.output[rows], batch.xt[rows], batch.timesteps[rows])
        return losses.mean_squared_error(x0, batch.x0[rows]).mean()

    def _pairs(
        self, batch: NoisyBatch, x0_adapted: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> Pairs:
        if self.source is None:
            raise ValueError("pairwise terms need the source model")
        timesteps = batch.timesteps[: batch.number]
        with torch.no_grad():
            with autocast():
                prediction = self.source.predict(batch.xt[: batch.number], timesteps, batch.source_condition)
            x0_source = gather_with_gradients(self._x0(self.source, prediction, batch))
        trust = self._trust(gather_with_gradients(timesteps))
        return Pairs(gather_with_gradients(x0_adapted), x0_source, trust, self.weights)

    def _x0(self, model: Denoiser, prediction: Prediction, batch: NoisyBatch) -> Tensor:
        """Return x0 of the target domain's N images in the space that the terms compare."""
        number = batch.number
        x0 = model.schedule.to_x0(prediction.output[:number], batch.xt[:number], batch.timesteps[:number])
        if self.weights.space == "latent" and model.vae is not None:
            return x0
        return self._images(x0)

    def _images(self, x0: Tensor) -> Tensor:
        """Return the images of x0, in the image range if `clamp_x0` says so."""
        images = self.decode(x0)
        return images.clamp(-1, 1) if self.weights.clamp_x0 else images

    def _truth(self, batch: NoisyBatch) -> Tensor:
        """Return the training images in the space that the terms compare."""
        if self.weights.space == "latent":
            return batch.x0[: batch.number]
        return batch.images if self.exact else self._images(batch.x0[: batch.number])

    def _trust(self, timesteps: Tensor) -> Tensor:
        """Return each image's weight in the pairwise terms."""
        a = self.adapted.schedule.alpha_bar(timesteps, timesteps)
        weighting = {"none": torch.ones_like(a), "alpha_bar": a, "one_minus_alpha_bar": 1 - a}
        return weighting[self.weights.noise_weighting]
