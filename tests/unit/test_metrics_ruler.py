"""The ruler: every figure ranks generators of known quality rightly, made of real images."""

import numpy as np
import pytest

from domainstudio.config import EvaluateSettings, PrepareSettings
from domainstudio.data.packing import prepare
from domainstudio.metrics.evaluation import evaluate
from domainstudio.metrics.features import Features, extract
from domainstudio.metrics.frechet import frechet_distance, frechet_distance_infinity
from domainstudio.metrics.garbage import garbage
from domainstudio.metrics.networks import load_network
from stages.origins import LISTERS

NUMBER, REST, SHOTS = 200, 300, 10
"""Samples of each generator (the demo's number), further real images of each domain, and training images."""

DOMAIN = """title: test
faces: [{{style: {style}, number: {number}, options: {{backgroundColor: [ffffff]}}}}]
"""


def test_extrapolation_ranks_a_perfect_generator_before_a_collapsed_one_where_the_plain_distance_does_not():
    """Fewer samples than features: the varied generator's distance is mostly bias."""
    generator = np.random.default_rng(0)
    scales = np.sqrt(np.arange(1, 321.0) ** -0.5)

    def draw(number, spread):
        return generator.normal(size=(number, 320)) * scales * spread

    reference, perfect, collapsed = draw(1000, 1.0), draw(250, 1.0), draw(250, 0.5**0.5)
    assert frechet_distance(perfect, reference) > frechet_distance(collapsed, reference)
    assert (
        frechet_distance_infinity(perfect, reference) < frechet_distance_infinity(collapsed, reference) / 1.5
    )


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Return the scores of each generator of line drawings, which was adapted from coloured faces."""
    pytest.importorskip("dicebear")
    folder = tmp_path_factory.mktemp("faces")

    def faces(style, number):
        path = folder / f"{style}.yaml"
        path.write_text(DOMAIN.format(style=style, number=number), encoding="utf-8")
        return prepare(str(path), PrepareSettings(resolution=64), LISTERS).images

    network, generator = load_network("efficientnet-lite0"), np.random.default_rng(0)
    drawings, coloured = faces("lorelei", SHOTS + NUMBER + REST), faces("avataaars", 2 * NUMBER)
    noise = generator.integers(0, 256, (40, *drawings.shape[1:]), dtype=np.uint8)
    trembling = generator.integers(-1, 2, (40, *drawings.shape[1:]))
    copied = (drawings[np.arange(40) % SHOTS] + trembling).clip(0, 255).astype(np.uint8)
    sets = (drawings, coloured, noise, copied, garbage(drawings[:SHOTS], 1))
    target, source, of_noise, of_copies, nothing = (extract(images, network) for images in sets)
    perfect, repeated = target.take(range(SHOTS, SHOTS + NUMBER)), generator.integers(0, 40, NUMBER)
    leftovers, half = source.take(range(NUMBER)), range(NUMBER // 2)
    generators = {
        "perfect": perfect,
        "collapsed": perfect.take(repeated // 2),
        "copies": of_copies.take(repeated),
        "leftovers": leftovers,
        "half leftovers": joined(perfect.take(half), leftovers.take(half)),
        "noise": of_noise.take(repeated),
        "half noise": joined(perfect.take(half), of_noise.take(repeated[: NUMBER // 2])),
    }
    domain, other = target.take(range(SHOTS + NUMBER, len(target))), source.take(range(NUMBER, 2 * NUMBER))
    settings = EvaluateSettings(memorized_below=0.15, resamples=20)
    shots = target.take(range(SHOTS))
    return {
        name: evaluate(images, shots, domain, leftovers, settings, None, other, nothing).samples
        for name, images in generators.items()
    }


def joined(a, b):
    rows = (np.concatenate(pair) for pair in ((a.pooled, b.pooled), (a.perceptual, b.perceptual)))
    return Features(a.network, a.digest, *rows)


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["frechet_distance_infinity", "kid"])
def test_a_perfect_generator_is_nearest_beyond_doubt(scores, figure):
    ends = {name: each["intervals"][figure] for name, each in scores.items()}
    assert all(ends["perfect"][1] < low for name, (low, _) in ends.items() if name != "perfect")
    values = {name: each[figure] for name, each in scores.items()}
    assert values["leftovers"] > values["half leftovers"] > values["collapsed"]
    assert values["noise"] > values["half noise"] > values["collapsed"]


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["intra_distance_in_domain", "coverage", "recall"])
def test_a_collapsed_generator_and_copies_are_less_varied(scores, figure):
    values = {name: each.get(figure, 0.0) for name, each in scores.items()}
    assert values["perfect"] > 1.5 * values["collapsed"]
    assert values["perfect"] > 10 * values["copies"]


@pytest.mark.slow
def test_leftovers_and_noise_are_not_in_the_domain_and_no_variety(scores):
    share = {name: each["in_domain_share"] for name, each in scores.items()}
    assert min(share["perfect"], share["collapsed"], share["copies"]) > 0.97
    assert max(share["leftovers"], share["noise"]) < 0.03
    assert share["half leftovers"] == pytest.approx(0.5, abs=0.02)
    assert share["half noise"] == pytest.approx(0.5, abs=0.02)
    for name in ("half leftovers", "half noise"):
        assert scores[name]["intra_distance"] > 1.3 * scores["perfect"]["intra_distance"]
        low, high = scores["perfect"]["intervals"]["intra_distance_in_domain"]
        assert low - 0.1 < scores[name]["intra_distance_in_domain"] < high + 0.1


@pytest.mark.slow
def test_copies_are_found_and_real_images_are_not_taken_for_copies(scores):
    share = {name: each["memorized_share"] for name, each in scores.items()}
    assert share["copies"] > 0.9
    assert scores["perfect"]["memorized_false_alarms"] <= 0.01
    assert max(share["perfect"], share["leftovers"], share["noise"]) < 0.03
