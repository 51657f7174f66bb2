"""Damaged training states, candidates, samples and caches."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainstudio.config import SampleSettings
from domainstudio.data import ImageSet
from domainstudio.data.image_set import IMAGES, MANIFEST
from domainstudio.metrics.features import extract
from domainstudio.sampling import load_samples, sample_to_folder
from domainstudio.storage import candidates, checkpoint
from domainstudio.training.examples import Examples
from domainstudio.training.latents import encode_all
from domainstudio.training.objective import Objective
from domainstudio.training.trainer import Trainer
from tests.faults.cases import WrongError
from tests.faults.damage import damaged
from tests.models import (
    PLAIN,
    Averages,
    image_set,
    tiny_denoiser,
    tiny_images,
    tiny_latent_denoiser,
    training_settings,
)

VALUES: tuple[Any, ...] = (None, True, -1, 0.5, 10**30, "x", [], {}, [[]], {"tensor": "x"}, {"items": 3})


class DamagedStates:
    """A training goes on from the newest state that is whole, and says which is not."""

    name, weight = "states", 6.0

    def __init__(self, folder: Path) -> None:
        examples = Examples.unconditional(tiny_images())
        settings = training_settings(steps=4, candidate_every=4)
        self.folder = folder / "states"
        self.trainer = Trainer(Objective(tiny_denoiser(), PLAIN), examples, settings, self.folder)
        self.trainer.train()
        self.states = {int(path.name[5:]): checkpoint._read(path)[1] for path in self.folder.glob("step-*")}
        self.candidate = candidates.listed(self.folder)[4]
        self.weights = candidates.read(self.candidate)

    def case(self, rng: random.Random) -> str:
        if rng.random() < 0.2:
            return _restored(self.candidate, rng, damaged, self._candidate)
        newest = self.folder / f"step-{max(self.states):07d}"
        path = newest / rng.choice([checkpoint.TENSORS, checkpoint.CONTENT])
        way = _mistaken if path.name == checkpoint.CONTENT and rng.random() < 0.5 else damaged
        return _restored(path, rng, way, self._latest)

    def _latest(self) -> str:
        found = checkpoint.latest(self.folder, self.trainer._check)
        if found is None:
            raise WrongError("none of two states is taken, and one is whole")
        step, state = found
        if not _equal(state, self.states[step]):
            raise WrongError(f"the state of step {step} is another one")
        return "unharmed" if step == max(self.states) else "the one before"

    def _candidate(self) -> str:
        if not _equal(candidates.read(self.candidate), self.weights):
            raise WrongError("the candidate is another one")
        return "unharmed"


class DamagedCaches:
    """What can be made again is made again when it is damaged: features, latents, images of samples."""

    name, weight = "caches", 4.0

    def __init__(self, folder: Path) -> None:
        self.images = tiny_images(4)
        self.features, self.latents = folder / "features", folder / "latents"
        self.samples = folder / "samples"
        self.encoder, self.denoiser = tiny_latent_denoiser(), tiny_denoiser()
        self.pixels = torch.from_numpy(tiny_images(2, side=16))
        self.settings = SampleSettings(number=2, steps=1, batch_size=1)
        self.made = [made() for made, _ in self._parts()]

    def case(self, rng: random.Random) -> str:
        index = rng.randrange(3)
        make, files = self._parts()[index]
        path = rng.choice(sorted(files()))

        def again() -> str:
            if not _equal(make(), self.made[index]):
                raise WrongError(f"{path.parent.name}: something else is read")
            return "made again" if path.read_bytes() else "unharmed"

        return _restored(path, rng, damaged, again)

    def _parts(self) -> list[tuple[Callable[[], Any], Callable[[], list[Path]]]]:
        return [
            (self._features, lambda: list(self.features.iterdir())),
            (self._latents, lambda: list(self.latents.iterdir())),
            (self._samples, lambda: list((self.samples / "images").iterdir())),
        ]

    def _features(self) -> Any:
        found = extract(self.images, Averages(), cache_dir=self.features)
        return [torch.from_numpy(found.pooled), torch.from_numpy(found.perceptual)]

    def _latents(self) -> Any:
        return encode_all(self.encoder, self.pixels, True, self.latents)

    def _samples(self) -> Any:
        sample_to_folder(self.denoiser, self.samples, self.settings)
        return torch.from_numpy(np.array(load_samples(self.samples)))


class DamagedImageSets:
    """An image set has the pixels that were packed, or is refused; other captions DVC notices."""

    name, weight = "sets", 2.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "set"
        self.images = tiny_images(3)
        image_set(self.images, ["a house", "a tree", "a boat"]).save(self.folder)

    def case(self, rng: random.Random) -> str:
        path = rng.choice([self.folder / IMAGES, self.folder / MANIFEST])
        return _restored(path, rng, damaged, self._load)

    def _load(self) -> str:
        found = ImageSet.load(self.folder)
        if not np.array_equal(found.images, self.images):
            raise WrongError("other pixels")
        return "the same pixels"


def _restored(
    path: Path, rng: random.Random, way: Callable[[bytes, random.Random], bytes], then: Callable[[], str]
) -> str:
    """Damage a file, do something, and make the file whole again."""
    whole = path.read_bytes()
    path.write_bytes(way(whole, rng))
    try:
        return then()
    finally:
        path.write_bytes(whole)


def _mistaken(data: bytes, rng: random.Random) -> bytes:
    """Return a state's JSON with an entry missing or another, and the digest of what it says."""
    content = json.loads(data)
    while True:
        place: Any = content
        while True:  # at any depth
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.2:
                break
            place = place[key]
        if rng.random() < 0.4:
            del place[key]
        else:
            place[key] = rng.choice(VALUES)
        if "step" in content and "tree" in content and isinstance(content.get("sha256"), dict):
            text = json.dumps([content["step"], content["tree"]])
            content["sha256"][checkpoint.CONTENT] = hashlib.sha256(text.encode()).hexdigest()
        changed = json.dumps(content).encode()
        if changed != data:
            return changed


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        same = isinstance(found, Tensor) and found.dtype == expected.dtype and found.shape == expected.shape
        return same and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(_equal, found, expected))
    return bool(found == expected)
