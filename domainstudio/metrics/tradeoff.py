"""Nearness against variety: an adapted model measured with more and less part of its source model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio.metrics.measure import measure_folders
from domainstudio.models.stored import StoredModel, Together
from domainstudio.project import ADAPTED_MODELS, CHECKPOINTS, SOURCE_IMAGES, TARGETS
from domainstudio.sampling.pairs import sample_adapted_stored, sample_source

if TYPE_CHECKING:
    from domainstudio.config import Adaptation, Combination, Settings

WORK = CHECKPOINTS / "tradeoff"
"""Samples of every point, so that an interrupted stage goes on, and a further value draws its own only."""


@dataclass(frozen=True)
class Measurement:
    """One way of drawing, measured.

    Attributes:
        combination: how the source model takes part; `None` is the adapted model alone.
        samples: the folder of what was drawn.
        metrics: what `measure_folders` found.
    """

    combination: Combination | None
    samples: Path
    metrics: dict[str, Any]

    def to_json(self, images: str) -> dict[str, Any]:
        """Return the point's entry of `tradeoff.json`; `images` is the file of its first samples."""
        part = {} if self.combination is None else {"combine": self.combination.model_dump(mode="json")}
        kept = self.metrics.get("attributes", {}).get("samples", {})
        return {**part, "images": images, "scores": {**kept, **self.metrics["samples"]}}


def measure_tradeoff(adaptation: Adaptation, settings: Settings) -> Iterator[Measurement]:
    """Draw and measure an adapted model alone, then in every combination of `tradeoff`.

    All are drawn from the same noise, and measured against the same images. Samples that are there from an
    earlier call are not drawn again.

    Args:
        adaptation: the adaptation. Its own `combine` does not matter here.
        settings: all settings.

    Raises:
        CheckpointError: a model is missing.
        DataError: images are missing or damaged.
    """
    scoped = settings.model_copy(update={"sample": settings.tradeoff.sampling(settings.sample)})
    source, target = sample_source(scoped, adaptation.source, WORK), TARGETS / adaptation.target
    memo: dict[Any, Any] = {}
    for combination in (None, *settings.tradeoff.combinations):
        together = Together.of(adaptation.model_copy(update={"combine": combination}))
        stored = StoredModel(ADAPTED_MODELS / adaptation.name, together)
        samples = sample_adapted_stored(stored, adaptation, scoped, WORK)
        metrics, _ = measure_folders(
            samples,
            source,
            target,
            settings.evaluate,
            source_images=SOURCE_IMAGES / adaptation.source,
            memo=memo,
        )
        yield Measurement(combination, samples, metrics)
