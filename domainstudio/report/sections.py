"""The pictures of the report, arranged: rows that compare, and a section for each adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup
from PIL import ImageOps

from domainstudio.data import find_captions
from domainstudio.report import curves
from domainstudio.report.pictures import CRISP_BELOW, Picture, common_side, picture, sheet, strip
from domainstudio.report.reading import (
    Content,
    PackedImages,
    Pair,
    Results,
    Samples,
    Target,
    TradeoffPoint,
    open_image,
)
from domainstudio.report.selection import Choice, choice
from domainstudio.report.tables import number

COLUMNS = 10
GRID_COLUMNS, GRID_IMAGES = 8, 64
PAIRS = 12
PREVIEWS = 6
TRADEOFF_FIGURES = (
    ("kernel distance", "kid"),
    ("in the domain", "in_domain_share"),
    ("intra distance there", "intra_distance_in_domain"),
    ("attributes kept", "attributes_kept"),
    ("copies", "memorized_share"),
)
"""Figures beside the pictures of each combination, by name and key."""

SHARES = frozenset({"in_domain_share", "attributes_kept", "memorized_share"})
"""Those of them that are shown in percent."""


@dataclass(frozen=True)
class Tile:
    """A picture with its words; `picture` is `None` where there is none."""

    picture: Picture | None
    title: str
    memorized: bool = False


@dataclass(frozen=True)
class Strip:
    """A row of the comparison: ten pictures of one origin."""

    name: str
    detail: str
    slot: int | None
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Comparison:
    """The rows of one source and one target; tile j of all generated rows comes from `seeds[j]`."""

    source: str
    target: str
    seeds: tuple[int, ...]
    given: tuple[Strip, ...]
    generated: tuple[Strip, ...]

    @property
    def side(self) -> int:
        """Width of a column in CSS pixels."""
        strips = (*self.given, *self.generated)
        return common_side(tile.picture for item in strips for tile in item.tiles)

    @property
    def memorized(self) -> bool:
        """Whether any tile is marked as memorised."""
        return any(tile.memorized for item in self.generated for tile in item.tiles)

    @property
    def small(self) -> int:
        """The same on a phone: two thirds, a whole multiple again for pictures of 32 pixels."""
        return max(48, self.side * 2 // 3)


@dataclass(frozen=True)
class NearestPair:
    """A sample beside its nearest training image."""

    sample: Tile
    training: Tile
    distance: str
    memorized: bool
    mirrored: bool


@dataclass(frozen=True)
class Section:
    """All pictures of one adaptation."""

    results: Results
    slot: int
    grid: Picture | None
    shown: int
    pairs: tuple[NearestPair, ...]
    histogram: Markup | None
    attraction: tuple[tuple[Tile, int], ...]
    panels: tuple[tuple[str, str, Markup], ...]
    choice: Choice | None
    previews: tuple[tuple[int, Picture], ...]
    tradeoff: tuple[tuple[str, str, Picture], ...]
    """Words, figures and first samples of the model alone, and of each combination with its source model."""


def comparisons(content: Content, slots: Mapping[str, int]) -> list[Comparison]:
    """Arrange the rows of every pair of source and target; `slots` numbers the adaptations' colours."""
    groups: dict[tuple[str, str], list[Results]] = {}
    for item in content.results:
        groups.setdefault((item.adaptation.source, item.adaptation.target), []).append(item)
    return [_comparison(content, source, target, group, slots) for (source, target), group in groups.items()]


def _comparison(
    content: Content, source: str, target: str, group: Sequence[Results], slots: Mapping[str, int]
) -> Comparison:
    images, drawn = content.targets[target], content.sources[source]
    first = next((s for s in (drawn, *(item.samples for item in group)) if s is not None), None)
    seeds = tuple(first.seed(i) for i in range(min(COLUMNS, first.number))) if first else ()
    given = _real_strips(target, images)
    if own := _own_drawings(images.domain, first, len(seeds)):
        given.append(Strip("Real drawings of the subjects below", "kept from training or not", None, own))
    generated = [Strip(source, "the source model, before adaptation", None, _drawn(drawn, seeds))]
    for item in group:
        name, steps = item.adaptation.name, item.adaptation.training.steps
        tiles = _drawn(item.samples, seeds, item.memorized)
        detail = f"{item.adaptation.method} · {steps} steps"
        if item.adaptation.combine is not None:
            detail += f" · {item.adaptation.combine.title}"
        generated.append(Strip(name, detail, slots[name], tiles))
    return Comparison(source, target, seeds, tuple(given), tuple(generated))


def _real_strips(name: str, target: Target) -> list[Strip]:
    strips = []
    if target.shots is not None:
        number = target.shots.number
        some = f" ({COLUMNS} of {number})" if number > COLUMNS else ""
        title = f"{number} training image{'s' if number != 1 else ''}"
        tiles = _real(target.shots, range(min(COLUMNS, number)))
        strips.append(Strip(title, f"all that the adapted model sees of {name}{some}", None, tiles))
    if target.domain is not None and (unseen := target.unseen(COLUMNS)):
        tiles = _real(target.domain, unseen)
        strips.append(Strip("The real domain", "other images of it, kept from training", None, tiles))
    return strips


def _real(images: PackedImages, indices: Sequence[int]) -> tuple[Tile, ...]:
    return tuple(Tile(picture(images.image(i)), _title(images, i)) for i in indices)


def _own_drawings(domain: PackedImages | None, samples: Samples | None, number: int) -> tuple[Tile, ...]:
    """Return the domain's own drawing of each sample's subject, where it has them."""
    if domain is None or samples is None:
        return ()
    subjects = [samples.subject(i) for i in range(number)]
    known = find_captions(domain.records, subjects)
    if all(index is None for index in known):
        return ()
    pictures = [None if index is None else picture(domain.image(index)) for index in known]
    return tuple(map(Tile, pictures, subjects))


