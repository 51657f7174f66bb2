"""The gate: each rule on both sides of its threshold, and what is never promoted."""

import json
import math
import re

import pytest

from domainstudio import config
from domainstudio.config import GateSettings
from domainstudio.registry.gate import TITLES, Measurement, decide, span
from tests.modules import ROOT
from tests.project import changed_params

FIGURES = dict(zip(TITLES, (None, 200.0, 0.2, None, 0.5, None, None, 0.02), strict=True))
CONDITIONS = {"number of samples": "200", "scheduler": "ddim"}
GATE = GateSettings(max_memorized_share=0.05, margin=0.05)
ALL = GateSettings.model_validate({"tolerance": dict.fromkeys(list(TITLES)[:-1], 0.05)})
"""Every rule on."""


def measured(conditions=CONDITIONS, **figures):
    return Measurement({**FIGURES, **figures}, conditions)


def judged(candidate, champion=None, gate=GATE):
    """Return outcome, first words and reason against a champion of `FIGURES` and these changes."""
    verdict = decide(measured(**candidate), measured(**champion or {}), gate)
    assert verdict.promoted == (verdict.outcome == "promoted")
    return verdict.outcome, verdict.reason.partition(":")[0], verdict.reason


LIMITS = [
    ("frechet_distance", 210.0, 210.1, 190.0, 190.1),
    ("kid", 0.21, 0.2101, 0.19, 0.1901),
    ("intra_distance", 0.475, 0.4749, 0.525, 0.5249),
    ("top_1", 0.38, 0.3799, 0.42, 0.4199),
]
"""A figure that is just allowed, too bad, just better by the margin, and not."""


@pytest.mark.parametrize(("name", "allowed", "too_bad", "better", "too_near"), LIMITS)
def test_each_figure_has_a_tolerance_and_a_margin(name, allowed, too_bad, better, too_near):
    champion = {"top_1": 0.4}
    other = {"intra_distance": 0.6} if name == "frechet_distance" else {"frechet_distance": 150}
    assert judged({**champion, **other, name: allowed}, champion, ALL)[0] == "promoted"
    worse = judged({**champion, **other, name: too_bad}, champion, ALL)[:2]
    assert worse == ("refused", f"worse {TITLES[name]}")
    assert judged({**champion, name: better}, champion, ALL)[:2] == ("promoted", f"better {TITLES[name]}")
    titles = "Fréchet distance or kernel distance or intra distance or subject kept"
    near = judged({**champion, name: too_near}, champion, ALL)[:2]
    assert near == ("refused", f"not better by 5% in {titles}")


SOUND = {"frechet_distance_infinity": 150.0, "intra_distance_in_domain": 0.4}


def test_extrapolated_distance_and_diversity_in_the_domain_replace_the_plain_ones_where_both_have_them():
    better = {**SOUND, "frechet_distance_infinity": 140.0}
    worse_otherwise = {"frechet_distance": 400.0, "intra_distance": 0.1}
    assert judged({**better, **worse_otherwise}, SOUND)[:2] == ("promoted", "better Fréchet distance ∞")
    worse = {**SOUND, "intra_distance_in_domain": 0.3, "frechet_distance": 100.0}
    assert judged(worse, SOUND)[:2] == ("refused", "worse intra distance in the domain")
    assert judged({**better, **worse_otherwise})[:2] == (
        "refused",
        "worse Fréchet distance, worse intra distance",
    ), "a champion of an older version is compared by what it has"


NO_MARGIN = GateSettings(margin=0.0)
BELOW_ZERO = {"kid": -0.02, "top_1": 0.0}


@pytest.mark.parametrize(
    ("candidate", "champion", "gate", "outcome"),
    [
        ({"kid": 0.01, "top_1": 0.9}, {"top_1": 0.1}, GATE, "refused"),  # they have no tolerance
        ({"kid": 9.0, "top_1": 0.0, "frechet_distance": 150.0}, {"top_1": 0.1}, GATE, "promoted"),
        ({"top_1": 0.01}, {"top_1": 0.0}, ALL, "promoted"),  # a champion at or below zero is compared too
        ({"kid": -0.01, "top_1": 0.0}, BELOW_ZERO, ALL, "refused"),
        ({"kid": -0.03, "top_1": 0.0}, BELOW_ZERO, ALL, "promoted"),
        ({"kid": -0.0195, "top_1": 0.0, "frechet_distance": 100.0}, BELOW_ZERO, ALL, "promoted"),
        ({}, {}, NO_MARGIN, "refused"),  # the same again is not better
        ({"frechet_distance": 199.999}, {}, NO_MARGIN, "promoted"),
        ({"frechet_distance": 100.0}, {}, ALL, "promoted"),  # there are no subjects to keep
    ],
)
def test_figures_at_the_edges(candidate, champion, gate, outcome):
    assert judged(candidate, champion, gate)[0] == outcome


