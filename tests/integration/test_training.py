"""The training loop on a tiny real model: learning, resuming, refusing, several processes."""

import json
import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

from domainstudio.errors import TrainingError
from domainstudio.storage import checkpoint
from domainstudio.training.examples import Examples
from domainstudio.training.objective import Objective
from domainstudio.training.trainer import Trainer
from tests import warm
from tests.integration.training_parts import ROOT, launch, same, state
from tests.models import DOMAINSTUDIO, PLAIN, tiny_denoiser, tiny_images, training_settings


class Recorder:
    """A tracker that keeps what it is given."""

    def __init__(self):
        self.records, self.images = [], []

    def log_history(self, records):
        self.records.extend(dict(record) for record in records)

    def log_image(self, image, name):
        self.images.append((name, image.size))


def trainer(folder, weights=DOMAINSTUDIO, tracker=None, **values):
    settings = training_settings(**values)
    source = tiny_denoiser(0).frozen_source() if weights.pairwise else None
    examples = Examples.unconditional(tiny_images())
    return Trainer(Objective(tiny_denoiser(0), weights, source), examples, settings, folder, tracker=tracker)


def test_training_lowers_the_denoising_error(tmp_path):
    history = trainer(tmp_path, PLAIN, steps=120, learning_rate=3e-3, checkpoint_every=1000).train()
    values = [record["simple"] for record in history]
    assert np.mean(values[-20:]) < 0.8 * np.mean(values[:20])


def test_every_term_is_logged_unweighted_at_every_step(tmp_path):
    tracker = Recorder()
    history = trainer(tmp_path, tracker=tracker).train()
    assert [record["step"] for record in tracker.records] == [1, 2, 3, 4, 5, 6]
    record = history[-1]
    total = record["simple"] + 0.5 * record["image"] + 0.5 * record["high_frequency"]
    assert record["total"] == pytest.approx(total + 0.05 * record["high_frequency_mse"], rel=1e-5)
    assert {"learning_rate", "grad_norm", "timestamp", "seconds"} <= set(record)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "mixed_precision": "bf16"}])
def test_resumed_is_bit_identical_to_undisturbed(tmp_path, changes):
    whole = trainer(tmp_path / "whole", **changes)
    whole.train()
    first = trainer(tmp_path / "cut", **changes)
    steps = iter(range(5))
    step = first.take_step

    def interrupted():
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step()

    first.take_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.train()
    tracker = Recorder()
    second = trainer(tmp_path / "cut", tracker=tracker, **changes)
    history = second.train()
    assert same(state(whole.denoiser.network), state(second.denoiser.network))
    assert [record["step"] for record in history] == [1, 2, 3, 4, 5, 6]


def test_the_tracker_is_never_ahead_of_the_last_checkpoint(tmp_path):
    class Checking(Recorder):
        def log_history(self, records):
            super().log_history(records)
            found = checkpoint.latest(tmp_path)
            assert found is not None and records[-1]["step"] == found[0]

    tracker = Checking()
    trainer(tmp_path, tracker=tracker, steps=5).train()
    assert [record["step"] for record in tracker.records] == [1, 2, 3, 4, 5]


def spoil(state, *keys, value=None):
    """Change one entry of a state's content, or delete it."""
    for key in keys[:-1]:
        state = state[key]
    if value is None:
        del state[keys[-1]]
    else:
        state[keys[-1]] = value


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("network", "conv_in.bias"), None, r"network: conv_in\.bias is missing"),
        (("network", "conv_in.bias"), torch.ones(3), r"network\.conv_in\.bias is float32 \[3\]"),
        (("optimizer", "state", 0, "exp_avg"), torch.ones(3), "moments of parameter 0 do not fit"),
        (("optimizer", "param_groups", 0, "lr"), "x", r"optimizer\.param_groups\.0\.lr is str"),
        (("lr_scheduler",), None, "lr_scheduler is missing"),
        (("ema", "shadow_params"), [], "ema.shadow_params has 0 entries"),
        (("history", 1), None, "history is not that of 2 steps"),
        (("history", 0, "total"), "x", r"history\.0\.total is str"),
    ],
)
def test_a_whole_but_wrong_state_is_passed_over(tmp_path, keys, value, said, caplog):
    whole = trainer(tmp_path, steps=2, checkpoint_every=1)
    whole.train()
    step, state = checkpoint.latest(tmp_path) or (0, {})
    spoil(state, *keys, value=value)
    checkpoint.save(tmp_path, step, state)
    second = trainer(tmp_path, steps=2, checkpoint_every=1)
    second.train()
    assert re.search(f"step-0000002 is damaged .*{said}", caplog.text)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, second.parameters, strict=True))


def test_gradient_accumulation_averages_the_micro_batches(tmp_path):
    def gradients(**settings):
        training = trainer(tmp_path, PLAIN, steps=1, **settings)
        yield training
        for micro in range(settings.get("gradient_accumulation_steps", 1)):
            training._micro_step(micro)
        yield [p.grad.clone() for p in training.parameters]

    _, accumulated = gradients(gradient_accumulation_steps=2)
    training, first = gradients()
    training.optimizer.zero_grad()
    training._micro_step(1)
    for both, one, other in zip(accumulated, first, training.parameters, strict=True):
        torch.testing.assert_close(both, (one + other.grad) / 2)


