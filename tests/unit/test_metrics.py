"""Properties that every metric must have, and the report that gathers them."""

from typing import Any

import numpy as np
import pytest

from domainstudio.config import EvaluateSettings
from domainstudio.errors import DataError
from domainstudio.metrics import evaluation
from domainstudio.metrics.catalogue import METRICS
from domainstudio.metrics.distances import nearest, squared_distance_blocks
from domainstudio.metrics.diversity import intra_distance
from domainstudio.metrics.evaluation import evaluate, held_out
from domainstudio.metrics.features import Features
from domainstudio.metrics.frechet import frechet_distance
from domainstudio.metrics.kernel import squared_mmd
from domainstudio.metrics.memorization import memorization
from domainstudio.metrics.metric import Metric
from domainstudio.metrics.neighbours import neighbour_scores
from tests.models import tiny_images

SETTINGS = EvaluateSettings(memorized_below=0.5, resamples=4)


def features(seed, number, shift=0.0):
    generator = np.random.default_rng(seed)
    rows = ((generator.normal(size=(number, width)) + shift).astype(np.float32) for width in (6, 9))
    return Features("net", "digest", *rows)


def evaluated(samples=60, shots=5, domain=40, source=None, **options):
    """Return the report of that many random samples, training images and images of domain and source."""
    own = features(0, samples) if isinstance(samples, int) else samples
    other = features(3, source) if source else None
    return evaluate(own, features(1, shots), features(2, domain), other, SETTINGS, **options)


@pytest.mark.parametrize(
    "function",
    [
        frechet_distance,
        squared_mmd,
        lambda a, b: tuple(neighbour_scores(a, b)),
        lambda a, b: intra_distance(a, b[:4]).mean,
        lambda a, b: memorization(a, b[:4], 3.0).share,
    ],
)
def test_the_order_of_images_does_not_matter(function):
    a, b = features(0, 40).pooled, features(1, 50, shift=0.5).pooled
    shuffled = a[np.random.default_rng(2).permutation(len(a))]
    assert function(shuffled, b) == pytest.approx(function(a, b), rel=1e-9)
    assert function(a * 2, b) != pytest.approx(function(a, b), rel=1e-3)
    if function in (frechet_distance, squared_mmd):
        assert function(a, b) == pytest.approx(function(b, a))


def test_a_set_is_at_no_distance_of_itself():
    a = features(0, 30).pooled
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert tuple(neighbour_scores(a, a))[:2] == (1, 1)


def test_replicas_score_no_diversity_and_full_memorisation():
    training = features(0, 10).perceptual
    replicas = np.repeat(training, 20, axis=0)
    result = intra_distance(replicas, training)
    assert result.mean == pytest.approx(0, abs=1e-12)
    assert result.sizes == (20,) * 10
    assert memorization(replicas, training, 1e-9).share == 1


def test_clusters_without_a_pair_are_left_out():
    training = np.array([[0.0], [10.0], [20.0]], dtype=np.float32)
    samples = np.array([[0.0], [2.0], [11.0]], dtype=np.float32)
    result = intra_distance(samples, training)
    assert result.distances == pytest.approx((4.0, None, None))
    assert result.mean == pytest.approx(4.0)
    assert (result.clusters, result.sizes) == (1, (2, 1, 0))
    assert intra_distance(samples[2:], training).mean is None


@pytest.mark.parametrize("block_bytes", [1, 8 * 7 * 3, 2**20])
def test_blocks_join_to_the_matrix_of_distances(block_bytes):
    a, b = features(0, 11).perceptual, features(1, 7).perceptual
    blocks = [block for _, block in squared_distance_blocks(a, b, block_bytes)]
    assert all(block.nbytes <= max(block_bytes, b.shape[0] * 8) for block in blocks)
    np.testing.assert_allclose(
        np.concatenate(blocks), ((a[:, None].astype(float) - b[None]) ** 2).sum(axis=2), rtol=1e-9
    )


def test_equal_rows_are_exactly_at_distance_zero():
    rows = (features(0, 50).perceptual * 1000 + 5).astype(np.float32)
    indices, distances = nearest(rows, rows)
    assert indices.tolist() == list(range(50))
    assert (distances == 0).all()
    assert (nearest(rows, np.nextafter(rows, np.float32(np.inf)) + np.float32(0.01))[1] > 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a: evaluate(Features("a", "0", a, a), Features("b", "0", a, a), None, None, SETTINGS),
            "different networks",
        ),
        (lambda a: frechet_distance(a[:1], a), "at least 2 images"),
        (lambda a: frechet_distance(np.full_like(a, np.nan), a), "not finite"),
        (lambda a: squared_mmd(a[:1], a), "at least 2 images on either side"),
        (lambda a: neighbour_scores(a[:3], a, k=3), "more than 3 images"),
        (lambda a: intra_distance(a, a[:0]), "at least one training image"),
        (lambda a: memorization(a[:0], a, 1.0), "got 0 and 10"),
    ],
)
def test_too_little_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call(features(0, 10).pooled)


