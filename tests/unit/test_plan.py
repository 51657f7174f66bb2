"""A step's plan on fake tensors: its parts, its memory against a real one's, sizes of published models."""

import gc
import os
import subprocess
import sys
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import plan, published
from benchmarks.cost import Cost
from domainstudio.training.decoders import one_by_one
from domainstudio.training.examples import Examples
from domainstudio.training.objective import Objective
from domainstudio.training.trainer import Trainer
from tests.models import DOMAINSTUDIO, tiny_text_denoiser, training_settings

BILLIONS = {"sd15": 0.86, "sdxl": 2.6, "sd35-medium": 2.5, "flux2-klein": 4, "z-image": 6, "qwen-image": 20.4}
"""As they are published; of SD 3.5 with its table of positions."""

BATCH, SIDE = 4, 64


@pytest.mark.parametrize("model", BILLIONS)
def test_networks_have_the_published_sizes(model):
    with torch.device("meta"):
        network, vae = published.denoiser(model), published.vae(model)
    found = sum(value.numel() for value in network.state_dict().values())
    assert found == pytest.approx(BILLIONS[model] * 1e9, rel=0.04)
    of_videos = model == "qwen-image"
    assert sum(p.numel() for p in vae.parameters()) == pytest.approx(127e6 if of_videos else 84e6, rel=0.01)


def a_step(folder, checkpointing):
    """Return a trainer of the tiny text model, whose terms decode with the whole VAE, and its objective."""
    denoiser = tiny_text_denoiser()
    denoiser.pipeline.unet.register_to_config(sample_size=SIDE // 2)
    weights = DOMAINSTUDIO.model_copy(update={"decoder": "full"})
    objective = Objective(denoiser, weights, denoiser.frozen_source(), one_by_one(denoiser.decode))
    settings = training_settings(batch_size=BATCH, gradient_checkpointing=checkpointing, ema_decay=0)
    hidden = torch.zeros(BATCH, 1, 16, 16)
    images = torch.zeros(BATCH, 3, SIDE, SIDE, dtype=torch.uint8)
    examples = Examples(images, {"encoder_hidden_states": hidden}, {"encoder_hidden_states": hidden})
    return Trainer(objective, examples, settings, folder)


def allocated(profiled):
    """Return the most bytes that were allocated at once, beyond those at the start, by the profiler."""
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))


def real_peak(folder, checkpointing):
    """Take a real step, and return the most bytes that it allocated at once."""
    real = a_step(folder, checkpointing)
    plan.fill_state(real.optimizer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        real.take_step()
    return allocated(profiled)


def real_peak_without_avx512(folder, checkpointing):
    """Return the same of a process in which convolutions allocate no copies of their own for AVX-512."""
    code = f"from tests.unit.test_plan import real_peak; print(real_peak({str(folder)!r}, {checkpointing}))"
    command = [sys.executable, "-c", code]
    return int(subprocess.check_output(command, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_planned_peak_is_that_of_a_real_step(tmp_path, checkpointing):
    cost = Cost()
    with plan.fake(cost):
        planned = a_step(tmp_path, checkpointing)
        plan.fill_state(planned.optimizer)
        gc.collect()
        cost.restart()
        rest = cost.peak
        planned.take_step()
    assert cost.peak - rest == pytest.approx(real_peak_without_avx512(tmp_path, checkpointing), rel=0.05)
    assert cost.peak - rest == pytest.approx(real_peak(tmp_path, checkpointing), rel=0.08)
