"""Small trainings beside the main loop: steps, progress and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from domainstudio.storage import checkpoint
from domainstudio.training.resuming import check_fits, states_of


def run_steps(
    take_step: Callable[[int], float],
    parts: Mapping[str, Any],
    steps: int,
    folder: Path,
    *,
    every: int,
    name: str,
) -> None:
    """Take steps up to the last one, from the newest state in `folder` if there is one.

    Args:
        take_step: makes optimiser step number `step`, counted from 0, and returns the error before it.
        parts: all that a step changes: modules, optimisers, averages, by name.
        steps: optimiser steps.
        folder: for resumable states.
        every: steps between them.
        name: what is trained, for the progress bar.
    """
    step = 0
    if (found := checkpoint.latest(folder, lambda _, state: check_fits(state, parts))) is not None:
        step, state = found
        for part, value in parts.items():
            value.load_state_dict(state[part])
    with tqdm(total=steps, initial=step, unit="step", desc=f"train {name}") as progress:
        while step < steps:
            error = take_step(step)
            step += 1
            progress.update()
            if step % 10 == 0:
                progress.set_postfix({"error": f"{error:.4f}"})
            if step % every == 0 or step == steps:
                checkpoint.save(folder, step, states_of(parts))