def test_a_batch_holds_every_image_once_where_it_can(tmp_path):
    training = trainer(tmp_path, batch_size=6)
    images = (training._batch(0, torch.Generator()).images + 1) * 127.5
    found = {tuple(image.round().to(torch.uint8).flatten().tolist()) for image in images}
    assert found == {tuple(image.ravel().tolist()) for image in tiny_images()}


def test_a_loss_that_is_not_finite_never_reaches_the_weights(tmp_path):
    training = trainer(tmp_path, PLAIN)
    before = state(training.denoiser.network)
    training.objective.weights = PLAIN.model_copy(update={"simple": float("inf")})
    with pytest.raises(TrainingError, match=r"'total' is inf at step 1.*Lower learning_rate"):
        training.train()
    assert same(before, state(training.denoiser.network))


def test_a_state_beyond_the_last_step_is_refused(tmp_path):
    trainer(tmp_path, steps=4).train()
    with pytest.raises(TrainingError, match=r"is at step 4, beyond the 2 asked for.*Delete"):
        trainer(tmp_path, steps=2).train()


@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [
        (torch.float32, 16, r"16x16 pixels and the model 8x8.*prepare.resolution"),
        (torch.float16, 8, "must be float32"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, dtype, size, message):
    model = tiny_denoiser()
    model.network.to(dtype)
    examples = Examples.unconditional(np.zeros((4, 3, size, size), np.uint8))
    with pytest.raises(TrainingError, match=message):
        Trainer(Objective(model, PLAIN), examples, training_settings(), tmp_path)


def test_previews_are_kept_and_do_not_change_the_training(tmp_path):
    from domainstudio.config import SampleSettings
    from domainstudio.training.previews import previewer

    tracker = Recorder()
    with_previews = trainer(tmp_path / "a", tracker=tracker, preview_every=3)
    with_previews.preview = previewer(SampleSettings(number=4, steps=2), number=4)
    with_previews.train()
    without = trainer(tmp_path / "b")
    without.train()
    assert [name for name, _ in tracker.images] == ["previews/step-000003.png", "previews/step-000006.png"]
    assert (tmp_path / "a/previews/step-000006.png").is_file()
    assert same(state(with_previews.denoiser.network), state(without.denoiser.network))


KILLED = """
import sys
from pathlib import Path
from tests.integration.test_training import trainer
import torch
training = trainer(Path(sys.argv[1]), steps=40, checkpoint_every=4)
training.train()
torch.save(training.denoiser.network.state_dict(), sys.argv[2])
"""


def run_killed(folder, weights, kill_at=None):
    process = subprocess.Popen([warm.python(), "-c", KILLED, folder, weights], cwd=ROOT)
    while process.poll() is None and kill_at is not None:
        if list(folder.glob(f"step-*{kill_at}")):
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)
    return process.wait()


def test_killed_and_started_again_is_bit_identical(tmp_path):
    assert run_killed(tmp_path / "a", tmp_path / "a.pt") == 0
    assert run_killed(tmp_path / "b", tmp_path / "b.pt", kill_at=12) == -signal.SIGKILL
    assert run_killed(tmp_path / "b", tmp_path / "b.pt") == 0
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert same(first, second)


PROCESSES = """
import json, sys
from pathlib import Path
from tests.integration.test_training import trainer
training = trainer(Path(sys.argv[1]), steps=1, batch_size=3)
import torch
from domainstudio.training.objective import NoisyBatch
g = torch.Generator().manual_seed(0)
noise, t = torch.randn((6, 3, 8, 8), generator=g), torch.tensor([10, 200, 400, 500, 700, 900])
rank, world = training.accelerator.process_index, training.accelerator.num_processes
mine = slice(rank * 3, rank * 3 + 3) if world > 1 else slice(0, 6)
images = (torch.rand((6, 3, 8, 8), generator=g) * 2 - 1)[mine]
xt = training.denoiser.schedule.add_noise(images, noise[mine], t[mine])
with torch.no_grad():
    for p in training.parameters:
        p.add_(torch.randn(p.shape, generator=g) * 0.05)
terms = training.objective(NoisyBatch(images, images, {}, {}, noise[mine], t[mine], xt))
training.accelerator.backward(training.objective.total(terms))
if training.accelerator.is_main_process:
    result = {
        "image": terms["image"].item(),
        "high_frequency": terms["high_frequency"].item(),
        "gradient": [p.grad.double().norm().item() for p in training.parameters if p.grad is not None],
    }
    Path(sys.argv[2]).write_text(json.dumps(result))
"""


def test_pairs_are_formed_over_the_batch_of_all_processes(tmp_path):
    """Two processes of three images have the losses and gradients of one process with the six."""
    for number, name in (1, "one"), (2, "two"):
        launch(PROCESSES, tmp_path / name, tmp_path / f"{name}.json", processes=number)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["image"] > 1e-4
    assert two["image"] == pytest.approx(one["image"], rel=1e-4)
    assert two["high_frequency"] == pytest.approx(one["high_frequency"], rel=1e-4)
    assert two["gradient"] == pytest.approx(one["gradient"], rel=1e-3, abs=1e-7)
