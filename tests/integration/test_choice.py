"""The choice among the candidates of a real training: kept, resumed, chosen again without training."""

import shutil

import pytest
import torch

from domainstudio import config, models
from domainstudio.config import (
    Adaptation,
    ChooseSettings,
    LoraSettings,
    Method,
    PriorSettings,
    PromptSettings,
)
from domainstudio.errors import CheckpointError
from domainstudio.metrics.networks import register_network
from domainstudio.selection.record import Selection
from domainstudio.selection.training import TrainingChoice
from domainstudio.storage import candidates, checkpoint
from domainstudio.training.recipe import Recipe
from tests.models import Averages, image_set, tiny_denoiser, tiny_images, training_settings
from tests.project import changed_params

STEPS = 6
RULE = ChooseSettings(number=12, steps=2, max_copies=1.0)


@pytest.fixture(autouse=True)
def network(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    averages = Averages()
    register_network("averages", lambda: averages)
    return averages


@pytest.fixture
def source(tmp_path):
    tiny_denoiser().save(tmp_path / "models/sources/noto")
    return tmp_path / "models/sources/noto"


def settings(tmp_path, rule=RULE):
    values = config.load(changed_params(tmp_path, lambda values: None))
    sampling = values.sample.model_copy(update={"batch_size": 5, "mixed_precision": "no"})
    evaluate = values.evaluate.model_copy(update={"features": "averages"})
    return values.model_copy(update={"choose": rule, "sample": sampling, "evaluate": evaluate})


def recipe(source, every=2, lora=None):
    adaptation = Adaptation(
        name="ink",
        source="noto",
        target="ink",
        method="finetune",
        training=training_settings(steps=STEPS, candidate_every=every, learning_rate=3e-3),
        weights=Method(lora=lora),
        prompts=PromptSettings(),
        prior=PriorSettings(),
    )
    shots = image_set(tiny_images() // 4)
    return Recipe(adaptation, models.load(source), shots, digests={"source": models.digest(source)})


def adapt(recipe, settings, states, stop=None):
    """Train and choose as the stage does; `stop` interrupts it. Return record and trainer."""
    choice = TrainingChoice.of(recipe, settings, states)
    assert choice is not None
    trainer = recipe.trainer(states)
    take = trainer.take_step
    trainer.steps_taken = 0

    def step():
        if trainer.step == stop:
            raise KeyboardInterrupt
        trainer.steps_taken += 1
        return take()

    trainer.take_step = step
    trainer.train()
    return choice.choose(trainer.denoiser, states.parent / "selection"), trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.denoiser.network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_the_model_is_the_chosen_candidate(source, tmp_path, lora):
    found, trainer = adapt(recipe(source, lora=lora), settings(tmp_path), tmp_path / "run/states")
    files = candidates.listed(tmp_path / "run/states")
    assert list(files) == [2, 4, 6] == [each.step for each in found.candidates]
    kept = candidates.read(files[found.chosen])
    assert all(("lora" in name) == (lora is not None) for name in kept)
    assert same(kept, {name: value for name, value in weights(trainer).items() if name in kept})
    written = tmp_path / "run/selection"
    assert Selection.read(written) == found
    assert {path.stem for path in written.glob("*.png")} == {
        "source",
        *(each.name for each in found.candidates),
    }


def test_the_last_candidate_is_what_the_training_would_have_been(source, tmp_path):
    plain = recipe(source, every=0)
    trainer = plain.trainer(tmp_path / "plain")
    trainer.train()
    assert TrainingChoice.of(plain, settings(tmp_path), tmp_path / "plain") is None
    assert not candidates.listed(tmp_path / "plain")
    adapt(recipe(source), settings(tmp_path), tmp_path / "run/states")
    last = candidates.read(candidates.listed(tmp_path / "run/states")[STEPS])
    assert same(last, weights(trainer))


def test_interrupted_it_goes_on_and_chooses_the_same(source, tmp_path, network):
    whole, first = adapt(recipe(source), settings(tmp_path), tmp_path / "whole/states")
    with pytest.raises(KeyboardInterrupt):
        adapt(recipe(source), settings(tmp_path), tmp_path / "cut/states", stop=3)
    again, second = adapt(recipe(source), settings(tmp_path), tmp_path / "cut/states")
    assert second.steps_taken == STEPS - 2
    assert again == whole
    assert same(weights(first), weights(second))
    for step, path in candidates.listed(tmp_path / "whole/states").items():
        assert path.read_bytes() == candidates.listed(tmp_path / "cut/states")[step].read_bytes()


def test_another_rule_trains_draws_and_encodes_nothing(source, tmp_path, network):
    states = tmp_path / "run/states"
    adapt(recipe(source), settings(tmp_path), states)
    drawn, seen = {path: path.stat().st_mtime_ns for path in states.glob("choice/**/*.png")}, network.seen
    other = RULE.model_copy(update={"gain_per_loss": 3.0, "max_copies": 0.0})
    found, trainer = adapt(recipe(source), settings(tmp_path, other), states)
    assert found.rule == other
    assert (trainer.steps_taken, network.seen) == (0, seen)
    assert {path: path.stat().st_mtime_ns for path in states.glob("choice/**/*.png")} == drawn


def test_candidates_are_deleted_on_request_and_the_choice_still_stands(source, tmp_path):
    states, rule = tmp_path / "run/states", RULE.model_copy(update={"keep": False})
    first, trained = adapt(recipe(source), settings(tmp_path, rule), states)
    assert [path.name for path in states.glob("candidates/*.safetensors")] == [
        f"step-{first.chosen:07d}.safetensors"
    ]
    again, second = adapt(recipe(source), settings(tmp_path, rule), states)
    assert again == first
    assert same(weights(trained), weights(second))
    candidates.delete(candidates.listed(states)[first.chosen])
    with pytest.raises(CheckpointError, match=r"was deleted \(choose.keep: false\)"):
        adapt(recipe(source), settings(tmp_path, rule), states)


def test_lost_candidates_are_named(source, tmp_path):
    states = tmp_path / "run/states"
    adapt(recipe(source), settings(tmp_path), states)
    candidates.listed(states)[4].unlink()
    with pytest.raises(CheckpointError, match=r"lacks the candidates of the steps \[4\]"):
        adapt(recipe(source), settings(tmp_path), states)
    shutil.rmtree(states / "candidates")
    assert checkpoint.latest(states) is not None