def test_the_share_of_copies_has_a_ceiling_whatever_the_champion_is():
    better = {"frechet_distance": 100.0}
    assert judged({**better, "memorized_share": 0.05})[0] == "promoted"
    outcome, _, reason = judged({**better, "memorized_share": 0.055}, {"memorized_share": 0.5})
    assert outcome == "refused"
    assert reason.startswith("memorises too much: ")
    assert reason.endswith("memorised 5.5% against 50% (allowed 5%)")
    assert judged({"memorized_share": 0.0})[0] == "refused", "fewer copies alone are no better model"


@pytest.mark.parametrize(
    ("name", "enough", "too_few", "words"),
    [
        ("in_domain_share", 0.5, 0.499, "too few samples in the domain: .*; in the domain 49.9%"),
        ("precision", 0.02, 0.0, "too little precision: .*; precision 0% .at least 1%."),
        ("number", 100, 99, "too few samples: .*; samples 99 .at least 100."),
    ],
)
def test_a_model_needs_enough_samples_and_enough_of_them_in_the_domain(name, enough, too_few, words):
    """The first champion does too: coloured dots are nearer to nothing than a champion that is not there."""
    gate = GATE.model_copy(update={"min_precision": 0.01})
    for champion in (None, measured(**{name: too_few})):
        better = {"frechet_distance": 100.0}
        assert decide(measured(**better, **{name: enough}), champion, gate).promoted
        refused = decide(measured(**better, **{name: too_few}), champion, gate)
        assert refused.outcome == "refused"
        assert re.match(words, refused.reason)
        assert not decide(measured(**{name: enough}), measured(), gate).promoted, "a floor is no merit"


def test_the_first_needs_no_more_than_the_ceiling_and_the_floors():
    verdict = decide(measured(), None, GATE)
    assert verdict.outcome == "promoted"
    assert verdict.reason == (
        "there is no champion to compare with: Fréchet distance 200; intra distance 0.5; memorised 2% "
        "(allowed 5%)"
    )
    copying = decide(measured(memorized_share=0.12), None, GATE)
    assert copying.outcome == "refused"
    assert copying.reason.startswith("memorises too much: ")


