"""Draws and measures candidates, and chooses one. Each step of it is kept, so that it can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from domainstudio.metrics.features import FEATURES, Features, extract
from domainstudio.metrics.garbage import garbage
from domainstudio.metrics.networks import load_network
from domainstudio.sampling import load_samples, sample_to_folder
from domainstudio.selection.figures import Curve, Yardstick
from domainstudio.selection.record import Measured, Selection
from domainstudio.selection.rule import choose
from domainstudio.storage.checkpoint import run_key

if TYPE_CHECKING:
    from domainstudio.config import ChooseSettings, SampleSettings
    from domainstudio.models.denoiser import Denoiser
    from domainstudio.sampling import Images

SOURCE = "source"
"""The name of the source model's samples."""


@dataclass(frozen=True)
class Candidate:
    """A state of the model that may become the result.

    Attributes:
        step: Optimiser steps of its training; what orders candidates.
        name: What to call it: a folder's name.
        digest: Hash of all that decides its weights.
        load: Returns the model, on its device. The next candidate may change it in place.
    """

    step: int
    name: str
    digest: str
    load: Callable[[], Denoiser]


@dataclass(frozen=True)
class Chooser:
    """Chooses among candidates by the training images and a few samples of each.

    Attributes:
        shots: The training images, uint8 with shape (N, 3, H, W).
        rule: Number of samples, and the rule.
        sampling: How they are drawn, beside their number, steps and seed.
        features: The network that measures, by its name (`evaluate.features`).
        folder: Where samples are kept.
        mirrored: Whether mirrored copies count too.
        cache: Folder that keeps features.
    """

    shots: Images
    rule: ChooseSettings
    sampling: SampleSettings
    features: str
    folder: Path
    mirrored: bool = False
    cache: Path = FEATURES

    @cached_property
    def drawn(self) -> SampleSettings:
        """How samples of candidates are drawn."""
        changes = {name: getattr(self.rule, name) for name in ("number", "steps", "seed")}
        return self.sampling.model_copy(update=changes)

    def draw(self, candidate: Candidate, conditions: Sequence[str] | None) -> Path:
        """Draw a candidate's samples unless they are there, and return their folder.

        Args:
            candidate: The candidate, or the source model.
            conditions: Its prompts or classes, which the samples take in turn.
        """
        params = {"sample": self.drawn.model_dump(mode="json"), "told": conditions}
        folder = self.folder / f"{candidate.name}-{run_key(params, {'model': candidate.digest})[:16]}"
        if not (folder / "manifest.json").is_file():
            denoiser = candidate.load()
            sample_to_folder(denoiser, folder, self.drawn, conditions, model=candidate.name)
        return folder

    def choose(self, source: Path, candidates: Sequence[tuple[Candidate, Path]]) -> Selection:
        """Measure drawn candidates and choose one.

        Args:
            source: Folder of the source model's samples.
            candidates: Each candidate with its folder of samples.

        Raises:
            DataError: there are too few training images, or samples are damaged.
        """
        yardstick = self._yardstick(source)
        curves: dict[int, Curve] = {}
        for candidate, folder in candidates:
            curves[candidate.step] = yardstick.measure(self._encode(load_samples(folder)))
        choice = choose(curves, self.rule)
        measured = [
            Measured.of(candidate.step, candidate.name, curves[candidate.step], choice)
            for candidate, _ in candidates
        ]
        return Selection.of(choice, self.rule, yardstick, self.features, measured)

    def _yardstick(self, source: Path) -> Yardstick:
        mirrored = self._encode(self.shots[..., ::-1]) if self.mirrored else None
        shots, drawn = self._encode(self.shots), self._encode(load_samples(source))
        nothing = self._encode(garbage(self.shots, self.rule.seed))
        return Yardstick(shots, drawn, mirrored, self.rule.copy_distance, self.rule.seed, nothing)

    def _encode(self, images: Images) -> Features:
        return extract(np.ascontiguousarray(images), load_network(self.features), cache_dir=self.cache)
