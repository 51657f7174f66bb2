"""The loss terms of DomainStudio, and the simpler pair of the project's brief: tensors in, tensors out.

Every term is unweighted and computed in at least float32, under autocast too. The two families, their
sources and weights are tabled in `docs/notation.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

import torch
import torch.nn.functional as F

from domainstudio.config import MIN_PAIRED_BATCH
from domainstudio.errors import TrainingError
from domainstudio.training.wavelet import high_frequency

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")

_MIN_NORM = 1e-4
"""Vectors shorter than this count as having this length: a blank image then has no infinite gradient."""

_LAPLACIAN = ((0.0, -1.0, 0.0), (-1.0, 4.0, -1.0), (0.0, -1.0, 0.0))


def _full_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Compute in float32 (float64 stays), whatever autocast and the arguments' types say."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            full = [a.float() if isinstance(a, torch.Tensor) and a.dtype.itemsize < 4 else a for a in args]
            return function(*full, **kwargs)  # type: ignore[arg-type]

    return wrapped


@_full_precision
def pairwise_similarity_kl(adapted: Tensor, source: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(p_i^adapted ‖ p_i^source) for each image i, with p_i = softmax_{j≠i}(cos(x_i, x_j) / τ).

    DDPM-PA (arXiv 2211.03264), equations 5 and 6; DomainStudio, equations 4 to 7. The sum over i is the
    paper's loss; sum / (N(N-1)) is PyTorch's element-wise mean, which the released code weights by 100.
    The released code computes KL(source ‖ adapted) instead.

    Args:
        adapted: the adapted model's predictions, with shape (N, ...), N ≥ 3.
        source: the source model's, of the same noisy batch, with the same shape. No gradient reaches it.
        temperature: τ > 0; the paper's is 1.

    Returns:
        One divergence per image, ≥ 0, with shape (N,).

    Raises:
        TrainingError: fewer than 3 images, with which every row is identically 0.
        ValueError: the shapes differ.
    """
    _check_pairs(adapted, source)
    log_p = (_similarity_rows(adapted) / temperature).log_softmax(dim=1)
    log_q = (_similarity_rows(source.detach()) / temperature).log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


@_full_precision
def high_frequency_mse(x0_adapted: Tensor, x0: Tensor) -> Tensor:
    """Return the mean squared error between the high frequencies of each prediction and its own image.

    DomainStudio, equation 8. The released text-to-image code compares with other, freshly drawn images.

    Args:
        x0_adapted: predicted clean images, with shape (N, C, H, W), H and W even.
        x0: the training images they were noised from, with the same shape.

    Returns:
        One error per image, with shape (N,).
    """
    _check_same_shape(x0_adapted, x0)
    return (high_frequency(x0_adapted) - high_frequency(x0)).square().flatten(1).mean(dim=1)


@_full_precision
def pairwise_l2(adapted: Tensor, source: Tensor) -> Tensor:
    """Return the mean squared error between each image's L2 distances to the batch, adapted against source.

    The mean is over its row of the N×N matrix of distances, the zero on the diagonal included.

    Args:
        adapted: the adapted model's predictions, with shape (N, ...), N ≥ 3.
        source: the source model's, of the same noisy batch, with the same shape. No gradient reaches it.

    Returns:
        One error per image, with shape (N,).

    Raises:
        TrainingError: fewer than 3 images.
        ValueError: the shapes differ.
    """
    _check_pairs(adapted, source)
    return (_distances(adapted) - _distances(source.detach())).square().mean(dim=1)


