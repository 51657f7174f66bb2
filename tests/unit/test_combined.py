"""Two models that draw together: exact at the ends of every mode, the same from a folder, of every kind."""

import json
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from domainstudio import config, models
from domainstudio.config import (
    GuideSettings,
    InterpolateSettings,
    LoraSettings,
    PromptPair,
    PromptSettings,
    SampleSettings,
    SwitchSettings,
)
from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models import lora
from domainstudio.models.combined import CombinedDenoiser, combine, first_timestep
from domainstudio.models.stored import StoredModel, Together
from domainstudio.models.wording import Wording
from domainstudio.sampling import sample, sample_stored
from domainstudio.training.run import TrainingRun
from stages import export
from tests.models import (
    CLASSES,
    PROMPTS,
    close,
    tiny_class_denoiser,
    tiny_denoiser,
    tiny_latent_denoiser,
    tiny_text_denoiser,
)
from tests.project import changed_params

EPSILON: dict[str, Any] = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
MAKERS: dict[str, Any] = {
    "unconditional": tiny_denoiser,
    "learned variance": lambda seed: tiny_denoiser(seed, learned_variance=True, **EPSILON),
    "latent": tiny_latent_denoiser,
    "class": lambda seed: tiny_class_denoiser(seed=seed),
    "sd1": lambda seed: tiny_text_denoiser("sd1", seed),
    "sdxl": lambda seed: tiny_text_denoiser("sdxl", seed),
    "sd3": lambda seed: tiny_text_denoiser("sd3", seed),
}
KINDS = (*MAKERS, "unconditional lora", "sd1 lora")
TIMESTEPS = torch.tensor([10, 400, 799, 800, 999])
WORDING = Wording.of(PromptSettings(source="{caption}", target="{caption} {caption}"))


def interpolate(weight):
    return InterpolateSettings(mode="interpolate", weight=weight)


def guide(weight):
    return GuideSettings(mode="guide", weight=weight)


def switch(at, source="above"):
    return SwitchSettings(mode="switch", at=at, source=source)


