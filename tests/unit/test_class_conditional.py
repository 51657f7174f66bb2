"""Class-conditional models: names and rows, folders, guidance, and classes that a training leaves alone."""

import json
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DiffusionPipeline

from domainstudio import models
from domainstudio.config import LoraSettings
from domainstudio.data.pictures import save_png
from domainstudio.demo import pretraining
from domainstudio.errors import CheckpointError, ConfigError, DataError
from domainstudio.models import loading, lora
from domainstudio.models.class_conditional import ClassConditionalDenoiser
from domainstudio.models.unconditional import UnconditionalDenoiser
from domainstudio.sampling import sample
from domainstudio.training.examples import Examples, Feed
from domainstudio.training.objective import Objective
from domainstudio.training.trainer import Trainer
from stages import pretrain
from tests.models import (
    CLASSES,
    DOMAINSTUDIO,
    PLAIN,
    close,
    image_set,
    tiny_class_denoiser,
    tiny_denoiser,
    tiny_images,
    training_settings,
)
from tests.project import ROOT

EVERY = [*CLASSES, ""]


def tiny_batch(number):
    generator = torch.Generator().manual_seed(3)
    xt = torch.randn(number, 3, 8, 8, generator=generator)
    return xt, torch.linspace(0, 999, number).long()


def output(denoiser, names):
    with torch.no_grad():
        return denoiser.predict(*tiny_batch(len(names)), denoiser.condition(names)).output


def table(denoiser):
    return denoiser.network.class_embedding.weight.detach().clone()


def test_names_become_rows_of_the_embedding():
    denoiser = tiny_class_denoiser()
    labels = denoiser.condition(["person", "animal", "", "face"])["class_labels"]
    assert labels.dtype == torch.int64
    assert labels.tolist() == [2, 0, 3, 1]
    with pytest.raises(ConfigError, match="no class 'dog'; there are animal, face, person"):
        denoiser.condition(["face", "dog"])


def test_without_a_null_class_guidance_and_dropout_are_refused(tmp_path):
    with_null = tiny_class_denoiser(CLASSES[:-1])
    denoiser = ClassConditionalDenoiser(with_null.network, with_null.scheduler, classes=CLASSES)
    with pytest.raises(ConfigError, match="condition dropout: guidance_scale must be 1"):
        sample(denoiser, [1], ["face"], guidance_scale=2.0, steps=2)
    examples = Examples.of(denoiser, tiny_images(2), [["face"], ["animal"]])
    with pytest.raises(ConfigError, match=r"no null class.*condition_dropout 0"):
        Feed(examples, denoiser, training_settings(condition_dropout=0.1), tmp_path)
    assert sample(denoiser, [1], ["face"], steps=2).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("learned_variance", [False, True])
def test_the_network_is_told_the_class(learned_variance):
    noise: dict[str, Any] = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    denoiser = tiny_class_denoiser(learned_variance=learned_variance, **(noise if learned_variance else {}))
    xt, timesteps = tiny_batch(2)
    prediction = denoiser.predict(xt, timesteps, denoiser.condition(["face", "person"]))
    expected = denoiser.network(xt, timesteps, class_labels=torch.tensor([1, 2])).sample
    found = [part for part in (prediction.output, prediction.variance) if part is not None]
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
    assert (output(denoiser, ["face"]) - output(denoiser, [""])).abs().max() > 1e-4


def test_guidance_leads_from_the_null_class_to_the_class():
    denoiser = tiny_class_denoiser()
    guided = sample(denoiser, [5], ["face"], guidance_scale=3.0, steps=1)
    xt = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        away, towards = (
            denoiser.predict(xt, torch.tensor([999]), denoiser.condition([name])).output
            for name in ("", "face")
        )
    x0 = -(away + 3 * (towards - away))  # v is -x0 where the signal-to-noise ratio is zero
    np.testing.assert_allclose(guided, (x0.clamp(-1, 1) + 1) * 127.5, atol=0.51)
    unguided = sample(denoiser, [5], ["face"], steps=1).astype(int)
    assert np.abs(guided - unguided).max() > 10


