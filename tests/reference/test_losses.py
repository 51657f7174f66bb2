"""Every loss term against a slow, obvious float64 computation."""

import math

import numpy as np
import pytest
import pywt
import torch
from torch.distributions import Normal, kl_divergence

from domainstudio.errors import TrainingError
from domainstudio.training import losses

SHAPE = (4, 3, 8, 8)
PAIRS = ["pairwise_similarity_kl", "pairwise_l2"]
DETAILS = ["high_frequency_mse", "laplacian_similarity", "mean_squared_error"]
ALPHAS = torch.linspace(0.999, 0.9, 10, dtype=torch.float64).cumprod(0)


def batch(seed, shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def rows(x):
    """Softmax of each image's cosine similarities to the others, by loops."""
    for i, a in enumerate(x):
        powers = [math.exp(cosine(a.ravel(), b.ravel())) for j, b in enumerate(x) if j != i]
        yield [p / sum(powers) for p in powers]


def kl_by_loops(adapted, source):
    return [
        sum(p * math.log(p / q) for p, q in zip(row_p, row_q, strict=True))
        for row_p, row_q in zip(rows(adapted.numpy()), rows(source.numpy()), strict=True)
    ]


def test_pairwise_similarity_kl():
    """Of the adapted model's rows to the source's, not the reverse."""
    adapted, source = batch(1), batch(2)
    found = losses.pairwise_similarity_kl(adapted, source)
    np.testing.assert_allclose(found, kl_by_loops(adapted, source))
    assert abs(found.sum() - losses.pairwise_similarity_kl(source, adapted).sum()) > 1e-6


def test_pairwise_similarity_kl_of_three_images_by_hand():
    """Adapted: cosines 1, 0, 0; source: 0, 0, 0 (orthogonal). Rows of two entries."""
    adapted = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [0, 0, 1.0]], dtype=torch.float64)
    source = torch.eye(3, dtype=torch.float64)
    p = math.e / (math.e + 1)
    first = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    np.testing.assert_allclose(losses.pairwise_similarity_kl(adapted, source), [first, first, 0], atol=1e-12)


def test_high_frequency_mse():
    x, y = batch(1), batch(2)
    difference = [sum(pywt.dwt2((a - b).numpy(), "haar")[1]) for a, b in zip(x, y, strict=True)]
    expected = [np.mean(d**2) for d in difference]
    np.testing.assert_allclose(losses.high_frequency_mse(x, y), expected)


def test_pairwise_l2():
    adapted, source = batch(1), batch(2)

    def matrix(x):
        return np.array([[np.linalg.norm(a - b) for b in x.numpy()] for a in x.numpy()])

    expected = np.mean((matrix(adapted) - matrix(source)) ** 2, axis=1)
    np.testing.assert_allclose(losses.pairwise_l2(adapted, source), expected)