@pytest.mark.parametrize("name", ["frechet_distance", "kid", "intra_distance", "memorized_share"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_missing_or_not_finite_never_wins(name, value):
    candidate = measured(**{"frechet_distance": 100.0, "intra_distance": 0.9, name: value})
    for champion in (None, measured(), measured(frechet_distance=None), measured({"scheduler": "ddpm"})):
        verdict = decide(candidate, champion, ALL)
        assert verdict.outcome == "refused"
        assert verdict.reason.startswith(f"{TITLES[name]} is missing or not finite: ")
        assert f"{TITLES[name]} not measured" in verdict.reason


@pytest.mark.parametrize(
    ("champion", "why"),
    [
        (measured(frechet_distance=None), "the champion has no Fréchet distance"),
        (measured(frechet_distance=math.nan), "the champion has no Fréchet distance"),
        (measured(CONDITIONS | {"number of samples": "100"}), "number of samples 200, the champion's 100"),
        (measured({"scheduler": "ddim"}), "number of samples 200, the champion's none"),
        (Measurement({}, {}), "the champion's figures are not known"),
    ],
)
def test_other_conditions_and_figures_cannot_be_compared(champion, why):
    verdict = decide(measured(frechet_distance=1.0), champion, GATE)
    assert verdict.outcome == "not comparable"
    assert verdict.reason == (
        f"not comparable with the champion ({why}): Fréchet distance 1; intra distance 0.5; memorised 2% "
        "(allowed 5%). Promote by hand, or register again where the champion can be drawn and measured in "
        "the same way"
    )


def test_the_paired_measure_counts_for_models_with_subjects():
    missing = judged({"frechet_distance": 100.0}, {"top_1": 0.1}, ALL)[:2]
    assert missing == ("refused", "subject kept is missing or not finite")
    reason = judged({"top_1": 0.3}, {"top_1": 0.1}, ALL)[-1]
    assert "subject kept 30% against 10% (+200.0%, allowed -5%)" in reason
    outcome, _, reason = judged({"top_1": 0.0}, {"top_1": 0.0}, ALL)
    assert outcome == "refused"
    assert "subject kept 0% against 0% (allowed -5%)" in reason


def test_without_a_gate_the_newest_wins():
    verdict = decide(measured(frechet_distance=math.nan), measured(), None)
    assert verdict.promoted
    assert "registry.gate is null" in verdict.reason


def test_the_reason_is_one_line_that_people_understand():
    candidate = {"frechet_distance": 253.0, "intra_distance": 0.73, "memorized_share": 0.0}
    champion = {"frechet_distance": 248.1, "intra_distance": 0.52, "memorized_share": 0.12}
    assert judged(candidate, champion)[::2] == (
        "promoted",
        "better intra distance: Fréchet distance 253 against 248.1 (+2.0%, allowed +5%); intra distance 0.73 "
        "against 0.52 (+40.4%, allowed -5%); memorised 0% against 12% (allowed 5%)",
    )


METRICS = {
    "features": "net",
    "features_digest": "f" * 64,
    "number": 3,
    "samples": {"frechet_distance": 9.0, "intra_distance": math.nan, "memorized_share": 0.0},
    "paired": {"samples": {"number": 2, "top_1": 0.5}},
}


def images(*seeds, subjects="abc"):
    return [{"seed": seed, "subject": subject} for seed, subject in zip(seeds, subjects, strict=True)]


SAMPLES = {"scheduler": "ddim", "steps": 30, "images": images(4, 5, 6)}


def measurement(shots="a" * 64, domain="b" * 64, threshold=0.15, samples=SAMPLES, **metrics):
    return Measurement.of(METRICS | metrics, {**SAMPLES, **samples}, shots, domain, threshold)


def test_a_measurement_reads_what_the_stages_write():
    found = measurement()
    compared = dict(zip(TITLES, (None, 9.0, None, None, None, None, 0.5, 0.0), strict=True))
    assert found.figures == {**compared, "in_domain_share": None, "precision": None, "number": 3.0}
    assert found.conditions["seeds"] == "4-6"
    assert Measurement.from_json(found.to_json()) == found
    json.dumps(decide(found, found, GATE).to_json(), allow_nan=False)
    with pytest.raises(KeyError, match="features_digest"):
        Measurement.of(
            {name: METRICS[name] for name in METRICS if name != "features_digest"}, SAMPLES, "a", "b", 0.15
        )


@pytest.mark.parametrize(
    ("change", "condition"),
    [
        ({"features_digest": "0" * 64}, "feature network"),
        ({"number": 4}, "number of samples"),
        ({"samples": {"images": images(5, 6, 7)}}, "seeds"),
        ({"samples": {"images": images(4, 5, 6, subjects="aaa")}}, "subjects"),
        ({"samples": {"scheduler": "ddpm"}}, "scheduler"),
        ({"samples": {"steps": 10}}, "denoising steps"),
        ({"samples": {"guidance_scale": 2.0}}, "guidance"),
        ({"samples": {"negative": "red"}}, "negative"),
        ({"shots": "0" * 64}, "training images"),
        ({"domain": "0" * 64}, "target domain"),
        ({"threshold": 0.2}, "memorised below"),
    ],
)
def test_each_condition_of_an_evaluation_counts(change, condition):
    one, other = measurement(), measurement(**change)
    assert {name for name in one.conditions if one.conditions[name] != other.conditions[name]} == {condition}
    assert one.digest != other.digest


def test_seeds_in_short():
    assert span([7]) == "7-7"
    assert len({span([1, 2, 3]), span([1, 3, 2]), span([3, 2, 1]), span([1, 3])}) == 4


def test_params_may_switch_the_gate_off(tmp_path):
    assert config.load(ROOT / "params.yaml").registry.gate == GateSettings(), "the file shows the defaults"
    path = changed_params(tmp_path, lambda values: values["registry"].update(gate=None))
    assert config.load(path).registry.gate is None
