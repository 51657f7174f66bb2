"""The paired measure: how often a sample shows what the model was asked for.

Where the domain's own drawing of a subject is known, a model's sample of that subject can be laid beside it.
Keeping the subject means that of all real drawings its own is the nearest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from domainstudio.errors import DataError
from domainstudio.metrics.distances import Float64s, Floats, squared_distance_blocks
from domainstudio.metrics.metric import Figure

TOP = 5
"""How many of the nearest drawings count for `top_5`."""

TIE = 1e-9
"""Distances that differ by less than this share are the same: features are float32, sums of them rounded."""

FIGURES = (
    Figure(
        "top_1",
        "Subject kept",
        "higher",
        "Share of the samples that, of all real drawings of the domain, are nearest to that of their own "
        "subject. Subjects without a drawing, or that were trained on, do not count.",
        percent=True,
        chance="top_1_chance",
        part="paired",
    ),
    Figure(
        "top_5",
        "Subject among five",
        "higher",
        "The same, with their own subject's drawing among the five nearest.",
        percent=True,
        chance="top_5_chance",
        part="paired",
    ),
)

Counts = NDArray[np.intp]


@dataclass(frozen=True)
class SampleTexts:
    """The texts of a set of samples, one of each kind per sample.

    Attributes:
        subjects: What each sample is of, as the domain's captions name it; "" where that is not known.
        prompts: The prompt or label that it was drawn with; "" where there was none.
    """

    subjects: tuple[str, ...]
    prompts: tuple[str, ...]

    @classmethod
    def read(cls, entries: Iterable[Mapping[str, Any]]) -> Self:
        """Read the entries `images` of a samples folder's manifest; what an entry lacks becomes ""."""
        texts = [(str(entry.get("subject") or ""), str(entry.get("prompt") or "")) for entry in entries]
        return cls(tuple(subject for subject, _ in texts), tuple(prompt for _, prompt in texts))


@dataclass(frozen=True)
class Texts:
    """The texts that belong to the images of one evaluation, in the images' order.

    Attributes:
        samples: Those of the adapted model's samples.
        source: Those of the source model's samples.
        shots: Captions of the training images, "" where there is none.
        domain: Captions of the whole domain.
    """

    samples: SampleTexts
    source: SampleTexts
    shots: tuple[str, ...]
    domain: tuple[str, ...]


@dataclass(frozen=True)
class Retrieval:
    """How often a sample's own drawing is among the nearest; shares are None where no sample has one.

    Attributes:
        number: Samples that were measured.
        without_drawing: Samples left out as no drawing of their subject is known.
        trained: Samples left out as the model was trained on a drawing of their subject.
        drawings: Drawings that each sample was compared with.
        top_1: Share of samples whose own drawing is the nearest of all.
        top_1_chance: The same for samples that are equally near to every drawing: 1 / drawings, where
            each subject has one drawing.
        top_5: Share of samples whose own drawing is among the five nearest.
        top_5_chance: The same by chance, 5 / drawings.
        median_rank: Median rank of the own drawing; 1 is the nearest, half of `drawings` is chance.
    """

    number: int
    without_drawing: int
    trained: int
    drawings: int
    top_1: float | None = None
    top_1_chance: float | None = None
    top_5: float | None = None
    top_5_chance: float | None = None
    median_rank: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what is defined, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def drawing_names(images: Iterable[NDArray[np.uint8]], captions: Sequence[str]) -> list[frozenset[str]]:
    """Return every caption of each image: its own, and those of images that equal it pixel by pixel.

    Args:
        images: N images of any one shape.
        captions: Their captions, "" where there is none.
    """
    keys = [image.tobytes() for image in images]
    names: dict[bytes, set[str]] = {key: set() for key in keys}
    for key, caption in zip(keys, captions, strict=True):
        if caption:
            names[key].add(caption)
    return [frozenset(names[key]) for key in keys]


@dataclass(frozen=True, eq=False)
class Drawings:
    """The real drawings that samples are compared with.

    Attributes:
        rows: Perceptual features with shape (N, P), N ≥ 1.
        names: Names of each drawing (`drawing_names`).
        trained: Subjects that the model was trained on: copying would be rewarded, so they are left out.
    """

    rows: Floats
    names: Sequence[Collection[str]]
    trained: Collection[str] = ()


