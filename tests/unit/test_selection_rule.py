"""The rule that chooses a checkpoint, on curves whose right choice is known."""

import numpy as np
import pytest

from domainstudio.config import ChooseSettings
from domainstudio.selection.figures import Curve
from domainstudio.selection.rule import before_copies, choose

RULE = ChooseSettings(max_copies=0.05, gain_per_loss=1.0)
ERROR = 0.02


def curves(fidelity, diversity, copies=None, error=ERROR, shared=0.0):
    """Return curves at the steps 100, 200, …; resamples deviate by `error` each, and by `shared` together."""
    rng = np.random.default_rng(0)
    together = shared * rng.standard_normal(200)

    def drawn(value):
        return np.concatenate([[value], value + together + error * rng.standard_normal(200)])

    copies = copies or [0.0] * len(fidelity)
    return {
        100 * (index + 1): Curve(
            fidelity=drawn(fidelity[index]),
            diversity=drawn(diversity[index]) if diversity[index] is not None else np.full(201, np.nan),
            copies=np.full(201, copies[index]),
            in_domain=np.full(201, 1.0),
        )
        for index in range(len(fidelity))
    }


KNEE = ([0.3, 0.6, 0.7, 0.75], [0.95, 0.85, 0.6, 0.3])


@pytest.mark.parametrize(
    ("name", "fidelity", "diversity", "copies", "step", "reason"),
    [
        ("fidelity turns dear", *KNEE, None, 200, "knee"),
        ("copies before the knee", *KNEE, [0.0, 0.2, 0.1, 0.0], 100, "copies"),
        ("copies after the knee", *KNEE, [0.0, 0.0, 0.0, 0.9], 200, "knee"),
        ("all copy", *KNEE, [0.5, 0.6, 0.7, 0.8], 100, "copying"),
        ("still rising", [0.2, 0.4, 0.6, 0.8], [0.99, 0.97, 0.95, 0.93], None, 400, "last"),
        ("a plateau", [0.6, 0.605, 0.61, 0.6], [0.8, 0.8, 0.8, 0.8], None, 100, "knee"),
        ("never learns", [0.01, -0.02, 0.0, 0.02], [1.0, 1.0, 1.0, 1.0], None, 400, "never"),
        ("gets worse than the source", [-0.2, -0.4, -0.6, -0.8], [0.9, 0.8, 0.7, 0.6], None, 400, "never"),
        ("nothing in the domain to compare", [0.3, 0.4], [None, None], None, 200, "never"),
        ("the first has nothing to compare", [0.3, 0.6], [None, 0.9], None, 200, "last"),
        ("one candidate", [0.5], [0.5], None, 100, "only"),
    ],
)
def test_known_curves(name, fidelity, diversity, copies, step, reason):
    found = choose(curves(fidelity, diversity, copies), RULE)
    assert (found.step, found.reason) == (step, reason), name
    assert (found.warning is not None) == (reason in ("last", "never", "copying"))


def test_a_dearer_diversity_stops_earlier():
    chosen = [
        choose(curves(*KNEE, error=0.001), RULE.model_copy(update={"gain_per_loss": ratio})).step
        for ratio in (0.0, 0.3, 1.0, 5.0)
    ]
    assert chosen == [400, 300, 200, 100]


def test_more_than_real_is_no_gain():
    """Copies are nearer to the training images than real images; more variety than the source's is noise."""
    assert choose(curves([0.9, 1.0, 1.6], [0.9, 0.9, 0.85]), RULE).step == 200
    assert choose(curves([0.5, 0.5], [1.0, 1.4]), RULE).step == 100


def test_luck_that_candidates_share_does_not_count_as_doubt():
    """A gain of 0.1 drowns in independent errors of 0.15, not in an error that both share."""
    rising = [0.5, 0.6], [0.9, 0.9]
    assert choose(curves(*rising, error=0.15), RULE).step == 100
    assert (
        choose(curves(*rising, error=0.0, shared=0.15), RULE.model_copy(update={"gain_per_loss": 0})).step
        == 200
    )


def test_an_early_candidate_is_no_equal_where_it_has_gone_less_of_the_way():
    """What the source has left makes it varied, so its value alone is within the error."""
    early = curves([0.5, 0.7], [0.95, 0.8], error=0.05)
    assert choose(early, RULE).step == 200
    assert choose(curves([0.68, 0.7], [0.8, 0.8], error=0.05), RULE).step == 100


def test_candidates_end_before_the_first_that_copies():
    assert before_copies(curves(*KNEE, [0.05, 0.06, 0.0, 0.0]), 0.05) == [100]
