"""From settings to a trainer: which images, which prompts, which parts are trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainstudio import config, models
from domainstudio.config import Adaptation, LoraSettings, Method, PriorSettings, PromptSettings
from domainstudio.data import ImageRecord, ImageSet
from domainstudio.errors import CheckpointError, ConfigError, DataError
from domainstudio.models.tiny_vae import load_decoder
from domainstudio.training.prior import prior_images
from domainstudio.training.recipe import Recipe, training_examples
from tests.models import tiny_class_denoiser, tiny_denoiser, tiny_text_denoiser, training_settings

DRAWING = config.SampleSettings(number=9, steps=2, batch_size=4, seed=5)


def adaptation(method=None, **values):
    training = training_settings(**values.pop("training", {}))
    values = {"prompts": PromptSettings(), "prior": PriorSettings(number=5), **values}
    values |= {"name": "mine", "source": "tiny", "target": "ink", "method": "any"}
    return Adaptation(training=training, weights=method or Method(), **values)


def image_set(resolution, number=4, label="style", caption="house {}"):
    images = np.random.default_rng(0).integers(0, 256, (number, 3, resolution, resolution), dtype=np.uint8)
    texts = [caption and caption.format(i) for i in range(number)]
    records = tuple(ImageRecord(str(i), "0", 8, 8, f"{i}.png", text, label) for i, text in enumerate(texts))
    return ImageSet(images, records, origin="images")


@pytest.fixture
def denoiser():
    return tiny_text_denoiser("sd1")


@pytest.fixture
def shots(denoiser):
    return image_set(denoiser.resolution[0])


def prior_of(denoiser, shots, settings, cache, source_images=Path("none")):
    return prior_images(denoiser, shots, settings, DRAWING, "0", cache=cache, source_images=source_images)


def told(denoiser, texts):
    return {name: values[:, None] for name, values in denoiser.condition(texts).items()}


def test_each_model_is_told_its_own_prompt(denoiser, shots):
    examples = training_examples(denoiser, shots, adaptation())
    target = told(denoiser, [f"house {i} in [V] style" for i in range(4)])
    source = told(denoiser, [f"house {i}" for i in range(4)])
    for name in target:
        torch.testing.assert_close(examples.condition[name], target[name])
        torch.testing.assert_close(examples.source_condition[name], source[name])
    assert not torch.equal(
        examples.condition["encoder_hidden_states"], examples.source_condition["encoder_hidden_states"]
    )


def test_labels_can_have_their_own_prompts(denoiser, shots):
    pairs = {"style": config.PromptPair(source="a house", target="a house in [V] style")}
    settings = adaptation(prompts=PromptSettings(by_label=pairs))
    examples = training_examples(denoiser, shots, settings)
    expected = told(denoiser, ["a house in [V] style"] * 4)["encoder_hidden_states"]
    torch.testing.assert_close(examples.condition["encoder_hidden_states"], expected)


def test_a_model_that_is_told_nothing_needs_no_captions():
    shots = image_set(8, caption="", label=None)
    assert training_examples(tiny_denoiser(), shots, adaptation()).condition == {}


def test_generated_prior_images_are_drawn_once_from_the_source_prompts(
    denoiser, shots, tmp_path, monkeypatch
):
    """An interrupted drawing ends the same."""
    settings = adaptation(Method(prior=1.0))
    first = prior_of(denoiser, shots, settings, tmp_path)
    assert first.images.shape == (5, *shots.images.shape[1:])
    assert first.texts == ("house 0", "house 1", "house 2", "house 3", "house 0")
    (folder,) = tmp_path.iterdir()
    for file in ("manifest.json", "images/000004.png"):
        (folder / file).unlink()
    assert prior_of(denoiser, shots, settings, tmp_path).digest == first.digest
    monkeypatch.setattr(denoiser, "predict", None)  # drawing again would fail
    assert prior_of(denoiser, shots, settings, tmp_path).digest == first.digest


def test_given_prior_images_have_their_own_captions(denoiser, shots, tmp_path):
    image_set(denoiser.resolution[0], 9).save(tmp_path / "tiny")
    settings = adaptation(Method(prior=1.0), prior=PriorSettings(images="source", number=6))
    prior = prior_of(denoiser, shots, settings, tmp_path, tmp_path)
    assert len(prior.images) == 6 and all(text.startswith("house ") for text in prior.texts)
    with pytest.raises(DataError, match=r"none/tiny.*manifest"):
        prior_of(denoiser, shots, settings, tmp_path)


def test_the_prior_keeps_the_other_classes(tmp_path):
    """Images of the adapted class under its own name would undo the adaptation."""
    denoiser = tiny_class_denoiser()
    adapted, other = denoiser.classes[0], denoiser.classes[1]
    both = image_set(8, 3, adapted), image_set(8, 3, other)
    images = np.concatenate([part.images for part in both])
    ImageSet(images, both[0].records + both[1].records, "images").save(tmp_path / "tiny")
    labels = PromptSettings(source="{label}", target="{label}")
    given = adaptation(Method(prior=1.0), prompts=labels, prior=PriorSettings(images="source", number=9))
    prior = prior_of(denoiser, both[0], given, tmp_path / "a", tmp_path)
    assert set(prior.texts) == {other} and len(prior.images) == 3
    drawn = adaptation(Method(prior=1.0), prompts=labels, prior=PriorSettings(number=4))
    prior = prior_of(denoiser, both[0], drawn, tmp_path / "b")
    assert set(prior.texts) == set(denoiser.classes) - {adapted}
    both[0].save(tmp_path / "only/tiny")
    with pytest.raises(ConfigError, match="every source prompt is a target prompt"):
        prior_of(denoiser, both[0], given, tmp_path / "a", tmp_path / "only")


def test_without_a_prior_weight_nothing_is_drawn(denoiser, shots, tmp_path):
    assert prior_of(denoiser, shots, adaptation(), tmp_path, tmp_path) is None


def changed(denoiser, shots, folder, settings, prior=None):
    """Return the names of the parameters that a training changes."""
    before = {name: value.clone() for name, value in denoiser.network.state_dict().items()}
    Recipe(settings, denoiser, shots, prior).trainer(folder).train()
    after = denoiser.network.state_dict()
    return {name for name, value in before.items() if name in after and not torch.equal(value, after[name])}


def test_the_text_encoder_is_trained_where_asked(shots, tmp_path):
    plain = changed(tiny_text_denoiser("sd1"), shots, tmp_path / "a", adaptation())
    assert plain and all(name.startswith("unet.") for name in plain)
    settings = adaptation(**TEXT_ENCODER)
    both = changed(tiny_text_denoiser("sd1"), shots, tmp_path / "b", settings)
    assert any(name.startswith("text_encoders.0.") for name in both)


def test_new_tokens_are_learned_and_saved(shots, tmp_path):
    denoiser = tiny_text_denoiser("sd1")
    table = denoiser.text_encoders[0].get_input_embeddings().weight.clone()
    settings = adaptation(**token("[V]"))
    trainer = Recipe(settings, denoiser, shots).trainer(tmp_path / "run")
    added = denoiser.text_encoders[0].get_input_embeddings().added.clone()
    trainer.train()
    embedding = denoiser.text_encoders[0].get_input_embeddings()
    assert torch.equal(embedding.table.weight, table), "known words must stay"
    assert not torch.equal(embedding.added, added)
    denoiser.save(tmp_path / "model")
    loaded: Any = models.load(tmp_path / "model")
    text = ["a house in [V] style"]
    assert len(loaded.tokenizers[0].tokenize("[V]")) == 1
    xt, timesteps = torch.randn(1, *denoiser.shape), torch.tensor([10])
    with torch.no_grad():
        expected, found = (m.predict(xt, timesteps, m.condition(text)).output for m in (denoiser, loaded))
    torch.testing.assert_close(found, expected)


TEXT_ENCODER = {"training": {"train_text_encoder": True}}
ADAPTERS = Method(lora=LoraSettings(rank=2))


def token(name):
    return {"prompts": PromptSettings(new_tokens={name: "house"})}


@pytest.mark.parametrize(
    ("make", "method", "values", "message"),
    [
        (tiny_denoiser, None, TEXT_ENCODER, "no text encoder to train"),
        (tiny_denoiser, None, token("[V]"), "no text encoder to train"),
        (tiny_text_denoiser, ADAPTERS, TEXT_ENCODER, "adapters in the UNet only"),
        (tiny_text_denoiser, ADAPTERS, token("[V]"), "cannot be saved with adapters"),
        (tiny_text_denoiser, None, token("a</w>"), r"knows \['a</w>'\] already"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, method, values, message, tmp_path):
    denoiser = make()
    with pytest.raises(ConfigError, match=message):
        Recipe(adaptation(method, **values), denoiser, image_set(denoiser.resolution[0])).trainer(tmp_path)


def tiny_autoencoder(folder, channels=4, levels=2):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    sizes = {"encoder_block_out_channels": (8,) * levels, "decoder_block_out_channels": (8,) * levels}
    blocks = {"num_encoder_blocks": (1,) * levels, "num_decoder_blocks": (1,) * levels}
    vae = AutoencoderTiny(**sizes, **blocks, latent_channels=channels)
    vae.save_pretrained(folder)
    return vae


def test_terms_can_compare_the_images_of_a_tiny_vae(denoiser, shots, tmp_path):
    channels, levels = denoiser.shape[0], len(denoiser.vae.config.block_out_channels)
    vae = tiny_autoencoder(tmp_path / "vae", channels, levels)
    x0 = torch.randn(2, *denoiser.shape, requires_grad=True)
    images = load_decoder(str(tmp_path / "vae"), denoiser)(x0)
    assert images.shape == (2, 3, *denoiser.resolution)
    torch.testing.assert_close(images, vae.decode(x0).sample)
    images.sum().backward()
    assert x0.grad is not None and x0.grad.abs().sum() > 0
    method = Method(image=0.5, high_frequency_mse=0.05, decoder="tiny", tiny_vae=str(tmp_path / "vae"))
    history = Recipe(adaptation(method), denoiser, shots).trainer(tmp_path / "run").train()
    assert all(np.isfinite(list(record.values())).all() for record in history)


def test_a_tiny_vae_of_another_family_is_refused(denoiser, tmp_path):
    tiny_autoencoder(tmp_path / "vae", denoiser.shape[0] + 1)
    with pytest.raises(ConfigError, match=r"tiny_vae.*name the small VAE of this family"):
        load_decoder(str(tmp_path / "vae"), denoiser)
    with pytest.raises(CheckpointError, match="is not an AutoencoderTiny"):
        load_decoder(str(tmp_path), denoiser)
