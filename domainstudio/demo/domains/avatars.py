"""Faces that dicebear draws from a seed, in many artists' styles: as many as wanted, with known attributes.

A `.yaml` names the styles, how many faces of each, and what of them is fixed. The packages dicebear-core and
dicebear-styles draw them, the same from the same seed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from domainstudio.config.base import Section
from domainstudio.data.origins import Candidate, Listing
from domainstudio.demo.domains.drawing import INSTALL, rasterize_svg
from domainstudio.errors import DataError, MissingExtraError

OVERSAMPLING = 2
"""Faces are many and their shapes are plain: half of what emoji get is enough."""


class Faces(Section):
    """Faces of one style."""

    style: str = Field(pattern=r"^[a-z][a-z-]*$")
    """The style's name at dicebear."""
    number: int = Field(ge=1)
    """How many."""
    seeds: str | None = None
    """What the seeds begin with; the face's number follows. By default the style's name. Domains of the same
    style show other faces where this differs."""
    options: Mapping[str, Any] = Field(default_factory=dict)
    """dicebear's options: which variants of a part may appear (`topVariant: [...]`), and how often it is
    there at all (`accessoriesProbability: 30`, in percent)."""


class FaceDomain(Section):
    """A demo domain of drawn faces."""

    title: str
    """What the domain shows."""
    faces: tuple[Faces, ...] = Field(min_length=1)
    """The styles, in this order."""
    attributes: Mapping[str, str] = Field(default_factory=dict)
    """What is known of every face: attribute → dicebear's option that decides it (`hair: topVariant`)."""

    @model_validator(mode="after")
    def _faces_differ(self) -> Self:
        seeds = [faces.seeds or faces.style for faces in self.faces]
        if repeated := [seed for seed in seeds if seeds.count(seed) > 1]:
            raise ValueError(f"two styles have the seeds {repeated[0]!r}: give one of them other `seeds`")
        return self


def list_faces(domain: FaceDomain, path: Path) -> Listing:
    """List the faces of a demo domain; they are drawn when they are read.

    Args:
        domain: What its `.yaml` says.
        path: That file.

    Raises:
        DataError: dicebear has no such style, or the style no such option or variant.
        MissingExtraError: dicebear is not installed.
    """
    licences = {faces.style: _licence(faces.style, path) for faces in domain.faces}
    for faces in domain.faces:
        _check(faces, domain.attributes, path)
    return Listing(
        tuple(candidate for faces in domain.faces for candidate in _candidates(faces, domain.attributes)),
        licence="; ".join(dict.fromkeys(licence["name"] for licence in licences.values())),
        attribution="; ".join(licence["text"] for licence in licences.values()),
        keep_repeats=True,  # drawn at random, two faces may be alike
    )


def _check(faces: Faces, attributes: Mapping[str, str], path: Path) -> None:
    """Refuse what dicebear would pass over in silence: options and variants that the style does not have."""
    from dicebear import Avatar, OptionsDescriptor, ValidationError

    known = OptionsDescriptor(_style(faces.style)).to_json()
    where = f"{path}: style {faces.style}"
    for option in (*faces.options, *attributes.values()):
        if option not in known:
            raise DataError(f"{where} has no option {option!r}; there are {', '.join(sorted(known))}")
    for option, value in faces.options.items():
        asked = value if isinstance(value, list | dict) else [value]
        variants = () if known[option].get("open") else known[option].get("values", ())
        if variants and (wrong := [each for each in asked if each not in variants]):
            raise DataError(f"{where}: {option} has no {wrong[0]!r}; there are {', '.join(variants)}")
    try:
        Avatar(_style(faces.style), {"seed": "", **faces.options})
    except ValidationError as error:
        raise DataError(f"{where}: {error}") from error


def _candidates(faces: Faces, attributes: Mapping[str, str]) -> Iterator[Candidate]:
    options = json.dumps(dict(faces.options), sort_keys=True)
    for number in range(faces.number):
        seed = f"{faces.seeds or faces.style}-{number:05d}"
        yield Candidate(
            id=seed,
            origin=f"dicebear/{faces.style}/{seed}",
            read=partial(_svg, faces.style, seed, options),
            rasterize=partial(rasterize_svg, oversampling=OVERSAMPLING),
            attributes=partial(_attributes, faces.style, seed, options, tuple(attributes.items())),
        )


def _svg(style: str, seed: str, options: str) -> bytes:
    return str(_draw(style, seed, options)["svg"]).encode()


def _attributes(style: str, seed: str, options: str, names: tuple[tuple[str, str], ...]) -> dict[str, str]:
    chosen = _draw(style, seed, options)["options"]
    values = {name: chosen.get(option) or "none" for name, option in names}
    return {name: value[0] if isinstance(value, list) else str(value) for name, value in values.items()}


@lru_cache(maxsize=8)  # a face is asked for its drawing, then for its attributes
def _draw(style: str, seed: str, options: str) -> dict[str, Any]:
    """Return the drawing and what was chosen for it."""
    from dicebear import Avatar

    drawn: dict[str, Any] = Avatar(_style(style), {"seed": seed, **json.loads(options)}).to_json()
    return drawn


@cache
def _style(name: str) -> Any:
    from dicebear import Style

    return Style(_definition(name))


def _licence(style: str, path: Path) -> dict[str, str]:
    try:
        licence: dict[str, str] = _definition(style)["meta"]["license"]
    except FileNotFoundError as error:
        raise DataError(f"{path}: dicebear has no style {style!r}: correct `style`") from error
    return licence


@cache
def _definition(style: str) -> dict[str, Any]:
    if not (importlib.util.find_spec("dicebear") and (found := importlib.util.find_spec("dicebear_styles"))):
        raise MissingExtraError(
            f"dicebear-core and dicebear-styles, which draw the demo's faces, are not installed. {INSTALL}"
        )
    folder = Path(next(iter(found.submodule_search_locations or ())))
    definition: dict[str, Any] = json.loads((folder / f"{style}.json").read_text(encoding="utf-8"))
    return definition
