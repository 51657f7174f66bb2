import logging
import sys

import numpy as np
import pytest
import torch

from domainstudio import precision
from domainstudio.config import SampleSettings
from domainstudio.errors import MissingExtraError, TrainingError
from domainstudio.precision import usable_precision
from domainstudio.sampling import sample
from domainstudio.training import previews
from domainstudio.training.optimizer import make_optimizer
from domainstudio.training.previews import previewer
from tests.integration.test_training import trainer
from tests.models import PROMPTS, tiny_denoiser, training_settings
from tests.unit import test_lora as adapters


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
@pytest.mark.parametrize("kind", ["unconditional", "sd1"])
def test_a_lowered_base_draws_in_its_own_precision(tmp_path, kind):
    """Its adapters and its text encoders stay float32, though the source model shares them."""
    told = [PROMPTS[0]] if kind == "sd1" else None
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
