"""What the tests of trainings share: what two trainings are compared by, and several processes."""

import os
import subprocess
from pathlib import Path

import torch

from services import free_ports
from tests import warm

ROOT = Path(__file__).parents[2]


def state(module):
    """Return a copy of a module's weights."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def losses_of(history):
    times = ("timestamp", "seconds")
    return [{name: value for name, value in record.items() if name not in times} for record in history]


def resume(trainer, folder, **options):
    """Train four steps at once, and two and two: the same bits; return the history."""
    options = {"steps": 4, "checkpoint_every": 2, **options}
    whole = trainer(folder / "whole", **options)
    undisturbed = whole.train()
    cut = {**options, "latents": folder / "latents"}
    trainer(folder / "cut", **{**cut, "steps": 2}).train()
    second = trainer(folder / "cut", **cut)  # the latents are those of the first
    assert losses_of(second.train()) == losses_of(undisturbed)
    assert same(state(whole.denoiser.network), state(second.denoiser.network))
    return undisturbed


def launch(code, *arguments, processes=2):
    """Run Python code in processes that train together on this machine."""
    together = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [_start(code, *arguments, **(together | rank if processes > 1 else {})) for rank in ranks]
    try:
        said = [process.communicate(timeout=150)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)[-4000:]


def _start(code, *arguments, **variables):
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [warm.python(), "-c", code, *map(str, arguments)],
        env={**os.environ, **own, **variables},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