def test_without_conditions_the_null_class_is_drawn():
    nothing, null, face = (sample(tiny_class_denoiser(), [5], of, steps=2) for of in (None, [""], ["face"]))
    np.testing.assert_array_equal(nothing, null)
    assert not np.array_equal(nothing, face)


@pytest.mark.parametrize("half", [False, True])
def test_a_saved_model_is_the_same_model_also_to_plain_diffusers(tmp_path, half):
    denoiser = tiny_class_denoiser(("Katze", "Hündin"))
    denoiser.save(tmp_path, half=half)
    again = models.load(tmp_path)
    assert isinstance(again, ClassConditionalDenoiser)
    assert again.conditional and again.classes == ("Katze", "Hündin")
    assert {p.dtype for p in again.network.parameters()} == {torch.float32}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert type(pipeline) is DDIMPipeline
    with torch.no_grad():
        plain = pipeline.unet.float()(*tiny_batch(3), class_labels=torch.tensor([1, 0, 2])).sample
    names = ["Hündin", "Katze", ""]
    for found in (output(again, names), plain):
        torch.testing.assert_close(found, output(denoiser, names), rtol=0, atol=0.02 if half else 2e-5)
    assert json.loads((tmp_path / "classes.json").read_text(encoding="utf-8")) == ["Katze", "Hündin"]


def test_classes_without_names_are_numbered(tmp_path):
    tiny_class_denoiser().save(tmp_path)
    (tmp_path / "classes.json").unlink()
    denoiser = models.load(tmp_path)
    assert denoiser.classes == ("0", "1", "2", "3")
    with pytest.raises(ConfigError, match="guidance_scale must be 1"):
        denoiser.condition([""])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"classes\.json cannot be read"),
        ('{"0": "cat"}', r"classes\.json must hold a list of names"),
        ("[1, 2, 3]", r"classes\.json must hold a list of names"),
        ('["a", "a", "b"]', r"classes\.json: names must differ"),
        ('["a", "", "b"]', r"classes\.json: names must differ and not be empty"),
        ('["a", "b"]', r"there are 2 names and the embedding has 4 rows"),
        ('["a", "b", "c", "d", "e"]', r"there are 5 names and the embedding has 4 rows"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, content, message):
    tiny_class_denoiser().save(tmp_path)
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        models.load(tmp_path)


def test_the_unets_configuration_decides_the_kind(tmp_path):
    tiny_denoiser().save(tmp_path)
    (tmp_path / "classes.json").write_text('["a"]')
    loaded = models.load(tmp_path)
    assert isinstance(loaded, UnconditionalDenoiser) and not loaded.conditional


def test_a_new_kind_is_a_class_and_a_line_of_the_table(tmp_path, monkeypatch):
    class Other(UnconditionalDenoiser):
        kind = "other"
        pipelines = frozenset({"OtherPipeline"})

    tiny_denoiser().save(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("DDIMPipeline", "OtherPipeline"))
    with pytest.raises(CheckpointError, match="is a OtherPipeline; these can be adapted: DDIMPipeline, DDPM"):
        models.load(tmp_path)
    monkeypatch.setattr(loading, "KINDS", (*loading.KINDS, Other))
    assert type(models.load(tmp_path)) is Other
    assert models.kind_of(tmp_path) == "other"


def test_other_kinds_of_class_embedding_are_refused(tmp_path):
    denoiser = tiny_denoiser()
    network: Any = denoiser.network
    denoiser.network = type(network).from_config(network.config, class_embed_type="timestep")
    denoiser.save(tmp_path)
    with pytest.raises(CheckpointError, match="class_embed_type 'timestep' is not supported"):
        models.load(tmp_path)


@pytest.mark.parametrize("older", [False, True])
def test_it_starts_as_the_unconditional_model_exactly(tmp_path, older):
    """Also one from a folder that is older than class embeddings."""
    tiny_denoiser().save(tmp_path)
    path = tmp_path / "unet/config.json"
    settings = json.loads(path.read_text()).items()
    path.write_text(json.dumps({name: value for name, value in settings if not older or "class" not in name}))
    plain = models.load(tmp_path)
    denoiser = ClassConditionalDenoiser.from_unconditional(plain, CLASSES)
    assert denoiser.classes == CLASSES
    close(output(denoiser, EVERY), output(plain, EVERY))
    assert torch.equal(denoiser.schedule.levels, plain.schedule.levels)
    assert denoiser.schedule.prediction_type == plain.schedule.prediction_type
    assert denoiser.pipeline == "DDIMPipeline"
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter.add_(1)
    close(output(tiny_denoiser(), EVERY), output(plain, EVERY))