def test_features_must_be_finite_float32_rows():
    good = np.zeros((2, 3), dtype=np.float32)
    wrong: list[Any] = [good.astype(np.float64), good[0], np.full_like(good, np.inf), good[:1]]
    for bad in wrong:
        with pytest.raises(DataError, match="net: perceptual"):
            Features("net", "digest", good, bad)


def test_the_report_has_every_score_and_reference():
    content = evaluated(source=60).metrics()
    keys = {
        *("number", "frechet_distance", "frechet_distance_infinity", "kid", "precision", "recall"),
        *("density", "coverage", "intra_distance", "intra_clusters", "intra_sizes", "memorized_share"),
        *("memorized_false_alarms", "nearest_distance_median"),
    }
    probed = {"in_domain_share", "intra_distance_in_domain"}
    assert set(content["samples"]) == keys | probed | {"intervals"}
    assert {figure.key for metric in METRICS for figure in metric.figures} <= keys | probed
    assert set(content["references"]) == {"shots", "source", "domain"}
    assert set(content["references"]["source"]) == keys
    assert set(content["references"]["domain"]) == keys | probed
    assert content["probe"]["source"] == "samples"
    assert (content["features"], content["features_digest"], content["number"]) == ("net", "digest", 60)
    assert content["references"]["domain"]["number"] == 20
    expected = frechet_distance(features(0, 60).pooled, features(2, 40).pooled)
    assert content["samples"]["frechet_distance"] == pytest.approx(expected)
    low, high = content["samples"]["intervals"]["frechet_distance"]
    assert low < expected < high


def test_a_metric_in_the_catalogue_is_measured_for_samples_and_references(monkeypatch):
    metric = Metric(lambda measured: lambda chosen: {"images": len(measured.images)}, figures=())
    monkeypatch.setattr(evaluation, "METRICS", (*METRICS, metric))
    content = evaluated(source=50).metrics()
    assert content["samples"]["images"] == 60
    found = {name: scores["images"] for name, scores in content["references"].items()}
    assert found == {"shots": 5, "source": 50, "domain": 20}


def test_training_images_as_samples_are_memorised_and_not_diverse():
    shots = evaluated().references["shots"]
    assert (shots["memorized_share"], shots["nearest_distance_median"]) == (1, 0)
    assert shots["intra_distance"] == pytest.approx(0, abs=1e-12)
    assert shots["number"] == 5


def test_the_domain_as_samples_comes_near_a_perfect_model():
    report = evaluated(features(0, 60, shift=1.0), domain=200)
    domain: dict[str, Any] = dict(report.references["domain"])
    samples: dict[str, Any] = dict(report.samples)
    assert domain["number"] == 60
    assert domain["frechet_distance"] < samples["frechet_distance"]
    assert domain["recall"] > samples["recall"]


def test_few_images_leave_metrics_out_instead_of_failing():
    report = evaluated(2, 1, 3, 1).metrics()
    assert "precision" not in report["samples"]
    assert "frechet_distance" in report["samples"]
    assert "frechet_distance" not in report["references"]["source"]
    assert report["references"]["source"]["memorized_share"] == 0


def test_without_a_domain_the_shots_are_the_reference_and_the_report_says_so():
    shots = features(1, 8)
    report = evaluate(features(0, 60), shots, None, None, SETTINGS)
    assert report.domain_is_shots
    assert report.domain_number == 8
    assert "domain" not in report.references
    assert report.samples["frechet_distance"] == pytest.approx(
        frechet_distance(features(0, 60).pooled, shots.pooled)
    )


def test_nearest_pairs_are_sorted_and_keep_seeds():
    report = evaluated(6, 3)
    content = report.nearest_pairs(seeds=[100 + i for i in range(6)])
    distances = [pair["distance"] for pair in content["pairs"]]
    assert distances == sorted(distances)
    assert sorted(pair["sample"] for pair in content["pairs"]) == list(range(6))
    for pair in content["pairs"]:
        assert pair["seed"] == 100 + pair["sample"]
        assert pair["distance"] == report.nearest.distances[pair["sample"]]
    assert content["threshold"] == 0.5
    assert "seed" not in report.nearest_pairs()["pairs"][0]


def test_a_mirrored_copy_is_memorised():
    mirrored = features(4, 5)
    copies = mirrored.take([3, 3, 1])
    blind, seeing = evaluated(copies), evaluated(copies, mirrored=mirrored)
    assert (blind.samples["memorized_share"], seeing.samples["memorized_share"]) == (0, 1)
    found = [(pair["training"], pair["mirrored"]) for pair in seeing.nearest_pairs()["pairs"]]
    assert found == [(3, True), (3, True), (1, True)]


def test_held_out_images_are_no_training_images():
    domain = tiny_images(side=4)
    assert held_out(domain, domain[[1, 4]]) == [0, 2, 3, 5]
    assert held_out(domain, domain) == []
    assert held_out(domain, domain[:, :, :2, :2]) == list(range(6))
