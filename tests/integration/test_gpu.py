"""What only an accelerator shows: half precision with scaled gradients, and the same draws as on the CPU."""

import numpy as np
import pytest
import torch

from domainstudio.config import SampleSettings
from domainstudio.sampling import default_device, sample
from domainstudio.training.previews import previewer
from tests.integration.test_training import trainer
from tests.models import PROMPTS, tiny_denoiser
from tests.unit import test_lora as adapters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator"),
]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_every_precision_trains_on_the_accelerator(tmp_path, mixed_precision):
    training = trainer(tmp_path, steps=80, learning_rate=3e-3, mixed_precision=mixed_precision)
    assert training.accelerator.device.type == default_device().type
    values = [record["simple"] for record in training.train()]
    assert np.mean(values[-20:]) < np.mean(values[:20])


def test_a_training_with_scaled_gradients_resumes(tmp_path):
    trainer(tmp_path, steps=4, mixed_precision="fp16").train()
    history = trainer(tmp_path, steps=8, mixed_precision="fp16").train()
    assert [record["step"] for record in history] == list(range(1, 9))


def test_the_same_seed_gives_nearly_the_same_picture_as_on_the_cpu():
    on_cpu = sample(tiny_denoiser(), [1, 2], steps=5)
    on_gpu = sample(tiny_denoiser().to(default_device()), [1, 2], steps=5)
    assert np.abs(on_cpu.astype(int) - on_gpu).mean() < 2


def test_text_encoders_leave_the_accelerator_while_a_model_trains(tmp_path):
    preview = previewer(SampleSettings(number=1, steps=2), [PROMPTS[0]])
    settings = adapters.SETTINGS.model_copy(update={"text_encoder": False})
    training = adapters.trainer(tmp_path, "sd1", settings, preview, steps=2, preview_every=1)
    weights = [p for encoder in training.denoiser.text_encoders for p in encoder.parameters()]
    assert {p.device.type for p in weights} == {"cpu"}
    training.train()
    assert (tmp_path / "previews/step-000002.png").is_file()
    assert {p.device.type for p in weights} == {"cpu"}
