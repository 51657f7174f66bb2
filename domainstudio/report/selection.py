"""The choice of a checkpoint: the candidates' figures and their pictures, in columns of one noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from domainstudio.report import curves
from domainstudio.report.pictures import Picture, picture
from domainstudio.report.reading import open_image, read_selection
from domainstudio.report.templating import template

FIGURES = (
    ("fidelity", "how much of the way from the source model to the training images is done"),
    ("diversity", "how far apart samples of the domain are; about 0.75 is what real images have"),
    ("copies", "share of the samples that are copies of a training image"),
    ("in_domain", "share of the samples that a probe puts into the domain"),
)
"""Keys of a candidate's figures, and what they say."""

ROW = 720
"""Width of a row of pictures on the page, in CSS pixels."""


@dataclass(frozen=True)
class Row:
    """The first samples of a candidate, or of the source model."""

    title: str
    detail: str
    picture: Picture | None
    chosen: bool = False


@dataclass(frozen=True)
class Choice:
    """What the report shows of a choice."""

    chosen: str
    number: int
    why: str
    warning: str | None
    samples: int
    steps: int
    copies_below: float
    false_alarms: float
    probe_accuracy: float
    panels: tuple[tuple[str, str, Markup], ...]
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    """Why files were left out."""


def choice(folder: Path, slot: int = 0) -> Choice | None:
    """Arrange the record in a folder that a choice has written; None where there is none.

    Args:
        folder: with `selection.json` and a picture of each candidate.
        slot: number of the colour.

    Raises:
        DataError: the record cannot be understood.
    """
    values = read_selection(folder)
    if values is None:
        return None
    candidates, rule = values["candidates"], values["rule"]
    rows = [Row("source model", "before training", _pictures(folder, "source"))]
    rows += [_row(folder, each, values["chosen"]) for each in candidates]
    return Choice(
        chosen=next(row.title for row in rows if row.chosen),
        number=len(candidates),
        why=values["why"],
        warning=values["warning"],
        samples=rule["number"],
        steps=rule["steps"],
        copies_below=values["copies_below"],
        false_alarms=values["false_alarms"],
        probe_accuracy=values["probe_accuracy"],
        panels=_panels(values, slot),
        rows=tuple(rows),
        left_out=tuple((values.get("left_out") or {}).values()),
    )


def page(folder: Path, title: str) -> str:
    """Return a page of a choice alone: every picture inside, no request to anywhere.

    Args:
        folder: with `selection.json` and a picture of each candidate.
        title: the page's heading.

    Raises:
        DataError: the record cannot be understood.
    """
    shots = _pictures(folder, "shots")
    return template("choice_page.html.j2").render(title=title, choice=choice(folder), shots=shots, columns=10)


def _row(folder: Path, candidate: Mapping[str, Any], chosen: int) -> Row:
    words = {"fidelity": "fidelity", "diversity": "diversity", "copies": "copies"}
    known = [(word, candidate[key]["value"]) for key, word in words.items()]
    detail = " · ".join(f"{word} {value:.2f}" for word, value in known if value is not None)
    name, step = candidate["name"], candidate["step"]
    title = f"step {step}" if name == f"step-{step:07d}" else name
    return Row(title, detail, _pictures(folder, name), step == chosen)


def _pictures(folder: Path, name: str) -> Picture | None:
    path = folder / f"{name}.png"
    if not path.is_file():
        return None
    image = open_image(path)
    return picture(image, side=ROW, limit=1600, crisp=image.height <= 80)


def _panels(values: Mapping[str, Any], slot: int) -> tuple[tuple[str, str, Markup], ...]:
    panels = []
    for key, words in FIGURES:
        known = [each for each in values["candidates"] if each[key]["value"] is not None]
        bounds = [_bounds(each[key]) for each in known]
        limit = values["rule"]["max_copies"] if key == "copies" else None
        steps = [float(each["step"]) for each in known]
        panel = curves.candidates_panel(key, steps, bounds, float(values["chosen"]), slot, limit)
        if panel is not None:
            panels.append((key.replace("_", " "), words, panel))
    return tuple(panels)


def _bounds(interval: Mapping[str, float | None]) -> tuple[float, float, float]:
    value = float(interval["value"] or 0.0)
    low, high = (value if interval[end] is None else float(interval[end] or 0) for end in ("low", "high"))
    return min(low, value), value, max(high, value)