def _drawn(
    samples: Samples | None, seeds: Sequence[int], memorized: frozenset[int] = frozenset()
) -> tuple[Tile, ...]:
    tiles = []
    for seed in seeds:
        index = None if samples is None else samples.index_of_seed.get(seed)
        if samples is None or index is None:
            tiles.append(Tile(None, f"noise {seed}"))
        else:
            tiles.append(Tile(picture(samples.image(index)), samples.title(index), index in memorized))
    return tuple(tiles)


def _title(images: PackedImages, index: int) -> str:
    record = images.records[index]
    return record.caption or record.id


def section(content: Content, results: Results, slots: Mapping[str, int]) -> Section:
    """Arrange the pictures of one adaptation; `slots` numbers the adaptations' colours."""
    samples, shots = results.samples, content.targets[results.adaptation.target].shots
    slot, nearest = slots[results.adaptation.name], results.nearest
    shown = [samples.image(i) for i in range(min(GRID_IMAGES, samples.number))] if samples else []
    distances = [pair.distance for pair in nearest.pairs] if nearest else []
    previews = [(step, partial(open_image, path)) for step, path in results.previews]
    return Section(
        results=results,
        slot=slot,
        grid=sheet(shown, GRID_COLUMNS, side=560) if shown else None,
        shown=len(shown),
        pairs=_pairs(results, shots),
        histogram=curves.histogram(distances, nearest.threshold, slot) if nearest else None,
        attraction=_attraction(results, shots),
        panels=_panels(content, results, slots),
        choice=choice(results.selection, slot),
        previews=tuple(strip(previews, PREVIEWS)),
        tradeoff=tuple(_tradeoff(point) for point in results.tradeoff.points) if results.tradeoff else (),
    )


def _tradeoff(point: TradeoffPoint) -> tuple[str, str, Picture]:
    title = point.combination.title if point.combination else "the adapted model alone"
    figures = [_figure(point.scores, *figure) for figure in TRADEOFF_FIGURES]
    shown = ", ".join(figure for figure in figures if figure)
    image = open_image(point.images)
    crisp = image.height <= CRISP_BELOW + 2  # a row of tiles with a pixel around them
    return title, shown, picture(image, side=1000, limit=2000, crisp=crisp)


def _figure(scores: Mapping[str, Any], name: str, key: str) -> str:
    """Return a figure in words, with its interval where it has one; "" where it was not measured."""
    value, interval = number(scores, key), (scores.get("intervals") or {}).get(key)
    if value is None:
        return ""
    shown = "{:.0%}" if key in SHARES else "{:.3g}"
    between = f" ({shown} to {shown})".format(*interval) if interval else ""
    return f"{name} {shown.format(value)}{between}"


def _pairs(results: Results, shots: PackedImages | None) -> tuple[NearestPair, ...]:
    samples, nearest = results.samples, results.nearest
    if samples is None or nearest is None or shots is None:
        return ()
    pairs = [pair for pair in nearest.pairs if pair.sample < samples.number and pair.training < shots.number]
    return tuple(
        NearestPair(
            sample=_sample_tile(samples, pair),
            training=_training_tile(shots, pair),
            distance=f"{pair.distance:.3f}",
            memorized=pair.sample in results.memorized,
            mirrored=pair.mirrored,
        )
        for pair in pairs[:PAIRS]
    )


def _sample_tile(samples: Samples, pair: Pair) -> Tile:
    title = f"sample from noise {samples.seed(pair.sample)}"
    return Tile(picture(samples.image(pair.sample), side=64), title)


def _training_tile(shots: PackedImages, pair: Pair) -> Tile:
    image, title = shots.image(pair.training), _title(shots, pair.training)
    if pair.mirrored:
        return Tile(picture(ImageOps.mirror(image), side=64), f"training image, mirrored: {title}")
    return Tile(picture(image, side=64), f"training image: {title}")


def _attraction(results: Results, shots: PackedImages | None) -> tuple[tuple[Tile, int], ...]:
    """Each training image with the number of samples that are nearest to it."""
    if results.nearest is None or shots is None:
        return ()
    nearest = [pair.training for pair in results.nearest.pairs]
    counted = ((index, nearest.count(index)) for index in range(min(shots.number, 2 * COLUMNS)))
    return tuple((Tile(picture(shots.image(i), side=48), _title(shots, i)), count) for i, count in counted)


def _panels(
    content: Content, results: Results, slots: Mapping[str, int]
) -> tuple[tuple[str, str, Markup], ...]:
    weights = results.adaptation.weights.model_dump()
    details = {name: f"weight {weights[name]:g}" if name in weights else "" for name in results.terms}
    details |= {"total": "weighted sum, what is minimised", "grad_norm": "before clipping"}
    # One term is its own total, up to the weight.
    names = [*results.terms, *(("total",) if len(results.terms) > 1 else ()), "grad_norm"]
    panels = []
    for name in names:
        shown = _series(results, name, slots)
        others = [_series(item, name, slots) for item in content.results if item is not results]
        context = [item for item in others if item is not None] if name != "total" else []
        if shown is not None and (panel := curves.loss_panel(shown, context)) is not None:
            panels.append((name, details[name], panel))
    return tuple(panels)


def _series(results: Results, name: str, slots: Mapping[str, int]) -> curves.Series | None:
    if results.losses is None or name not in results.losses:
        return None
    return curves.Series(name, slots[results.adaptation.name], results.losses["step"], results.losses[name])
