"""Random generators named by what they are for, so that a resumed run repeats an undisturbed one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


def generator(*key: int) -> torch.Generator:
    """Return a CPU generator seeded by a key such as (seed, rank, step); the same key, the same draws."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def initial_noise(generators: list[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """Draw x_T from each image's own CPU generator, with shape (len(generators), C, H, W).

    Drawn on the CPU as diffusers' pipelines do for a list of generators, so the same seed gives the same
    picture there, on every device and in every model of the same shape.
    """
    return torch.cat([torch.randn((1, *shape), generator=each) for each in generators])
