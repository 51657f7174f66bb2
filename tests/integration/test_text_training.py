"""Training text-to-image models: every kind and option, what changes by it, and that it can be resumed."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path
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
from tests.models import DOMAINSTUDIO, PROMPTS, tiny_text_denoiser, tiny_text_images, training_settings

ROOT = Path(__file__).parents[2]
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


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def losses_of(history):
    times = ("timestamp", "seconds")
    return [{name: value for name, value in record.items() if name not in times} for record in history]


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
def test_resumed_is_bit_identical_to_undisturbed(tmp_path, options):
    options = {"steps": 4, "checkpoint_every": 2, "condition_dropout": 0.3, **options}
    whole = trainer(tmp_path / "whole", **options)
    undisturbed = whole.train()
    cut = {**options, "latents": tmp_path / "latents"}
    trainer(tmp_path / "cut", **{**cut, "steps": 2}).train()
    second = trainer(tmp_path / "cut", **cut)
    assert losses_of(second.train()) == losses_of(undisturbed)
    assert same(state(whole.denoiser.network), state(second.denoiser.network))


def test_kept_latents_change_no_loss(tmp_path):
    fresh = trainer(tmp_path / "fresh", horizontal_flip=True).train()
    trainer(tmp_path / "first", latents=tmp_path / "latents", horizontal_flip=True)
    assert len(list((tmp_path / "latents").iterdir())) == 2  # training images, and those of the prior
    kept = trainer(tmp_path / "kept", latents=tmp_path / "latents", horizontal_flip=True)
    assert losses_of(kept.train()) == losses_of(fresh)


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
    history = trainer(tmp_path, weights=LossWeights(), **options).train()
    values = [record["simple"] for record in history]
    assert np.mean(values[-8:]) < 0.75 * np.mean(values[:8])


def test_half_precision_weights_are_refused(tmp_path):
    denoiser = tiny_text_denoiser()
    denoiser.network.half()
    condition = tiny_text_denoiser()
    examples = Examples.of(condition, tiny_text_images(), SOURCE)
    with pytest.raises(TrainingError, match="trainable parameters must be float32: load the model in"):
        Trainer(Objective(denoiser, LossWeights()), examples, training_settings(), tmp_path)


def test_images_of_another_size_are_refused(tmp_path):
    denoiser = tiny_text_denoiser()
    examples = Examples.of(denoiser, np.zeros((2, 3, 32, 32), np.uint8), SOURCE[:2])
    with pytest.raises(
        TrainingError, match=r"32x32 pixels and the model 16x16: set prepare.resolution to 16"
    ):
        Trainer(Objective(denoiser, LossWeights()), examples, training_settings(), tmp_path)


def test_a_prior_weight_without_images_is_refused(tmp_path):
    denoiser = tiny_text_denoiser()
    examples = Examples.of(denoiser, tiny_text_images(), SOURCE)
    with pytest.raises(TrainingError, match="prior weight is above 0: give images of the source domain"):
        Trainer(Objective(denoiser, LossWeights(prior=1)), examples, training_settings(), tmp_path)


def test_an_image_without_a_prompt_is_refused():
    with pytest.raises(TrainingError, match=r"an image has no prompt: give every image a caption"):
        Examples.of(tiny_text_denoiser(), tiny_text_images(2), [["a cup"], []])


TWO_PROCESSES = """
import sys
from pathlib import Path
from domainstudio.config import SampleSettings
from domainstudio.training.examples import Examples
from domainstudio.training.objective import Objective
from domainstudio.training.previews import previewer
from domainstudio.training.trainer import Trainer
from tests.models import DOMAINSTUDIO, tiny_text_denoiser, tiny_text_images, training_settings

denoiser = tiny_text_denoiser("sd1")
examples = Examples.of(denoiser, tiny_text_images(6), [["a house"]] * 6)
settings = training_settings(steps=2, batch_size=3, checkpoint_every=2, preview_every=2)
preview = previewer(SampleSettings(number=2, steps=2), ["a house"], number=2)
objective = Objective(denoiser, DOMAINSTUDIO, denoiser.frozen_source())
Trainer(objective, examples, settings, Path(sys.argv[1]), preview=preview).train()
"""


def test_one_process_previews_while_another_waits(tmp_path):
    """The one that draws must not call the others: they are at the next barrier."""
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [*launch, f"--master-port={port}", tmp_path / "two.py", tmp_path / "run"]
    subprocess.run(command, check=True, env=environment, cwd=ROOT, timeout=150)
    assert (tmp_path / "run/previews/step-000002.png").is_file()
    assert (tmp_path / "run/step-0000002").is_dir()
