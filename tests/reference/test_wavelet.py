"""The Haar transform against PyWavelets."""

import numpy as np
import pytest
import pywt
import torch

from domainstudio.training.wavelet import haar_dwt, high_frequency


@pytest.fixture
def images():
    return torch.randn(3, 2, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_bands_are_those_of_pywavelets(images):
    low, (horizontal, vertical, diagonal) = pywt.dwt2(images.numpy(), "haar")
    for ours, theirs in zip(haar_dwt(images), (low, horizontal, vertical, diagonal), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-12)


def test_high_frequency_is_the_sum_of_the_detail_bands(images):
    _, details = pywt.dwt2(images.numpy(), "haar")
    np.testing.assert_allclose(high_frequency(images).numpy(), sum(details), atol=1e-12)


def test_energy_is_kept(images):
    energy = sum(band.square().sum() for band in haar_dwt(images))
    torch.testing.assert_close(energy, images.square().sum())


def test_a_flat_image_has_no_high_frequency():
    assert high_frequency(torch.full((1, 3, 4, 4), 0.7)).abs().max() < 1e-6


def test_autocast_does_not_lower_the_precision(images):
    x = images.float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(high_frequency(x), high_frequency(images).float())


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 3, 5, 4), (1, 3, 4, 5)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="even H and W"):
        high_frequency(torch.zeros(shape))
