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
from domainstudio.metrics.kernel import kernel_distance, squared_mmd
from domainstudio.metrics.memorization import memorization
from domainstudio.metrics.metric import Metric
from domainstudio.metrics.neighbours import neighbour_scores

SETTINGS = EvaluateSettings(memorized_below=0.5, kid_subsets=5, kid_subset_size=20)


def features(seed, number, shift=0.0, network="net"):
    generator = np.random.default_rng(seed)
    pooled = (generator.normal(size=(number, 6)) + shift).astype(np.float32)
    perceptual = (generator.normal(size=(number, 9)) + shift).astype(np.float32)
    return Features(network, "digest", pooled, perceptual)


FUNCTIONS = {
    "frechet": lambda a, b: frechet_distance(a, b),
    "mmd": lambda a, b: squared_mmd(a, b),
    "neighbours": lambda a, b: tuple(neighbour_scores(a, b)),
    "intra": lambda a, b: intra_distance(a, b[:4]).mean,
    "memorised": lambda a, b: memorization(a, b[:4], 3.0).share,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_order_of_images_does_not_matter(name):
    a, b = features(0, 40).pooled, features(1, 50, shift=0.5).pooled
    shuffled = a[np.random.default_rng(2).permutation(len(a))]
    assert FUNCTIONS[name](shuffled, b) == pytest.approx(FUNCTIONS[name](a, b), rel=1e-9)
    assert FUNCTIONS[name](a * 2, b) != pytest.approx(FUNCTIONS[name](a, b), rel=1e-3)


def test_frechet_and_kernel_distance_are_symmetric():
    a, b = features(0, 30).pooled, features(1, 40, shift=0.5).pooled
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert squared_mmd(a, b) == pytest.approx(squared_mmd(b, a))


def test_a_set_is_at_no_distance_of_itself():
    a = features(0, 30).pooled
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
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
    joined = np.concatenate([block for _, block in squared_distance_blocks(a, b, block_bytes)])
    np.testing.assert_allclose(joined, ((a[:, None].astype(float) - b[None]) ** 2).sum(axis=2), rtol=1e-9)


def test_blocks_are_small():
    a = np.ones((1000, 3), dtype=np.float32)
    blocks = [block for _, block in squared_distance_blocks(a, a, block_bytes=100_000)]
    assert len(blocks) > 1
    assert max(block.nbytes for block in blocks) <= 100_000


def test_equal_rows_are_exactly_at_distance_zero():
    rows = (features(0, 50).perceptual * 1000 + 5).astype(np.float32)
    indices, distances = nearest(rows, rows)
    assert indices.tolist() == list(range(50))
    assert (distances == 0).all()
    assert (nearest(rows, np.nextafter(rows, np.float32(np.inf)) + np.float32(0.01))[1] > 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: frechet_distance(a[:1], a), "at least 2 images"),
        (lambda a: frechet_distance(np.full_like(a, np.nan), a), "not finite"),
        (lambda a: kernel_distance(a[:1], a), "at least 2 images on either side"),
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
    report = evaluate(features(0, 60), features(1, 5), features(2, 40), features(3, 60), SETTINGS)
    content = report.metrics()
    keys = {
        *("number", "frechet_distance", "kid", "kid_std", "precision", "recall", "density", "coverage"),
        *("intra_distance", "intra_clusters", "intra_sizes", "memorized_share", "nearest_distance_median"),
    }
    assert set(content["samples"]) == keys
    assert {figure.key for metric in METRICS for figure in metric.figures} <= keys
    assert set(content["references"]) == {"shots", "source", "domain"}
    assert set(content["references"]["source"]) == set(content["references"]["domain"]) == keys
    assert (content["features"], content["features_digest"], content["number"]) == ("net", "digest", 60)
    assert content["references"]["domain"]["number"] == 20
    assert content["samples"]["frechet_distance"] == frechet_distance(
        features(0, 60).pooled, features(2, 40).pooled
    )


def test_a_metric_in_the_catalogue_is_measured_for_samples_and_references(monkeypatch):
    metric = Metric(lambda measured: {"images": len(measured.images)}, figures=())
    monkeypatch.setattr(evaluation, "METRICS", (*METRICS, metric))
    content = evaluate(features(0, 60), features(1, 5), features(2, 40), features(3, 50), SETTINGS).metrics()
    assert content["samples"]["images"] == 60
    found = {name: scores["images"] for name, scores in content["references"].items()}
    assert found == {"shots": 5, "source": 50, "domain": 20}


def test_training_images_as_samples_are_memorised_and_not_diverse():
    shots = evaluate(features(0, 60), features(1, 5), features(2, 40), None, SETTINGS).references["shots"]
    assert (shots["memorized_share"], shots["nearest_distance_median"]) == (1, 0)
    assert shots["intra_distance"] == pytest.approx(0, abs=1e-12)
    assert shots["number"] == 5


def test_the_domain_as_samples_comes_near_a_perfect_model():
    report = evaluate(features(0, 60, shift=1.0), features(1, 5), features(2, 200), None, SETTINGS)
    domain: dict[str, Any] = dict(report.references["domain"])
    samples: dict[str, Any] = dict(report.samples)
    assert domain["number"] == 60
    assert domain["frechet_distance"] < samples["frechet_distance"]
    assert domain["recall"] > samples["recall"]


def test_few_images_leave_metrics_out_instead_of_failing():
    report = evaluate(features(0, 2), features(1, 1), features(2, 3), features(3, 1), SETTINGS)
    assert "precision" not in report.metrics()["samples"]
    assert "frechet_distance" in report.metrics()["samples"]
    assert "frechet_distance" not in report.metrics()["references"]["source"]
    assert report.metrics()["references"]["source"]["memorized_share"] == 0


def test_without_a_domain_the_shots_are_the_reference_and_the_report_says_so():
    shots = features(1, 8)
    report = evaluate(features(0, 60), shots, None, None, SETTINGS)
    assert report.domain_is_shots
    assert report.domain_number == 8
    assert "domain" not in report.references
    assert report.samples["frechet_distance"] == frechet_distance(features(0, 60).pooled, shots.pooled)


def test_nearest_pairs_are_sorted_and_keep_seeds():
    report = evaluate(features(0, 6), features(1, 3), features(2, 40), None, SETTINGS)
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
    shots, mirrored = features(1, 5), features(2, 5)
    copies = mirrored.take([3, 3, 1])
    blind = evaluate(copies, shots, features(3, 40), None, SETTINGS)
    seeing = evaluate(copies, shots, features(3, 40), None, SETTINGS, mirrored=mirrored)
    assert (blind.samples["memorized_share"], seeing.samples["memorized_share"]) == (0, 1)
    assert [(p["training"], p["mirrored"]) for p in seeing.nearest_pairs()["pairs"]] == [
        (3, True),
        (3, True),
        (1, True),
    ]


def test_features_of_two_networks_are_not_compared():
    with pytest.raises(DataError, match="different networks"):
        evaluate(features(0, 6), features(1, 3, network="other"), None, None, SETTINGS)


def test_held_out_images_are_no_training_images():
    domain = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
    assert held_out(domain, domain[[1, 4]]) == [0, 2, 3, 5]
    assert held_out(domain, domain) == []
    assert held_out(domain, domain[:, :, :2, :2]) == list(range(6))