@_full_precision
def laplacian_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the negative cosine similarity of Laplacian-filtered images, one per pair of images.

    The kernel ((0, -1, 0), (-1, 4, -1), (0, -1, 0)) acts per channel without padding; one cosine is taken
    over the whole filtered image.

    Args:
        a: images, with shape (N, C, H, W), H and W at least 3.
        b: images, with the same shape.

    Returns:
        Values in [-1, 1], with shape (N,); -1 means the same details.
    """
    _check_same_shape(a, b)
    return -(_unit(_laplacian(a).flatten(1)) * _unit(_laplacian(b).flatten(1))).sum(dim=1)


@_full_precision
def mean_squared_error(prediction: Tensor, truth: Tensor) -> Tensor:
    """Return the mean squared error of each image: two (N, ...) → (N,)."""
    _check_same_shape(prediction, truth)
    return (prediction - truth).square().flatten(1).mean(dim=1)


@_full_precision
def variational_bound(
    x0: Tensor,
    xt: Tensor,
    predicted_x0: Tensor,
    variance: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
) -> Tensor:
    """Return T times the variational bound's term of each image's timestep, in bits per dimension.

    Improved DDPM (arXiv 2102.09672), equations 4 to 7 and 15 and 16: the mean is detached, so that only the
    learned variance is trained by it. The customary weight 0.001 belongs to this scaling.

    Args:
        x0: clean images in [-1, 1], with shape (N, C, H, W).
        xt: noisy images, with the same shape.
        predicted_x0: predicted clean images, with the same shape; detached here.
        variance: the network's variance output v in about [-1, 1], with the same shape.
        timesteps: integers in [0, T), with shape (N,).
        alphas_cumprod: ᾱ of all timesteps, with shape (T,).

    Returns:
        One value per image, with shape (N,).
    """
    alpha_bar = _per_image(alphas_cumprod, timesteps, x0)
    previous = _per_image(F.pad(alphas_cumprod, (1, 0), value=1.0), timesteps, x0)
    beta = 1 - alpha_bar / previous
    posterior_variance = beta * (1 - previous) / (1 - alpha_bar)
    first = _per_image(alphas_cumprod, torch.ones_like(timesteps), x0)  # β̃ is 0 at t = 0: use that of t = 1
    before = _per_image(alphas_cumprod, torch.zeros_like(timesteps), x0)
    smallest = (1 - first / before) * (1 - before) / (1 - first)
    log_posterior = torch.where(posterior_variance > 0, posterior_variance, smallest).log()
    fraction = (variance + 1) / 2
    log_variance = fraction * beta.log() + (1 - fraction) * log_posterior

    x0_weight, xt_weight = (
        previous.sqrt() * beta / (1 - alpha_bar),
        (1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar),
    )
    true_mean = x0_weight * x0 + xt_weight * xt
    mean = x0_weight * predicted_x0.detach().clamp(-1, 1) + xt_weight * xt

    kl = 0.5 * (
        log_variance
        - log_posterior
        - 1
        + (log_posterior - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    nll = -_discretized_gaussian_log_likelihood(x0, mean, log_variance)
    terms = torch.where((timesteps == 0).view(-1, *[1] * (x0.ndim - 1)), nll, kl)
    return terms.flatten(1).mean(dim=1) / math.log(2) * len(alphas_cumprod)


def _discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log-likelihood of 8-bit values under a Gaussian (DDPM, arXiv 2006.11239, equation 13)."""
    inverse_std = (-0.5 * log_variance).exp()
    upper = torch.special.ndtr((x - mean + 1 / 255) * inverse_std)
    lower = torch.special.ndtr((x - mean - 1 / 255) * inverse_std)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp_min(1e-12).log()


def _per_image(values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    return values.to(like)[timesteps].view(-1, *[1] * (like.ndim - 1))


def _similarity_rows(x: Tensor) -> Tensor:
    """Return the (N, N-1) cosine similarities of each image to the others."""
    number, unit = len(x), _unit(x.flatten(1))
    similarity = unit @ unit.T
    # between two entries of the diagonal lie N others: unlike a mask, this makes no GPU wait
    return similarity.flatten()[1:].view(number - 1, number + 1)[:, :-1].reshape(number, number - 1)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1, eps=_MIN_NORM)


def _distances(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")


def _laplacian(x: Tensor) -> Tensor:
    channels = x.shape[1]
    return F.conv2d(x, x.new_tensor(_LAPLACIAN).expand(channels, 1, 3, 3), groups=channels)


def _check_same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"both batches must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def _check_pairs(adapted: Tensor, source: Tensor) -> None:
    _check_same_shape(adapted, source)
    if len(adapted) < MIN_PAIRED_BATCH:
        raise TrainingError(
            f"a pairwise loss needs at least {MIN_PAIRED_BATCH} images per batch, got {len(adapted)}: with "
            "fewer it is identically 0. Raise finetune.batch_size"
        )