def retrieval(samples: Floats, subjects: Sequence[str], drawings: Drawings) -> Retrieval:
    """Rank each sample's own drawing among all drawings, by perceptual distance.

    A sample's own drawings are those that carry its subject as a name; where there are several, the nearest
    counts. Drawings at the same distance come in random order, and shares are expectations over it: features
    that see no difference score exactly what chance does.

    Args:
        samples: Perceptual features with shape (M, P).
        subjects: What each sample is of, M names; "" is unknown.
        drawings: The real drawings.

    Raises:
        DataError: there is no drawing, or names and images are not equally many.
    """
    rows, names = drawings.rows, drawings.names
    if not len(rows) or len(rows) != len(names) or len(samples) != len(subjects):
        raise DataError(
            f"pairs need a subject per sample and names per drawing, got {len(subjects)} for {len(samples)} "
            f"and {len(names)} for {len(rows)}"
        )
    own = _owners(names)
    known = [index for index, subject in enumerate(subjects) if subject in own]
    kept = [index for index in known if subjects[index] not in drawings.trained]
    found = Retrieval(
        number=len(kept),
        without_drawing=len(subjects) - len(known),
        trained=len(known) - len(kept),
        drawings=len(rows),
    )
    return replace(found, **_ranks(samples[kept], rows, [own[subjects[i]] for i in kept])) if kept else found


def _ranks(samples: Floats, drawings: Floats, places: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the ranks' figures of samples whose own drawings are at `places`."""
    standing = _standings(samples, drawings, places)
    number = np.array([len(place) for place in places])
    by_chance = (np.zeros_like(number), number, len(drawings) - number)
    return {
        "top_1": _share_within(1, *standing),
        "top_1_chance": _share_within(1, *by_chance),
        "top_5": _share_within(TOP, *standing),
        "top_5_chance": _share_within(TOP, *by_chance),
        "median_rank": _median_rank(*standing),
    }


def _owners(names: Sequence[Collection[str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, each in enumerate(names):
        for name in each:
            found.setdefault(name, []).append(index)
    return found


def _standings(
    samples: Floats, drawings: Floats, places: Sequence[Sequence[int]]
) -> tuple[Counts, Counts, Counts]:
    """Count what stands before and beside each sample's nearest own drawing.

    Returns:
        Other drawings that are nearer than it; own and other drawings that are as near, it included. Each has
        shape (M,).
    """
    nearer, own_tied, other_tied = (np.empty(len(samples), dtype=np.intp) for _ in range(3))
    for block, squared in squared_distance_blocks(samples, drawings):
        own = np.zeros(squared.shape, dtype=bool)
        for row, place in enumerate(places[block]):
            own[row, place] = True
        best: Float64s = np.where(own, squared, np.inf).min(axis=1, keepdims=True)
        near = squared < best * (1 - TIE)
        tied = ~near & (squared <= best * (1 + TIE))
        nearer[block] = near.sum(axis=1)
        own_tied[block] = (tied & own).sum(axis=1)
        other_tied[block] = (tied & ~own).sum(axis=1)
    return nearer, own_tied, other_tied


def _share_within(top: int, nearer: Counts, own: Counts, other: Counts) -> float:
    """Return the mean probability that an own drawing is among the first `top`.

    `nearer` others come first, then `own` and `other` drawings in random order. All of the next j places go
    to others with probability Π_{i<j} (other − i) / (own + other − i).
    """
    missed = np.ones(len(nearer))
    for place in range(top):
        left = np.maximum(own + other - place, 1)
        factor = np.maximum(other - place, 0) / left
        missed *= np.where(place < top - nearer, factor, 1)
    return float((1 - missed).mean())


def _median_rank(nearer: Counts, own: Counts, other: Counts) -> float:
    """Return the median of the first own drawing's expected rank, nearer + (own + other + 1) / (own + 1)."""
    return float(np.median(nearer + (own + other + 1) / (own + 1)))
