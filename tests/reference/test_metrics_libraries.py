"""Metrics against the packages that the field reports them with, on the same features.

torch-fidelity cannot be among them: it imports torchvision, and PyPI's torchvision loads only beside PyPI's
CUDA build of torch, not beside a CPU build.
"""

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torch import nn
from torchmetrics.functional.image.lpips import _normalize_tensor, _spatial_average
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from domainstudio.metrics.frechet import frechet_distance
from domainstudio.metrics.kernel import squared_mmd
from domainstudio.metrics.neighbours import neighbour_scores
from domainstudio.metrics.perceptual import perceptual_rows
from tests.reference.test_metrics_oracles import rows

pytestmark = pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")

SIZE = 6


class Rows(nn.Module):
    """A feature network that reads features off images that are made of them."""

    num_features = SIZE

    def forward(self, images):
        return images.flatten(1)[:, :SIZE]


def library_value(metric, samples, reference):
    for features, real in ((reference, True), (samples, False)):
        metric.update(torch.from_numpy(features)[:, :, None, None], real=real)
    return metric.compute()


@pytest.mark.parametrize(("n", "m", "shift"), [(200, 200, 0.0), (60, 150, 0.5), (10, 40, 2.0)])
def test_frechet_distance_is_that_of_torchmetrics(n, m, shift):
    samples, reference = rows(0, n, SIZE, shift), rows(1, m, SIZE)
    metric = FrechetInceptionDistance(feature=Rows(), normalize=True).set_dtype(torch.float64)
    expected = float(library_value(metric, samples.astype(np.float64), reference.astype(np.float64)))
    assert frechet_distance(samples, reference) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kernel_distance_of_everything_is_that_of_torchmetrics(shift):
    samples, reference = rows(0, 50, SIZE, shift), rows(1, 50, SIZE)
    metric = KernelInceptionDistance(feature=Rows(), subsets=1, subset_size=50, normalize=True)
    mean, _ = library_value(metric, samples, reference)
    assert squared_mmd(samples, reference) == pytest.approx(float(mean), rel=1e-4)


def test_kernel_distance_is_torchmetrics_mean_over_subsets_within_the_draws_spread():
    samples, reference = rows(0, 120, SIZE, 0.5), rows(1, 150, SIZE)
    torch.manual_seed(0)
    metric = KernelInceptionDistance(feature=Rows(), subsets=200, subset_size=40, normalize=True)
    mean, std = map(float, library_value(metric, samples, reference))
    assert squared_mmd(samples, reference) == pytest.approx(mean, abs=4 * std / np.sqrt(200))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_precision_recall_density_and_coverage_are_those_of_prdc(k, shift):
    samples, reference = rows(0, 80, SIZE, shift), rows(1, 100, SIZE)
    expected = compute_prdc(reference, samples, nearest_k=k)
    assert neighbour_scores(samples, reference, k)._asdict() == pytest.approx(expected, rel=1e-9)
    assert 0 < expected["precision"] < 1


def test_the_perceptual_distance_is_torchmetrics_lpips_without_learned_weights():
    torch.manual_seed(0)
    layers = [torch.randn(2, channels, side, side) for channels, side in ((4, 8), (6, 4))]
    units = [_normalize_tensor(layer) for layer in layers]
    expected = sum(
        _spatial_average((unit[:1] - unit[1:]).square().sum(1, keepdim=True), keep_dim=False)
        for unit in units
    )
    first, second = perceptual_rows(layers, largest_side=8)
    assert float((first - second).square().sum()) == pytest.approx(float(expected), rel=1e-5)