def pair(kind):
    """Return a source model, and one adapted from it."""
    if not kind.endswith("lora"):
        return MAKERS[kind](0), MAKERS[kind](1)
    adapted = MAKERS[kind.removesuffix(" lora")](0)
    lora.attach(adapted, LoraSettings(rank=2, alpha=6), seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapted.frozen_source(), adapted


def combined_pair(kind, combination):
    source, adapted = pair(kind)
    return combine(source, adapted, combination)


def told(denoiser, number):
    texts = PROMPTS if denoiser.text_encoders else CLASSES if denoiser.classes else [""]
    return [texts[i % len(texts)] for i in range(number)]


def predict(denoiser, timesteps=TIMESTEPS):
    xt = torch.randn(len(timesteps), *denoiser.shape, generator=torch.Generator().manual_seed(3))
    denoiser.network.eval()
    with torch.no_grad():
        return denoiser.predict(xt, timesteps, denoiser.condition(told(denoiser, len(timesteps))))


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_is_one_of_the_models_bit_for_bit_at_its_ends(kind):
    source, adapted = pair(kind)
    first, second = predict(source), predict(adapted)
    assert not torch.allclose(first.output, second.output, atol=1e-3)
    ends = [
        (first, [guide(0), switch(0), switch(1, "below"), interpolate(0)]),
        (second, [guide(1), switch(1), switch(0, "below"), interpolate(1)]),
    ]
    for expected, combinations in ends:
        for combination in combinations:
            found = predict(combined_pair(kind, combination))
            assert torch.equal(found.output, expected.output), combination
            if expected.variance is not None and combination.mode != "guide":
                assert torch.equal(found.variance, expected.variance)
    if second.variance is not None:
        assert torch.equal(predict(combine(source, adapted, guide(0.3))).variance, second.variance)


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_mixed_by_their_formulas(kind):
    source, adapted = pair(kind)
    first, second = predict(source).output, predict(adapted).output
    close(predict(combine(source, adapted, guide(1.5))).output, first + 1.5 * (second - first))
    above = (TIMESTEPS >= 800).view(-1, 1, 1, 1)
    close(predict(combine(source, adapted, switch(0.8))).output, torch.where(above, first, second))
    below = predict(combine(source, adapted, switch(0.8, "below"))).output
    close(below, torch.where(above, second, first))


@pytest.mark.parametrize("kind", ["class", "sd1", "unconditional lora", "sd1 lora"])
def test_interpolated_weights_are_the_mean_of_the_weights(kind):
    weights = [dict(lora.merged(each).network.named_parameters()) for each in (pair(kind)[1],)]
    source, adapted = pair(kind)
    plain = lora.without(adapted) if adapted.adapters else source
    weights.append(dict(plain.network.named_parameters()))
    between = lora.merged(combine(source, adapted, interpolate(0.25)))
    assert between.kind == source.kind
    for name, values in between.network.named_parameters():
        close(values.detach(), (0.25 * weights[0][name] + 0.75 * weights[1][name]).detach())


def test_the_source_model_of_adapters_is_no_copy():
    source, adapted = pair("sd1 lora")
    network = combine(source, adapted, switch(0.5)).network
    assert {id(p) for p in network.parameters()} == {id(p) for p in adapted.network.parameters()}


def test_new_tokens_of_the_adapted_model_stay_when_weights_are_interpolated(tmp_path):
    source, adapted = tiny_text_denoiser(), tiny_text_denoiser()
    adapted.train(unet=False, new_tokens={"[V]": "red"})
    adapted.save(tmp_path)
    before: Any = models.load(tmp_path)
    table = before.text_encoders[0].get_input_embeddings().weight.detach().clone()
    combine(source, before, interpolate(0.5))
    found = before.text_encoders[0].get_input_embeddings().weight
    assert torch.equal(found[-1], table[-1])
    close(found.detach(), table)


def test_noise_levels_are_fractions_of_the_timesteps():
    assert [first_timestep(at / 100, 100) for at in range(101)] == list(range(101))
    assert first_timestep(0.8001, 1000) == 801


@pytest.mark.parametrize("kind", ["learned variance", "latent", "class", "sd1 lora"])
@pytest.mark.parametrize("combination", [interpolate(0.4), guide(1.3), switch(0.5)], ids=lambda c: c.mode)
def test_a_stored_combination_draws_what_its_models_draw_together(tmp_path, kind, combination):
    """So it does from a folder of two models, or of one where weights are interpolated."""
    folders = saved(tmp_path, kind)
    together = Together(combination, folders[0], WORDING)
    stored = StoredModel(folders[1], together)
    stored.store(tmp_path / "both")
    direct, again = stored.load(), models.load(tmp_path / "both")
    assert isinstance(again, CombinedDenoiser) == (combination.mode != "interpolate")
    assert models.kind_of(tmp_path / "both") == direct.kind == again.kind
    texts = [f"{text} {text}" for text in told(direct, 2)] if direct.text_encoders else told(direct, 2)
    options: dict[str, Any] = {"guidance_scale": 2.0, "steps": 2}
    drawn = [sample(each, [0, 1], texts, **options).astype(int) for each in (direct, again)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    alone = sample(models.load(folders[1]), [0, 1], texts, **options)
    assert np.abs(alone - drawn[0]).max() > 2
    direct.save(tmp_path / "saved")
    third = sample(models.load(tmp_path / "saved"), [0, 1], texts, **options).astype(int)
    assert np.abs(drawn[0] - third).max() <= 1


def saved(folder, kind):
    """Write a source model and the one adapted from it; return their folders."""
    MAKERS[kind.removesuffix(" lora")](0).save(folder / "base")
    if kind.endswith("lora"):
        adapted = models.load(folder / "base")
        lora.attach(adapted, LoraSettings(rank=2), seed=0)
        with torch.no_grad():
            for parameter in adapted.network.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3)
    else:
        adapted = MAKERS[kind](1)
    adapted.save(folder / "adapted-model")
    return folder / "base", folder / "adapted-model"


def test_each_model_gets_its_own_words():
    asked = []

    class Listening:
        def __init__(self, denoiser):
            self._denoiser = denoiser

        def __getattr__(self, name):
            return getattr(self._denoiser, name)

        def condition(self, values, size=None):
            asked.append(list(values))
            return self._denoiser.condition(values, size)

    source, adapted = (Listening(each) for each in pair("sd1"))
    wording = Wording.of(PromptSettings(source="{caption}", target="{caption} in the snow"))
    combine(source, adapted, guide(1.5), wording).condition(["a dog in the snow", "the moon", ""])
    assert asked == [["a dog in the snow", "the moon", ""], ["a dog", "the moon", ""]]


@pytest.mark.parametrize(
    ("source", "target", "text", "expected"),
    [
        ("a {label}", "a {label} in [V] style", "a cat in [V] style", "a cat"),
        ("a photo", "a photo (of [V])", "a photo (of [V])", "a photo"),
        ("{caption}, {label}", "{label}: {caption} {label}", "cat: one cat", "one, cat"),
        ("{caption} {{x}}", "[V]", "[V]", "{x}"),
        ("{caption}", "{caption} in [V] style", "a dog, [V] style", "a dog, [V] style"),
    ],
)
def test_the_source_models_words_follow_from_the_templates(source, target, text, expected):
    assert Wording.of(PromptSettings(source=source, target=target)).for_source(text) == expected


def test_images_of_a_label_have_words_of_their_own():
    prompts = PromptSettings(by_label={"dog": PromptPair(source="a dog", target="a [S] dog")})
    assert Wording.of(prompts).for_source("a [S] dog") == "a dog"


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (lambda: tiny_class_denoiser(), "kind, class-conditional and unconditional"),
        (lambda: tiny_denoiser(learned_variance=True), "learned variance, True and False"),
        (lambda: tiny_denoiser(**EPSILON), "prediction type, epsilon and v_prediction"),
        (lambda: tiny_denoiser(num_train_timesteps=500), "timesteps, 500 and 1000"),
        (lambda: tiny_denoiser(beta_schedule="linear"), "their noise levels"),
    ],
)
def test_models_that_do_not_fit_are_refused(other, difference):
    with pytest.raises(CheckpointError, match=f"they differ in {difference}.*the source model that was"):
        combine(other(), tiny_denoiser(), switch(0.5))


