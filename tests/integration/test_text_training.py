"""Training text-to-image models: every kind and option, what changes by it, and that it can be resumed."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from domainstudio.config import LossWeights
from domainstudio.errors import TrainingError
from domainstudio.training.examples import Examples
from domainstudio.training.objective import Objective
from domainstudio.training.trainer import Trainer
from tests.integration.training_parts import launch, losses_of, resume, same, state
from tests.models import DOMAINSTUDIO, PLAIN, PROMPTS, tiny_text_denoiser, tiny_text_images, training_settings

TARGET = [[f"{text} [V]"] for text in PROMPTS]
SOURCE = [[text] for text in PROMPTS]
KINDS = ["sd1", "sd2", "sdxl"]
PRIOR = DOMAINSTUDIO.model_copy(update={"prior": 1.0})
LATENT = PRIOR.model_copy(update={"space": "latent"})


def trainer(folder, kind="sd1", weights=PRIOR, latents=None, text_encoders=False, **values):
    settings = training_settings(**{"steps": 2, "batch_size": 3, **values})
    denoiser = tiny_text_denoiser(kind)
    denoiser.train(text_encoders=text_encoders)
    examples = Examples.of(denoiser, tiny_text_images(), TARGET, SOURCE)
    prior = Examples.of(denoiser, tiny_text_images(5, seed=1), SOURCE[:5]) if weights.prior else None
    source = denoiser.frozen_source() if weights.pairwise else None
    objective = Objective(denoiser, weights, source)
    return Trainer(objective, examples, settings, folder, prior=prior, latents=latents)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [PRIOR, LATENT])
@pytest.mark.parametrize("text_encoders", [False, True])
def test_only_what_is_trained_changes(tmp_path, kind, weights, text_encoders):
    training = trainer(tmp_path, kind, weights, text_encoders=text_encoders, condition_dropout=0.3)
    denoiser, source = training.denoiser, training.objective.source
    parts = {name: part for name, part in denoiser.pipeline.components.items() if hasattr(part, "state_dict")}
    parts["source"] = source.network
    before = {name: state(part) for name, part in parts.items()}
    history = training.train()
    assert [record["step"] for record in history] == [1, 2]
    terms = {"total", "simple", "prior", "image", "high_frequency", "high_frequency_mse"}
    assert all(math.isfinite(record[term]) for record in history for term in terms)
    changed = {name for name, part in parts.items() if not same(before[name], state(part))}
    encoders = {name for name in parts if name.startswith("text_encoder")}
    assert changed == ({"unet"} | encoders if text_encoders else {"unet"})


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_loss(tmp_path, kind):
    """The VAE's decoder is recomputed too, which pixel-space terms hold most memory in."""
    options = {"kind": kind, "text_encoders": True, "steps": 2}
    plain = trainer(tmp_path / "plain", **options)
    recomputed = trainer(tmp_path / "recomputed", gradient_checkpointing=True, **options)
    calls = []
    recomputed.denoiser.vae.decoder.up_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    first, second = plain.train(), recomputed.train()
    assert len(calls) == 2 * 3  # of each step: adapted, source, and adapted again in the backward pass
    for a, b in zip(losses_of(first), losses_of(second), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "sd1", "horizontal_flip": True},
        {"kind": "sd2", "weights": LATENT, "mixed_precision": "bf16"},
        {"kind": "sdxl", "text_encoders": True, "gradient_accumulation_steps": 2},
    ],
)
def test_resumed_with_kept_latents_is_bit_identical_to_undisturbed(tmp_path, options):
    resume(trainer, tmp_path, condition_dropout=0.3, **options)
    assert len(list((tmp_path / "latents").iterdir())) == 2  # training images, and those of the prior


def test_a_trained_model_is_drawn_and_saved_as_it_is(tmp_path):
    from domainstudio import models
    from domainstudio.sampling import sample

    training = trainer(tmp_path / "run", "sdxl", text_encoders=True, condition_dropout=0.3)
    training.train()
    options: dict[str, Any] = {"guidance_scale": 3.0, "steps": 2}
    mine = sample(training.denoiser, [1], ["a red house [V]"], **options)
    training.denoiser.save(tmp_path / "model")
    again = sample(models.load(tmp_path / "model"), [1], ["a red house [V]"], **options)
    assert np.abs(mine.astype(int) - again.astype(int)).max() <= 1
    untrained = sample(tiny_text_denoiser("sdxl"), [1], ["a red house [V]"], **options)
    assert np.abs(mine.astype(int) - untrained.astype(int)).max() > 2


@pytest.mark.usefixtures("bfloat16")
def test_only_the_source_models_unet_is_lowered(tmp_path):
    """What is saved must not be rounded: text encoders that are not trained stay as they are."""
    denoiser = tiny_text_denoiser("sd1")
    encoder = {name: value.clone() for name, value in denoiser.text_encoders[0].state_dict().items()}
    training = trainer(tmp_path / "run", frozen_precision="bf16", mixed_precision="bf16")
    assert next(training.objective.source.network.unet.parameters()).dtype == torch.bfloat16
    training.train()
    training.denoiser.save(tmp_path / "model")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    saved = pipeline.text_encoder.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in encoder.items())
    assert pipeline("a cup", num_inference_steps=2).images[0].size == (16, 16)


def test_training_lowers_the_denoising_error(tmp_path):
    options = {"steps": 30, "batch_size": 4, "learning_rate": 3e-3, "checkpoint_every": 1000}
    history = trainer(tmp_path, weights=PLAIN, **options).train()
    values = [record["simple"] for record in history]
    assert np.mean(values[-8:]) < 0.75 * np.mean(values[:8])


@pytest.mark.parametrize(
    ("dtype", "weights", "size", "message"),
    [
        (torch.float16, PLAIN, 16, "trainable parameters must be float32: load the model in"),
        (torch.float32, PLAIN, 32, "32x32 pixels and the model 16x16: set prepare.resolution to 16"),
        (
            torch.float32,
            LossWeights(prior=1),
            16,
            "prior weight is above 0: give images of the source domain",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, dtype, weights, size, message):
    denoiser = tiny_text_denoiser()
    denoiser.network.to(dtype)
    examples = Examples.of(tiny_text_denoiser(), np.zeros((6, 3, size, size), np.uint8), SOURCE)
    with pytest.raises(TrainingError, match=message):
        Trainer(Objective(denoiser, weights), examples, training_settings(), tmp_path)


def test_an_image_without_a_prompt_is_refused():
    with pytest.raises(TrainingError, match=r"an image has no prompt: give every image a caption"):
        Examples.of(tiny_text_denoiser(), tiny_text_images(2), [["a cup"], []])


PREVIEWED = """
import sys
from pathlib import Path
from domainstudio.config import SampleSettings
from domainstudio.training.previews import previewer
from tests.integration.test_text_training import DOMAINSTUDIO, trainer

training = trainer(Path(sys.argv[1]), weights=DOMAINSTUDIO, checkpoint_every=2, preview_every=2)
training.preview = previewer(SampleSettings(number=2, steps=2), ["a house"], number=2)
training.train()
"""


def test_one_process_previews_while_another_waits(tmp_path):
    """The one that draws must not call the others: they are at the next barrier."""
    launch(PREVIEWED, tmp_path / "run")
    assert (tmp_path / "run/previews/step-000002.png").is_file()
    assert (tmp_path / "run/step-0000002").is_dir()
