"""Each metric against a slow, obvious computation of its definition, or a case worked by hand."""

import itertools

import numpy as np
import pytest
from scipy.linalg import sqrtm

from domainstudio.metrics.diversity import intra_distance
from domainstudio.metrics.frechet import Gaussian, frechet_distance, frechet_distance_of, gaussian
from domainstudio.metrics.kernel import kernel_distance, squared_mmd
from domainstudio.metrics.memorization import memorization
from domainstudio.metrics.neighbours import neighbour_scores


def rows(seed, number, size, shift=0.0):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(size, size))
    return (generator.normal(size=(number, size)) @ mixing + shift).astype(np.float32)


@pytest.mark.parametrize(("n", "m", "size"), [(60, 80, 5), (5, 80, 5), (12, 30, 20), (12, 15, 40)])
def test_frechet_distance_is_fids_formula(n, m, size):
    a, b = rows(0, n, size), rows(1, m, size, shift=0.5)
    means = a.astype(np.float64).mean(axis=0) - b.astype(np.float64).mean(axis=0)
    cov_a, cov_b = np.cov(a.astype(np.float64), rowvar=False), np.cov(b.astype(np.float64), rowvar=False)
    # The tiny multiple of the identity keeps scipy's square root of a singular product from failing.
    product = cov_a @ cov_b + 1e-12 * np.eye(size)
    expected = means @ means + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(product)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_known_gaussians():
    def diagonal(mean, deviations):
        return Gaussian(np.array(mean, float), np.diag(np.array(deviations, float)))

    a, b = diagonal([0, 0], [1, 2]), diagonal([3, 4], [1, 5])
    assert frechet_distance_of(a, b) == pytest.approx(25 + (5 - 2) ** 2)
    assert frechet_distance_of(b, b) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "size"), [(50, 6), (6, 6), (4, 9)])
def test_the_gaussian_has_the_unbiased_covariance(n, size):
    a = rows(2, n, size)
    fitted = gaussian(a)
    np.testing.assert_allclose(fitted.mean, a.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(fitted.covariance, np.cov(a.astype(np.float64), rowvar=False), atol=1e-10)
    assert len(fitted.factor) == min(n, size)


def test_squared_mmd_is_the_unbiased_estimate():
    a, b = rows(0, 7, 4).astype(np.float64), rows(1, 9, 4, shift=0.3).astype(np.float64)

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 4 + 1) ** 3

    within_a = np.mean([kernel(x, y) for x, y in itertools.permutations(a, 2)])
    within_b = np.mean([kernel(x, y) for x, y in itertools.permutations(b, 2)])
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert squared_mmd(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-9)


def test_kernel_distance_is_about_zero_for_one_distribution_and_not_for_two():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(400, 8)), generator.normal(size=(300, 8))
    same, other = kernel_distance(a, b, subset_size=100), kernel_distance(a, b + 1, subset_size=100)
    assert abs(same.mean) < 0.2 < other.mean
    assert same.std > 0
    assert kernel_distance(a, b, 100, seed=1) != same
    assert kernel_distance(a, b, 100, seed=0) == same


def test_one_subset_of_everything_is_the_plain_estimate():
    a, b = rows(0, 20, 3), rows(1, 20, 3)
    distance = kernel_distance(a, b, subset_size=1000, subsets=1)
    assert distance.mean == pytest.approx(squared_mmd(a, b), rel=1e-9)
    assert distance.std == 0


def loop_scores(samples, reference, k):
    def radius(points, centre):
        return sorted(np.linalg.norm(centre - p) for p in points)[k]  # the first is the centre itself

    def inside(points, centres):
        return [[np.linalg.norm(p - c) <= radius(centres, c) for c in centres] for p in points]

    inside_real, inside_fake = inside(samples, reference), inside(reference, samples)
    return (
        np.mean([any(row) for row in inside_real]),
        np.mean([any(row) for row in inside_fake]),
        sum(map(sum, inside_real)) / (k * len(samples)),
        np.mean([any(column) for column in zip(*inside_real, strict=True)]),
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_neighbour_scores_count_balls(k, shift):
    samples, reference = rows(0, 25, 3).astype(np.float64), rows(1, 30, 3, shift).astype(np.float64)
    expected = loop_scores(samples, reference, k)
    assert 0 < expected[0] < 1
    np.testing.assert_allclose(neighbour_scores(samples, reference, k), expected)


def test_neighbour_scores_of_a_line_worked_by_hand():
    # k = 1: radii of the reference are 1, 1 and 8; of the samples 0.25, 0.25 and 19.75.
    reference, samples = np.array([[0.0], [1.0], [9.0]]), np.array([[0.0], [0.25], [20.0]])
    scores = neighbour_scores(samples, reference, k=1)
    assert scores.precision == pytest.approx(2 / 3)
    assert scores.recall == pytest.approx(1)
    assert scores.density == pytest.approx(4 / 3)
    assert scores.coverage == pytest.approx(2 / 3)


def test_intra_distance_averages_pairs_then_clusters():
    samples, training = rows(0, 30, 6), rows(1, 5, 6)
    assigned = [int(np.argmin([((s - t) ** 2).sum() for t in training])) for s in samples]
    expected = []
    for cluster in range(5):
        members = [s for s, c in zip(samples, assigned, strict=True) if c == cluster]
        pairs = [((x - y) ** 2).sum() for x, y in itertools.combinations(members, 2)]
        expected.append(np.mean(pairs) if pairs else None)
    result = intra_distance(samples, training)
    assert result.distances == pytest.approx(expected, rel=1e-5)
    assert result.mean == pytest.approx(np.mean([d for d in expected if d is not None]), rel=1e-5)
    assert result.sizes == tuple(assigned.count(cluster) for cluster in range(5))


def test_memorization_finds_the_nearest_by_loops():
    samples, training, mirrored = rows(0, 20, 6), rows(1, 4, 6), rows(2, 4, 6)
    found = memorization(samples, training, threshold=20.0, mirrored=mirrored)
    sides = [(t, i, side) for side, group in enumerate((training, mirrored)) for i, t in enumerate(group)]
    expected = [min((((sample - t) ** 2).sum(), i, side) for t, i, side in sides) for sample in samples]
    np.testing.assert_allclose(found.distances, [e[0] for e in expected], rtol=1e-5)
    assert found.training.tolist() == [e[1] for e in expected]
    assert found.mirrored.tolist() == [bool(e[2]) for e in expected]
    assert 0 < found.mirrored.sum() < 20
    assert found.share == np.mean([e[0] < 20 for e in expected])
