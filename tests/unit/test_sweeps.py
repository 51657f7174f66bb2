"""Sweeps: which trials there are, which setting is the best, what is written back."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from domainstudio import config
from domainstudio.config import ObjectiveSettings, SweepSettings
from domainstudio.errors import ConfigError
from flows.sweep import leaderboard, ranking, search
from flows.sweep.params_file import write_overrides
from flows.sweep.ranking import Outcome
from flows.sweep.search import Trial

PARAMS = Path(__file__).parents[2] / "params.yaml"
NAME = "sunglasses-domainstudio"


def sweep(**values):
    return SweepSettings.model_validate({"adaptation": NAME, **values})


def trials(**values):
    return search.trials(sweep(**values))


def test_a_grid_has_every_combination_with_every_seed():
    found = trials(grid={"weights.image": [0.1, 0.2], "method": ["a", "b"]}, seeds=[0, 7])
    assert [trial.number for trial in found] == list(range(1, 9))
    assert [trial.overrides for trial in found[:3]] == [
        {"weights.image": 0.1, "method": "a", "finetune.seed": 0},
        {"weights.image": 0.1, "method": "a", "finetune.seed": 7},
        {"weights.image": 0.1, "method": "b", "finetune.seed": 0},
    ]
    assert found[0].title == "weights.image 0.1, method a, finetune.seed 0"
    assert len(trials(grid={"finetune.steps": [100, 200, 100]})) == 2, "what is there twice is tried once"


def test_draws_keep_to_their_range_and_repeat():
    ranges = {
        "finetune.learning_rate": {"low": 1e-5, "high": 1e-2, "scale": "log"},
        "finetune.steps": {"low": 100, "high": 800},
        "weights.image": {"low": 0.0, "high": 1.0},
        "method": ["finetune", "domainstudio"],
    }
    found = [trial.values for trial in trials(random=ranges, draws=200)]
    rates, steps, weights, methods = ([values[key] for values in found] for key in ranges)
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert 40 < sum(rate < 1e-4 for rate in rates) < 95  # a third of the orders of magnitude
    assert all(isinstance(step, int) and 100 <= step <= 800 for step in steps)
    assert 60 < sum(weight < 0.5 for weight in weights) < 140
    assert set(methods) == {"finetune", "domainstudio"}
    assert all(float(f"{rate:.4g}") == rate for rate in rates)
    assert [trial.values for trial in trials(random=ranges, draws=210)][:200] == found
    assert [trial.values for trial in trials(random=ranges, draws=200, draw_seed=1)] != found


def test_the_draws_of_a_key_do_not_depend_on_other_keys():
    image = {"weights.image": {"low": 0.0, "high": 1.0}}
    alone = trials(random=image, draws=5)
    both = trials(random={"method": ["a", "b"], **image}, draws=5)
    assert [t.values["weights.image"] for t in alone] == [t.values["weights.image"] for t in both]


def test_a_grid_with_draws_tries_each_draw_at_each_point():
    drawn = {"weights.image": {"low": 0.1, "high": 1.0}}
    found = trials(grid={"method": ["a", "b"]}, random=drawn, draws=3)
    pairs = [(trial.values["method"], trial.values["weights.image"]) for trial in found]
    assert len(pairs) == 6
    assert [image for method, image in pairs if method == "a"] == [i for m, i in pairs if m == "b"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to try"),
        ({"grid": {"method": []}}, "method: no values"),
        ({"grid": {"method": ["a"]}, "random": {"method": ["b"]}, "draws": 1}, "in grid and in random"),
        ({"random": {"method": ["a"]}}, "needs draws"),
        ({"grid": {"method": ["a"]}, "draws": 3}, "needs random"),
        ({"grid": {"finetune.seed": [1]}, "seeds": [0]}, "given by seeds"),
        ({"random": {"finetune.steps": {"low": 5, "high": 5}}, "draws": 1}, "low must be below high"),
        ({"random": {"weights.image": {"low": 0, "high": 1, "scale": "log"}}, "draws": 1}, "low above 0"),
        ({"grid": {"method": ["a"]}, "gpus": 2}, "less than or equal to 1"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        sweep(**values)


def test_overrides_reach_every_part_of_an_adaptation():
    settings = config.load(PARAMS)
    values = {"method": "finetune", "weights.image": 0.3, "finetune.steps": 7, "weights.lora.rank": 2}
    changed = settings.overridden(NAME, values)
    assert (changed.method, changed.weights.image, changed.training.steps) == ("finetune", 0.3, 7)
    assert changed.weights.lora is not None
    assert changed.weights.lora.rank == 2
    assert changed.training.batch_size == settings.adaptation(NAME).training.batch_size
    assert settings.adaptation(NAME).training.steps != 7


def test_an_override_inside_a_section_keeps_the_rest_of_it():
    values = yaml.safe_load(PARAMS.read_text())
    values["methods"]["domainstudio"]["lora"] = {"rank": 16, "dropout": 0.25}
    settings = config.Settings.model_validate(values)
    lora = settings.overridden(NAME, {"weights.lora.rank": 2}).weights.lora
    assert lora is not None
    assert (lora.rank, lora.dropout) == (2, 0.25)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights.imge": 1}, "weights.imge"),
        ({"method": "none"}, "method: is 'none'"),
        ({"finetune.steps": 0}, "finetune.steps"),
        ({"sample.steps": 3}, "sample"),
    ],
)
def test_overrides_that_are_not_possible_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        config.load(PARAMS).overridden(NAME, values)


def test_a_sweep_of_an_unknown_adaptation_is_refused(tmp_path):
    overlay = tmp_path / "more.yaml"
    overlay.write_text("sweeps: {mine: {adaptation: none, grid: {method: [finetune]}}}")
    with pytest.raises(ConfigError, match=r"sweeps.mine.adaptation: is 'none', but"):
        config.load(PARAMS, overlay)


OBJECTIVE = ObjectiveSettings(metric="frechet_distance", at_most={"memorized_share": 0.05})


def outcome(image, seed=None, *figures, status="trained", error="", names=OBJECTIVE.metrics):
    """Return the outcome of a trial, with the figures of these metrics."""
    scores = dict(zip(names, figures, strict=False))
    return Outcome(Trial(1, {"weights.image": image}, seed), status, "key", scores, error=error)


def objections(ranked):
    """Return the objections to each setting, the best setting first."""
    return [(candidate.values["weights.image"], candidate.objections) for candidate in ranked]


def test_the_best_has_the_lowest_mean_and_keeps_the_bounds():
    measured = [
        *(outcome(0.1, 0, 10.0, 0.2), outcome(0.1, 1, 10.0, 0.0)),
        *(outcome(0.2, 0, 20.0, 0.0), outcome(0.2, 1, 40.0, 0.1)),
        *(outcome(0.4, 0, 29.0, 0.0), outcome(0.4, 1, 29.0, 0.0)),
    ]
    ranked = ranking.rank(measured, OBJECTIVE)
    assert objections(ranked) == [(0.4, ()), (0.2, ()), (0.1, ("memorized_share 0.1 > 0.05",))]
    chosen = ranking.best(ranked)
    assert chosen is not None
    assert chosen.mean("frechet_distance") == 29.0
    assert ranked[1].spread("frechet_distance") == pytest.approx(200**0.5)


def test_the_largest_is_the_best_where_it_is_maximised_and_lower_bounds_hold():
    objective = ObjectiveSettings(metric="coverage", direction="maximize", at_least={"recall": 0.5})
    figures = ((0.1, 0.9, 0.4), (0.2, 0.5, 0.5), (0.4, 0.7, 0.6))
    measured = [outcome(image, None, *two, names=("coverage", "recall")) for image, *two in figures]
    ranked = ranking.rank(measured, objective)
    assert objections(ranked) == [(0.4, ()), (0.2, ()), (0.1, ("recall 0.4 < 0.5",))]


def test_a_setting_with_a_failed_seed_is_never_the_best():
    failed = outcome(0.1, 1, status="failed", error="the loss is inf")
    others = [outcome(0.2, 0, status="not run"), outcome(0.4, 0, 3.0)]
    ranked = ranking.rank([outcome(0.1, 0, 1.0, 0.0), failed, *others], OBJECTIVE)
    assert ranking.best(ranked) is None
    assert dict(objections(ranked)) == {
        0.1: ("failed: the loss is inf",),
        0.2: ("not run",),
        0.4: ("memorized_share is not defined",),
    }


def test_scores_are_those_of_the_samples_by_their_short_names():
    metrics = {
        "number": 8,
        "samples": {"kid": 0.5, "intra_sizes": [1, 2], "recall": float("nan")},
        "references": {"shots": {"kid": 9.0}},
        "paired": {"samples": {"top_1": 1}},
        "clip": {"model": "x", "samples": {"clip_score": 20.5}},
    }
    assert ranking.scores(metrics) == {"kid": 0.5, "top_1": 1.0, "clip_score": 20.5}


def test_an_objective_without_such_a_metric_is_refused_before_anything_is_trained():
    ranking.check(ObjectiveSettings(metric="clip_score", at_least={"top_1": 0.1, "coverage": 0.1}), "sweep")
    with pytest.raises(ConfigError, match="sweep: no metric is called memorised_share"):
        ranking.check(ObjectiveSettings(at_most={"memorised_share": 0.1}), "sweep")


def test_the_tables_show_settings_and_trials():
    failed = outcome(0.2, 0, status="failed", error="a | b\nc")
    outcomes = [outcome(0.1, 0, 10.0, 0.0), outcome(0.1, 1, 20.0, 0.0), failed]
    table = leaderboard.rows(ranking.rank(outcomes, OBJECTIVE), OBJECTIVE)
    assert leaderboard.markdown(table).splitlines() == [
        "| weights.image | frechet_distance | memorized_share | verdict |",
        "| --- | --- | --- | --- |",
        "| 0.1 | 15 ± 7.1 | 0 ± 0 | best |",
        r"| 0.2 | – | – | failed: a \| b c |",
    ]
    records = list(csv.DictReader(io.StringIO(leaderboard.to_csv(outcomes))))
    assert [record["finetune.seed"] for record in records] == ["0", "1", "0"]
    assert [record["frechet_distance"] for record in records] == ["10.0", "20.0", ""]
    assert records[2]["error"] == "a | b\nc"


TEXT = """\
# What I tried.
methods: {a: 1}  # one