def test_dropped_conditions_are_the_null_class(tmp_path):
    denoiser = tiny_class_denoiser()
    examples = Examples.of(denoiser, tiny_images(3), [[name] for name in CLASSES])
    feed = Feed(examples, denoiser, training_settings(condition_dropout=0.4), tmp_path)
    names = {image.tobytes(): row for row, image in enumerate(tiny_images(3))}
    found: list[tuple[int, int]] = []
    for step in range(40):
        batch = feed.draw(torch.Generator().manual_seed(step), torch.Generator(), 3, 1, 0)
        pixels = ((batch.images + 1) * 127.5).round().byte().numpy()
        rows = [names[image.tobytes()] for image in pixels]
        found += zip(rows, batch.condition["class_labels"].tolist(), strict=True)
    assert set(found) == {(0, 0), (1, 1), (2, 2), (0, 3), (1, 3), (2, 3)}
    assert 0.25 < sum(label == 3 for _, label in found) / 120 < 0.55


def adapt(folder, denoiser, told, prior_told, weights=PLAIN, **settings):
    """Train on random images of the classes `told`, with prior images of others."""
    examples = Examples.of(denoiser, tiny_images(len(told)), [[name] for name in told])
    prior = Examples.of(denoiser, tiny_images(len(prior_told), 1), [[name] for name in prior_told])
    source = denoiser.frozen_source() if weights.pairwise else None
    objective = Objective(denoiser, weights.model_copy(update={"prior": 1.0}), source)
    options = training_settings(weight_decay=0.5, learning_rate=1e-2, **settings)
    trainer = Trainer(objective, examples, options, folder, prior=prior)
    return trainer, trainer.train()


@pytest.mark.parametrize("weights", [PLAIN, DOMAINSTUDIO])
@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("settings", [{"ema_decay": 0.0}, {"ema_decay": 0.9, "mixed_precision": "bf16"}])
def test_classes_that_never_occur_keep_their_embedding(tmp_path, weights, settings):
    denoiser = tiny_class_denoiser(("adapted", "kept", "unseen"))
    before, network = table(denoiser), denoiser.network.state_dict()
    other = {name: value.clone() for name, value in network.items() if value.ndim == 4}
    _, history = adapt(tmp_path, denoiser, ["adapted"] * 4, ["kept"] * 4, weights, **settings)
    after = table(denoiser)
    assert {"simple", "prior"} <= set(history[-1])
    assert torch.equal(after[2:], before[2:])  # unseen, and the null class
    assert ((after[:2] - before[:2]).abs().amax(dim=1) > 1e-3).all()
    assert all(not torch.equal(network[name], value) for name, value in other.items())


def test_without_classes_all_weights_decay_alike(tmp_path):
    settings, examples = training_settings(weight_decay=0.5), Examples.unconditional(tiny_images())
    trainer = Trainer(Objective(tiny_denoiser(), PLAIN), examples, settings, tmp_path)
    (group,) = trainer.optimizer.param_groups
    assert group["weight_decay"] == 0.5
    assert [id(p) for p in group["params"]] == [id(p) for p in trainer.parameters]


def test_adapters_leave_the_classes_as_they_are(tmp_path):
    pytest.importorskip("peft")
    tiny_class_denoiser().save(tmp_path / "source")
    denoiser = models.load(tmp_path / "source")
    source = output(denoiser, EVERY)
    lora.attach(denoiser, LoraSettings(rank=2), 0)
    trainer, _ = adapt(tmp_path / "run", denoiser, ["face"] * 4, ["person"] * 4, DOMAINSTUDIO)
    assert len(trainer.optimizer.param_groups) == 1
    assert torch.equal(table(denoiser), table(tiny_class_denoiser()))
    assert torch.equal(output(denoiser.frozen_source(), EVERY), source)
    assert (output(denoiser, EVERY) - source).abs().max() > 1e-4
    denoiser.save(tmp_path / "adapted")
    assert not (tmp_path / "adapted/classes.json").exists()
    again = models.load(tmp_path / "adapted")
    assert again.classes == CLASSES
    close(output(again, EVERY), output(denoiser, EVERY))
    lora.save_merged(denoiser, tmp_path / "merged")
    assert models.load(tmp_path / "merged").classes == CLASSES