def test_laplacian_similarity():
    def laplacian(image):
        out = np.zeros((image.shape[0], image.shape[1] - 2, image.shape[2] - 2))
        for c, i, j in np.ndindex(out.shape):
            window = image[c, i : i + 3, j : j + 3]
            out[c, i, j] = 4 * window[1, 1] - window[0, 1] - window[1, 0] - window[1, 2] - window[2, 1]
        return out.ravel()

    a, b = batch(1), batch(2)
    expected = [-cosine(laplacian(x), laplacian(y)) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(losses.laplacian_similarity(a, b), expected)


def test_variational_bound_is_the_kl_of_the_true_posterior():
    t = torch.tensor([3, 7, 9])
    x0, noise = batch(1, (3, 2, 4, 4)).clamp(-1, 1), batch(2, (3, 2, 4, 4))
    eps, variance = batch(3, (3, 2, 4, 4)) * 0.1 + noise, batch(4, (3, 2, 4, 4)).tanh()
    a = ALPHAS[t].view(-1, 1, 1, 1)
    xt = a.sqrt() * x0 + (1 - a).sqrt() * noise
    expected = []
    for i, step in enumerate(t.tolist()):
        now, before = ALPHAS[step], ALPHAS[step - 1]
        beta = 1 - now / before
        beta_tilde = beta * (1 - before) / (1 - now)

        def mean(x, now=now, before=before, beta=beta, i=i):
            return (before.sqrt() * beta * x + (1 - beta).sqrt() * (1 - before) * xt[i]) / (1 - now)

        x0_hat = ((xt[i] - (1 - now).sqrt() * eps[i]) / now.sqrt()).clamp(-1, 1)
        interpolation = (variance[i] + 1) / 2
        log_variance = interpolation * beta.log() + (1 - interpolation) * beta_tilde.log()
        kl = kl_divergence(
            Normal(mean(x0[i]), beta_tilde.sqrt()), Normal(mean(x0_hat), (0.5 * log_variance).exp())
        )
        expected.append(10 * kl.mean().item() / math.log(2))
    predicted_x0 = (xt - (1 - a).sqrt() * eps) / a.sqrt()
    found = losses.variational_bound(x0, xt, predicted_x0, variance, t, ALPHAS)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_variational_bound_at_the_first_timestep_is_a_likelihood():
    zero, a = torch.zeros(2, dtype=torch.long), ALPHAS[0]
    x0, noise = batch(1, (2, 1, 4, 4)).clamp(-0.9, 0.9), batch(2, (2, 1, 4, 4))
    xt = a.sqrt() * x0 + (1 - a).sqrt() * noise
    normal = Normal(x0, (1 - a).sqrt().item())
    probability = (normal.cdf(x0 + 1 / 255) - normal.cdf(x0 - 1 / 255)).flatten(1)
    expected = -10 * probability.log().mean(1) / math.log(2)
    found = losses.variational_bound(x0, xt, x0, torch.ones_like(x0), zero, ALPHAS)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_variational_bound_trains_only_the_variance():
    x0, predicted_x0, variance = (batch(s, (3, 1, 4, 4), torch.float32) for s in (1, 2, 3))
    predicted_x0.requires_grad_()
    variance.requires_grad_()
    timesteps, alphas = torch.tensor([0, 4, 9]), ALPHAS.float()
    losses.variational_bound(x0, x0, predicted_x0, variance, timesteps, alphas).sum().backward()
    assert predicted_x0.grad is None
    assert (variance.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", PAIRS)
class TestPairs:
    def test_zero_where_adapted_is_source(self, name):
        x = batch(1)
        assert getattr(losses, name)(x, x).abs().max() < 1e-12

    def test_order_of_images_does_not_matter(self, name):
        a, s, order = batch(1), batch(2), torch.tensor([2, 0, 3, 1])
        loss = getattr(losses, name)
        torch.testing.assert_close(loss(a[order], s[order]).sum(), loss(a, s).sum())

    def test_no_gradient_reaches_the_source(self, name):
        a, s = batch(1).requires_grad_(), batch(2).requires_grad_()
        getattr(losses, name)(a, s).sum().backward()
        assert a.grad.abs().sum() > 0
        assert s.grad is None

    def test_fewer_than_three_images_are_refused(self, name):
        with pytest.raises(TrainingError, match=r"at least 3 images per batch, got 2.*finetune.batch_size"):
            getattr(losses, name)(batch(1)[:2], batch(2)[:2])

    def test_half_precision_input_is_computed_in_float32(self, name):
        a, s = batch(1, dtype=torch.bfloat16), batch(2, dtype=torch.bfloat16)
        loss = getattr(losses, name)
        with torch.autocast("cpu", torch.bfloat16):
            result = loss(a, s)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, loss(a.double(), s.double()).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*PAIRS, *DETAILS])
def test_gradients_by_finite_differences(name):
    a, b = batch(1, (3, 1, 4, 4)).requires_grad_(), batch(2, (3, 1, 4, 4))
    assert torch.autograd.gradcheck(lambda x: getattr(losses, name)(x, b), a)


def test_blank_images_have_finite_gradients():
    a = torch.zeros(3, 1, 4, 4, requires_grad=True)
    losses.pairwise_similarity_kl(a, batch(2, (3, 1, 4, 4), torch.float32)).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        losses.high_frequency_mse(batch(1), batch(2)[:2])