def test_two_models_are_not_trained_nor_written_as_one(tmp_path):
    combined: Any = combined_pair("unconditional", switch(0.5))
    for use in (lambda: combined.train(), lambda: combined.encode(None), lambda: combined.frozen_source()):
        with pytest.raises(ConfigError, match=r"two models together \(source model above noise level 0.5\)"):
            use()
    folders = saved(tmp_path, "unconditional")
    for combination in (switch(0.5), guide(2)):
        stored = StoredModel(folders[1], Together(combination, folders[0], WORDING))
        with pytest.raises(ConfigError, match=r"takes two models.*--both.*interpolate, weight"):
            stored.export(tmp_path / "plain")
    combined.save(tmp_path / "both")
    (tmp_path / "both/combination.json").write_text(
        '{"format": 1, "combine": {"mode": "mix"}, "wording": []}'
    )
    with pytest.raises(CheckpointError, match=r"combination\.json cannot be read"):
        models.load(tmp_path / "both")


@pytest.mark.parametrize("values", [{"mode": "switch", "at": 0.8}, {"mode": "interpolate", "weight": 0.5}])
def test_how_a_model_is_drawn_changes_no_training(tmp_path, values):
    name = "sunglasses-domainstudio"
    path = changed_params(tmp_path, lambda v: v["adaptations"][name].update(combine=values))
    plain, combined = (config.load(each).adaptation(name) for each in ("params.yaml", path))
    assert combined.combine is not None
    keys = {TrainingRun(name, each, {"source": "0"}).key for each in (plain, combined)}
    assert len(keys) == 1
    assert (
        config.load(path).overridden(name, {f"combine.{list(values)[1]}": 0.25}).combine != combined.combine
    )


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"mode": "mix"}, "mode"),
        ({"mode": "switch"}, "at"),
        ({"mode": "switch", "at": 800}, "at"),
        ({"mode": "interpolate", "weight": 1.2}, "weight"),
        ({"mode": "guide", "at": 0.5, "weight": 2}, "at"),
    ],
)
def test_settings_that_are_not_possible_are_refused(tmp_path, values, place):
    path = changed_params(tmp_path, lambda v: v["adaptations"]["sunglasses-finetune"].update(combine=values))
    with pytest.raises(ConfigError, match=rf"adaptations\.sunglasses-finetune\.combine.*{place}"):
        config.load(path)


def test_samples_name_how_they_were_drawn(tmp_path):
    folders, settings = saved(tmp_path, "unconditional"), SampleSettings(number=2, steps=2)

    @cache
    def drawn(together):
        stored = StoredModel(folders[1], together)
        return sample_stored(stored, tmp_path, "samples", settings, [""], [""], model="ink")

    combined = drawn(Together(switch(0.5), folders[0], Wording()))
    assert len({drawn(None), combined, drawn(Together(switch(0.6), folders[0], Wording()))}) == 3
    manifest = json.loads((combined / "manifest.json").read_text())
    assert manifest["combine"] == {"mode": "switch", "at": 0.5, "source": "above"}
    assert manifest["source_digest"] == models.digest(folders[0])
    assert "combine" not in json.loads((drawn(None) / "manifest.json").read_text())


@pytest.mark.parametrize("combination", [None, interpolate(0.5)])
def test_stored_adapters_are_fused_before_they_draw(tmp_path, monkeypatch, combination):
    base, adapters = saved(tmp_path, "unconditional lora")
    together = combination and Together(combination, base, Wording())
    drawn = []
    monkeypatch.setattr(
        "domainstudio.sampling.folder.sample_to_folder", lambda model, *_, **__: drawn.append(model)
    )
    assert models.load(adapters).adapters is not None
    sample_stored(
        StoredModel(adapters, together), tmp_path, "samples", SampleSettings(number=2, steps=2), [""], [""]
    )
    assert drawn[0].adapters is None


def test_a_model_that_is_not_there_is_not_exported(tmp_path, monkeypatch):
    changed_params(tmp_path, lambda values: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", "sunglasses-lora", "exported"])
    with pytest.raises(CheckpointError, match=r"models/adapted/sunglasses-lora is missing: run dvc repro"):
        export.main()
