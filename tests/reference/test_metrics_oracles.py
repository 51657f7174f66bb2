"""Each metric against a slow, obvious computation of its definition, or a case worked by hand."""

import itertools

import numpy as np
import pytest
from scipy.linalg import sqrtm

from domainstudio.metrics import kernel
from domainstudio.metrics.diversity import intra_distance
from domainstudio.metrics.frechet import (
    Gaussian,
    frechet_distance,
    frechet_distance_infinity,
    frechet_distance_of,
    gaussian,
)
from domainstudio.metrics.intervals import intervals
from domainstudio.metrics.kernel import squared_mmd
from domainstudio.metrics.memorization import memorization
from domainstudio.metrics.metric import Figure, Metric, undefined
from domainstudio.metrics.neighbours import neighbour_scores
from domainstudio.metrics.ridge import Ridge


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

    def cubic(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 4 + 1) ** 3

    within_a = np.mean([cubic(x, y) for x, y in itertools.permutations(a, 2)])
    within_b = np.mean([cubic(x, y) for x, y in itertools.permutations(b, 2)])
    between = np.mean([cubic(x, y) for x in a for y in b])
    assert squared_mmd(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-9)


def test_kernel_distance_is_about_zero_for_one_distribution_and_not_for_two():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(400, 8)), generator.normal(size=(300, 8))
    assert abs(squared_mmd(a, b)) < 0.2 < squared_mmd(a, b + 1)


def test_the_reference_is_compared_in_blocks(monkeypatch):
    a, b = rows(0, 20, 3), rows(1, 31, 3)
    whole = squared_mmd(a, b)
    monkeypatch.setattr(kernel, "BLOCK", 7)
    assert squared_mmd(a, b) == pytest.approx(whole, rel=1e-9)


def test_the_extrapolated_distance_is_that_of_the_papers_regression():
    """15 sizes, a regression on 1/n (arXiv 1911.07023), against the exact distribution of the reference."""
    generator, size = np.random.default_rng(0), 12
    scales = 1 / np.arange(1, size + 1)
    samples, reference = generator.normal(size=(2, 3000, size))
    samples = samples * scales + 0.1
    sizes = np.linspace(300, 3000, 15).astype(int)
    chosen = [[generator.choice(3000, n, replace=False) for _ in range(2)] for n in sizes]
    distances = [frechet_distance(samples[i], reference[j]) for i, j in chosen]
    _, intercept = np.polyfit(1 / sizes, distances, 1)
    exact = size * 0.1**2 + ((1 - scales) ** 2).sum()
    found = frechet_distance_infinity(samples, reference)
    assert found == pytest.approx(intercept, abs=0.15)
    assert found == pytest.approx(exact, abs=0.15)


def test_the_extrapolated_distance_takes_halves_of_both_sets():
    generator = np.random.default_rng(0)
    samples, reference = generator.normal(size=(40, 6)), generator.normal(size=(30, 6)) + 1
    split = np.array_split(np.random.default_rng(0).permutation(30), 2)
    halving = np.random.default_rng(40)
    halves = []
    for _ in range(3):
        for own, other in zip(np.array_split(halving.permutation(40), 2), split, strict=True):
            halves.append(frechet_distance(samples[own], reference[other]))
    expected = 2 * frechet_distance(samples, reference) - np.mean(halves)
    assert frechet_distance_infinity(samples, reference) == pytest.approx(expected, rel=1e-6)


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(size=401)
    metric = Metric(lambda measured: undefined, (Figure("mean", "Mean", None, ""),))
    found = intervals(metric, lambda chosen: {"mean": float(values[chosen].mean())}, 401, 2000, seed=0)
    half_width = 1.96 * values.std() / np.sqrt(401)
    low, high = found["mean"]
    assert (low + high) / 2 == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.05)


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


@pytest.mark.parametrize(("number", "size"), [(40, 6), (20, 50)])
def test_a_probes_held_out_scores_are_those_of_fits_without_the_image(number, size):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(number, size))
    labels = np.where(features[:, 0] + generator.normal(size=number) > 0, "yes", "no")
    probe = Ridge(features).fit(labels.tolist())
    strengths = np.logspace(-4, 2, 13) * ((features - features.mean(axis=0)) ** 2).sum() / size
    errors, held = [], []
    for penalty in strengths:
        held.append(np.stack([left_out(features, labels == "yes", row, penalty) for row in range(number)]))
        errors.append(((held[-1] - (labels == "yes")) ** 2).sum())
    np.testing.assert_allclose(probe.held_out[:, 1], held[int(np.argmin(errors))], rtol=1e-6, atol=1e-8)
    assert probe.accuracy == ((probe.held_out[:, 1] > 0.5) == (labels == "yes")).mean()
    assert (np.array(probe.predict(features)) == labels).mean() >= probe.accuracy


def left_out(features, positive, row, penalty):
    """Fit a ridge regression without a row, with an unpenalised intercept, and predict that row."""
    kept = np.arange(len(features)) != row
    design = np.column_stack([np.ones(kept.sum()), features[kept]])
    ridge = penalty * np.diag([0.0] + [1.0] * features.shape[1])
    weights = np.linalg.solve(design.T @ design + ridge, design.T @ positive[kept].astype(float))
    return weights[0] + features[row] @ weights[1:]
