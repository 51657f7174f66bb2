"""Figures of candidates: samples of known quality are ranked rightly, by the shots and the source alone."""

import numpy as np
import pytest

from domainstudio.errors import DataError
from domainstudio.metrics.diversity import intra_distance
from domainstudio.metrics.features import Features
from domainstudio.metrics.kernel import squared_mmd
from domainstudio.selection.figures import Yardstick

WIDTH = 24
NUMBER = 80


def images(number, seed, place=0.0):
    """Return features of images of a domain: a place and a spread."""
    rows = np.random.default_rng(seed).standard_normal((number, WIDTH)).astype(np.float32)
    rows[:, :4] += place
    return Features("toy", "0", rows, rows)


def mixed(first, second, share):
    """Return features of which the first `share` are of one set and the rest of another."""
    cut = int(share * len(first))
    return Features(
        "toy",
        "0",
        np.concatenate([first.pooled[:cut], second.pooled[cut:]]),
        np.concatenate([first.perceptual[:cut], second.perceptual[cut:]]),
    )


SHOTS, SOURCE, REAL = images(10, 1, 3.0), images(NUMBER, 2), images(NUMBER, 3, 3.0)
COPIES = SHOTS.take(np.arange(NUMBER) % 10)


@pytest.fixture(scope="module")
def measured():
    yardstick = Yardstick(SHOTS, SOURCE, None, 0.3)
    samples = {
        "source": SOURCE,
        "half real": mixed(REAL, SOURCE, 0.5),
        "real": REAL,
        "half copies": mixed(COPIES, REAL, 0.5),
        "copies": COPIES,
        "few": REAL.take(np.arange(NUMBER) % 8),
    }
    return {name: yardstick.measure(each) for name, each in samples.items()}


def test_fidelity_is_the_way_from_the_source_to_the_domain(measured):
    way = [measured[name].fidelity[0] for name in ("source", "half real", "real")]
    assert way == sorted(way)
    assert way[0] == pytest.approx(0, abs=1e-9)
    assert way[1] == pytest.approx(0.5, abs=0.1)
    assert way[2] > 0.75


def test_diversity_is_of_samples_in_the_domain_and_copies_have_none(measured):
    assert np.isnan(measured["source"].diversity[0])
    assert measured["copies"].diversity[0] == pytest.approx(0, abs=1e-6)
    found = [measured[name].diversity[0] for name in ("copies", "few", "half copies", "real")]
    assert found == sorted(found)
    assert measured["half real"].diversity[0] == pytest.approx(measured["real"].diversity[0], rel=0.2)


def test_copies_and_the_domain_are_counted(measured):
    assert measured["real"].copies[0] == 0
    assert measured["half copies"].copies[0] == 0.5
    assert measured["source"].in_domain[0] < 0.1
    assert measured["half real"].in_domain[0] == pytest.approx(0.5, abs=0.1)
    assert measured["real"].in_domain[0] > 0.85


def test_figures_are_those_of_the_metrics():
    """The first entry by matrices is what the metrics compute from the rows."""
    yardstick = Yardstick(SHOTS, SOURCE, None, 0.3)
    found, rows = yardstick.measure(REAL), REAL.perceptual[yardstick.probe.contains(REAL.pooled)]
    kid = [squared_mmd(each.pooled, SHOTS.pooled) for each in (SOURCE, REAL)]
    assert found.fidelity[0] == pytest.approx(1 - np.sqrt(max(kid[1], 0) / kid[0]))
    gaps = ((SHOTS.perceptual[:, None] - SHOTS.perceptual) ** 2).sum(-1)
    intra = intra_distance(rows, SHOTS.perceptual).mean
    assert found.diversity[0] == pytest.approx(intra / (gaps.sum() / 90), rel=1e-5)
    nearest = (gaps + np.diag(np.full(10, np.inf))).min(axis=1)
    assert yardstick.threshold == pytest.approx(0.3 * np.median(nearest), rel=1e-5)


def test_a_resample_is_the_figure_of_the_drawn_samples():
    yardstick = Yardstick(SHOTS, SOURCE, None, 0.3)
    found = yardstick.measure(mixed(COPIES, REAL, 0.5))
    counts = yardstick._counts[1]
    assert counts.sum() == NUMBER
    assert found.copies[1] == pytest.approx(counts[: NUMBER // 2].sum() / NUMBER)
    assert 0 < np.std(found.fidelity[1:]) < 0.2


def test_mirrored_copies_count_where_images_are_mirrored():
    mirror = images(10, 9, 3.0)
    samples = mirror.take(np.arange(NUMBER) % 10)
    for mirrored, share in ((None, 0.0), (mirror, 1.0)):
        assert Yardstick(SHOTS, SOURCE, mirrored, 0.3).measure(samples).copies[0] == share


def test_two_images_are_too_few():
    with pytest.raises(DataError, match=r"at least 3 training images, got 2.*candidate_every to 0"):
        Yardstick(SHOTS.take([0, 1]), SOURCE, None, 0.3)
