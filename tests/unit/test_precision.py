import logging
import sys

import numpy as np
import pytest
import torch
from accelerate import PartialState

from domainstudio import models, precision
from domainstudio.config import LoraSettings, Method, SampleSettings
from domainstudio.errors import MissingExtraError, TrainingError
from domainstudio.precision import usable_precision
from domainstudio.sampling import sample
from domainstudio.training import previews
from domainstudio.training.optimizer import make_optimizer
from domainstudio.training.previews import previewer
from domainstudio.training.recipe import Recipe
from tests.integration.test_training import trainer
from tests.models import DOMAINSTUDIO, PROMPTS, tiny_denoiser, tiny_text_denoiser, training_settings
from tests.unit import test_lora as adapters
from tests.unit.test_adaptation import DRAWING, adaptation, image_set


@pytest.fixture(params=[True, False], ids=["bfloat16", "no bfloat16"])
def has_bfloat16(request, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: request.param)
    precision._say_once.cache_clear()
    return request.param


def test_bfloat16_is_used_where_the_processor_has_it(has_bfloat16, caplog):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert usable_precision("bf16", cpu) == ("bf16" if has_bfloat16 else "no")
    assert usable_precision("bf16", cpu) == ("bf16" if has_bfloat16 else "no")
    assert [usable_precision(wanted, cpu) for wanted in ("no", "fp16")] == ["no", "fp16"]
    assert usable_precision("bf16", gpu) == "bf16"
    warned = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == (0 if has_bfloat16 else 1)  # once, not at every batch


def test_sampling_and_training_ask_for_it(has_bfloat16, tmp_path):
    denoiser = tiny_denoiser()
    drawn, exact = (sample(denoiser, [1], steps=3, mixed_precision=m) for m in ("bf16", "no"))
    assert (drawn == exact).all() != has_bfloat16
    training = trainer(tmp_path, mixed_precision="bf16", frozen_precision="bf16")
    assert training.accelerator.mixed_precision == ("bf16" if has_bfloat16 else "no")
    training.train()


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("kind", ["unconditional", "sd1", "demo"])
def test_a_lowered_base_draws_in_its_own_precision(tmp_path, kind):
    """Its adapters and its text encoders stay float32, though the source model shares them."""
    told = None if kind == "unconditional" else [PROMPTS[0]]
    preview = previewer(SampleSettings(number=1, steps=2), told, number=1)
    lowered = {"mixed_precision": "bf16", "frozen_precision": "bf16"}
    training = adapters.trainer(tmp_path, kind, preview=preview, steps=1, preview_every=1, **lowered)
    dtypes = {name: p.dtype for name, p in training.denoiser.network.named_parameters()}
    full = {name for name in dtypes if "lora_" in name or name.startswith("text_encoders.")}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == full
    training.train()
    assert (tmp_path / "previews/step-000001.png").is_file()
    drawn, asked = (sample(training.denoiser, [1], told, steps=2, mixed_precision=m) for m in ("no", "bf16"))
    assert (drawn == asked).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["unconditional", "sd1", "demo", "sdxl", "sd3", "pixart"])
def test_weights_that_nobody_trains_are_read_in_half_precision(tmp_path, kind, half):
    """All but the VAE, and text encoders that float16 would overflow; the pictures stay about the same."""
    source = tiny_denoiser() if kind == "unconditional" else tiny_text_denoiser(kind)
    source.save(tmp_path)
    lowered = models.load(tmp_path, half)
    told = [PROMPTS[0]] * 2 if lowered.conditional else None
    text = {id(p) for encoder in lowered.text_encoders for p in encoder.parameters()}
    full = text if half == torch.float16 else set()
    for name, parameter in lowered.network.named_parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in full else half), name
    if lowered.vae is not None:
        assert {p.dtype for p in lowered.vae.parameters()} == {torch.float32}
    for name, value in lowered.condition(told or ["", ""]).items():
        assert not value.is_floating_point() or value.dtype == torch.float32, name
    drawn, expected = (sample(each, [1, 2], told, steps=3).astype(int) for each in (lowered, source))
    assert 0 < np.abs(drawn - expected).mean() < 6


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("learns", ["adapters", "adapters of text", "everything"])
def test_a_base_that_stays_frozen_never_is_float32(tmp_path, monkeypatch, learns):
    """Also in its adapters' next training, whose images of the prior it draws."""
    monkeypatch.chdir(tmp_path)
    denoiser = tiny_text_denoiser("sd1")
    denoiser.save(tmp_path / "models/sources/tiny")
    image_set(denoiser.resolution[0]).save(tmp_path / "data/targets/ink/shots")
    lora = None if learns == "everything" else LoraSettings(rank=2, text_encoder=learns != "adapters")
    method = Method(**{**DOMAINSTUDIO.model_dump(), "prior": 1.0}, lora=lora)
    lowered = {"mixed_precision": "bf16", "frozen_precision": "bf16", "steps": 1}
    recipe = Recipe.load(adaptation(method, training=lowered), DRAWING, PartialState())
    dtype = torch.bfloat16 if learns == "adapters" else torch.float32
    assert {p.dtype for p in recipe.denoiser.network.parameters()} == {dtype}
    assert recipe.trainer(tmp_path / "run").train()[0]["total"] > 0


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match="adamw8bit needs a CUDA GPU"):
        trainer(tmp_path, optimizer="adamw8bit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingExtraError, match=r'bitsandbytes.*pip install "domainstudio\[gpu\]"'):
        make_optimizer(torch.nn.Linear(1, 1), training_settings(optimizer="adamw8bit"))


@pytest.mark.parametrize(("side", "number"), [(64, 16), (256, 16), (512, 4), (1024, 4)])
def test_previews_shrink_with_the_size_of_a_sample(monkeypatch, side, number):
    drawn = []

    class Sized:
        resolution = side, side

    def draw(denoiser, seeds, prompts, settings):
        drawn.append((len(seeds), len(prompts)))
        return np.zeros((len(seeds), 3, 8, 8), np.uint8)

    monkeypatch.setattr(previews, "draw", draw)
    previewer(SampleSettings(number=1), ["a", "b"])(Sized())  # type: ignore[arg-type]
    assert drawn == [(number, number)]
