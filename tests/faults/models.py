"""Damaged model folders of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from domainstudio import models
from domainstudio.models.denoiser import Denoiser
from domainstudio.sampling import sample
from tests.faults.cases import WrongError
from tests.faults.damage import damaged
from tests.models import tiny_class_denoiser, tiny_denoiser, tiny_latent_denoiser, tiny_text_denoiser

KINDS: dict[str, Callable[[], Denoiser]] = {
    "pixel": tiny_denoiser,
    "class": tiny_class_denoiser,
    "latent": tiny_latent_denoiser,
    "text": tiny_text_denoiser,
}
CONDITIONS = {"class": ["face"], "text": ["a red house"]}


class DamagedModels:
    """A damaged model is refused, or draws what it drew; other finite weights no model folder can tell."""

    name, weight = "models", 9.0

    def __init__(self, folder: Path) -> None:
        self.folders = {name: folder / name for name in KINDS}
        for name, make in KINDS.items():
            make().save(self.folders[name])
        self.drawn = {name: self._draw(name) for name in KINDS}

    def case(self, rng: random.Random) -> str:
        name = rng.choice(list(KINDS))
        files = [path for path in sorted(self.folders[name].rglob("*")) if path.is_file()]
        path = rng.choice(files)
        whole = path.read_bytes()
        gone = rng.random() < 0.05 or not whole
        path.unlink() if gone else path.write_bytes(damaged(whole, rng))
        try:
            found = self._draw(name)
        finally:
            path.write_bytes(whole)
        if np.array_equal(found, self.drawn[name]):
            return "unharmed"
        if gone:
            raise WrongError(f"{path.name} is missing, and another picture is drawn")
        return "not shown by the format"

    def _draw(self, name: str) -> np.ndarray:
        return sample(models.load(self.folders[name]), [0], CONDITIONS.get(name), steps=1)