adaptations:
  one:  # the first
    source: noto   # where it begins
    method: domainstudio
    weights:
      image: 0.5   # keep me
      # inside
    finetune: {steps: 5, seed: 0}  # short

# A section of its own.
sample:
  number: 3
"""


def test_writing_back_keeps_comments_order_and_layout(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    values = {
        "weights.image": 0.25,
        "weights.lora.rank": 4,
        "finetune.steps": 9,
        "finetune.learning_rate": 1e-05,
        "prior.number": 3,
        "method": "domainstudio",
    }
    changes = write_overrides([path], "one", values)
    expected = (
        TEXT.replace("image: 0.5 ", "image: 0.25 ")
        .replace("image: 0.25   # keep me\n", "image: 0.25   # keep me\n      lora:\n        rank: 4\n")
        .replace("{steps: 5, seed: 0}", "{steps: 9, seed: 0, learning_rate: 1.0e-05}")
        .replace("# short\n", "# short\n    prior:\n      number: 3\n")
    )
    assert path.read_text() == expected
    assert changes[0] == f"{path}: adaptations.one.weights.image: 0.5 → 0.25"
    assert len(changes) == 5
    assert write_overrides([path], "one", values) == []


def test_the_projects_own_params_take_overrides(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.read_text())
    write_overrides([path], NAME, {"weights.image": 0.125, "finetune.steps": 5})
    before, after = PARAMS.read_text().splitlines(), path.read_text().splitlines()
    assert [line for line in after if line in before] == before
    adaptation = config.load(path).adaptation(NAME)
    assert (adaptation.weights.image, adaptation.training.steps) == (0.125, 5)


def test_the_file_that_has_the_adaptation_is_written_to(tmp_path):
    first, second = tmp_path / "params.yaml", tmp_path / "more.yaml"
    first.write_text(TEXT)
    second.write_text("adaptations: {two: {method: a}}\n")
    write_overrides([first, second], "two", {"method": "b", "weights.image": 1.5})
    assert first.read_text() == TEXT
    assert second.read_text() == "adaptations: {two: {method: b, weights: {image: 1.5}}}\n"
    with pytest.raises(ConfigError, match=r"no adaptations\.three"):
        write_overrides([first, second], "three", {"method": "b"})


def test_what_would_change_in_another_place_too_is_not_written(tmp_path):
    path = tmp_path / "params.yaml"
    text = "adaptations:\n  one: &one {method: a}\n  two: *one\n"
    path.write_text(text)
    with pytest.raises(ConfigError, match="by hand"):
        write_overrides([path], "two", {"method": "b"})
    assert path.read_text() == text