def test_with_classes_a_cut_training_goes_on_where_it_was(tmp_path):
    def trained(folder):
        denoiser, told = tiny_class_denoiser(), ["animal", "face", "animal", "face"]
        adapt(folder, denoiser, told, ["person"] * 4, condition_dropout=0.2)
        return denoiser.network.state_dict().values()

    whole, _ = trained(tmp_path / "whole"), trained(tmp_path / "cut")
    shutil.rmtree(max((tmp_path / "cut").glob("step-*")))
    assert all(map(torch.equal, whole, trained(tmp_path / "cut")))


def flat(value):
    """Return four images of about one grey."""
    shades = value + np.arange(4).reshape(-1, 1, 1, 1)
    return np.broadcast_to(shades, (4, 3, 8, 8)).astype(np.uint8)


def learn(folder, denoiser, examples, steps, prior=None):
    length = {"steps": steps, "checkpoint_every": steps}
    settings = training_settings(learning_rate=5e-3, batch_size=8, ema_decay=0.9, **length)
    weights = PLAIN.model_copy(update={"prior": 1.0 if prior else 0.0})
    Trainer(Objective(denoiser, weights), examples, settings, folder, prior=prior).train()


def brightness(denoiser, name):
    return sample(denoiser, range(8), [name] * 8, steps=8).mean()


@pytest.mark.slow
def test_one_class_is_adapted_and_the_other_kept(tmp_path):
    """White and black are learned; then white becomes grey, and prior images keep black."""
    denoiser = tiny_class_denoiser(("a", "b"))
    both = np.concatenate([flat(240), flat(10)])
    learn(tmp_path / "source", denoiser, Examples.of(denoiser, both, [["a"]] * 4 + [["b"]] * 4), 100)
    assert brightness(denoiser, "a") > 200
    assert brightness(denoiser, "b") < 55
    prior = Examples.of(denoiser, flat(10), [["b"]] * 4)
    learn(tmp_path / "adapted", denoiser, Examples.of(denoiser, flat(130), [["a"]] * 4), 60, prior)
    assert brightness(denoiser, "a") == pytest.approx(130, abs=20)
    assert brightness(denoiser, "b") < 55


def test_an_image_without_a_label_is_named():
    with pytest.raises(DataError, match=r"images: the image 1\.png has no label"):
        pretraining.labels_of(image_set(tiny_images(2), labels=["cat", None]))


def test_the_stage_wants_an_unconditional_model(tmp_path):
    tiny_class_denoiser().save(tmp_path)
    with pytest.raises(ConfigError, match=r"pretrain_class\.source: .* is not unconditional"):
        pretraining.with_classes(tmp_path, ["a"])


@pytest.mark.slow
def test_the_stage_writes_a_model_of_the_images_classes(tmp_path, monkeypatch):
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["pretrain_class"]["training"] |= {"steps": 2, "batch_size": 4, "preview_every": 2}
    values["sample"]["steps"] = 2
    values["pretrain_class"] |= {"images": "images", "resolution": 8}
    values["prepare"]["min_size"] = 8
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    for index, label in enumerate(["person", "face", "animal", "face"]):
        save_png(tiny_images(4)[index : index + 1], [tmp_path / f"images/{label}/{index}.png"])
    tiny_denoiser().save(tmp_path / "models/sources/noto")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pretrain", "pretrain_class"])
    pretrain.main()
    folder = tmp_path / "models/sources/noto-class"
    denoiser = models.load(folder)
    assert denoiser.classes == CLASSES
    card = (folder / "README.md").read_text()
    assert "(animal, face, person) of 8x8 pixels, trained from the weights of `noto`" in card
    assert "[8, 16], [False, True]" in card
    size = (folder / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 3 * sum(p.numel() for p in denoiser.network.parameters()) + 20_000  # half precision
