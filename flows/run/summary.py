"""The summary of a flow run: its stages and their times, the models' metrics, and pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainstudio.project import REPORT, REPORTS

PICTURE_SIZE = 640, 640
"""Largest width and height of a picture, in pixels: it is kept in Prefect's database."""


@dataclass(frozen=True)
class Row:
    """One stage of a run."""

    address: str
    state: str
    """`run`, `cached`, `failed`, `cancelled` or `not run`."""
    seconds: float | None = None
    """Wall time, None if it did not start."""


def markdown(root: str | Path, rows: Sequence[Row], *, temporary: bool = False) -> str:
    """Return the summary of a run as Markdown: metrics, the report's place and the stages.

    Args:
        root: Folder that holds `evaluation/*/metrics.json` and reports, as far as they exist.
        rows: The stages, in the order in which they are to be listed.
        temporary: The folder is removed after the run, so there is no place to name.
    """
    parts = ["## Metrics", _metrics_table(Path(root))]
    pages = [] if temporary else [page for page in _pages(Path(root), rows) if page.exists()]
    if pages:
        links = (f"[{page.name}]({page.as_uri()}) with pictures and curves: `{page}`" for page in pages)
        parts += ["## Report", "\n\n".join(links)]
    lines = ["| stage | state | seconds |", "| --- | --- | ---: |"]
    for row in rows:
        seconds = "–" if row.seconds is None else f"{row.seconds:.1f}"
        lines.append(f"| {_cell(row.address)} | {row.state} | {seconds} |")
    return "\n\n".join([*parts, "## Stages", "\n".join(lines)]) + "\n"


def _pages(root: Path, rows: Sequence[Row]) -> list[Path]:
    """Return the reports of a run: the whole one, if it was asked for, stands for the others."""
    addresses = [row.address for row in rows]
    if "report" in addresses:
        return [(root / REPORT).resolve()]
    keys = (address.partition("adaptation_report@")[2] for address in addresses)
    return [(root / REPORTS / f"{key}.html").resolve() for key in keys if key]


def picture(path: Path) -> str:
    """Return a picture as a data URL (`data:image/jpeg;base64,…`), reduced to `PICTURE_SIZE`.

    Raises:
        OSError: it cannot be read.
    """
    from PIL import Image

    with Image.open(path) as image:
        image.thumbnail(PICTURE_SIZE)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _metrics_table(root: Path) -> str:
    measured: dict[str, Mapping[str, Any]] = {}
    for path in sorted(root.glob("evaluation/*/metrics.json")):
        try:
            measured[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))["samples"]
        except (OSError, ValueError, KeyError, TypeError):
            measured[path.parent.name] = {}
    if not measured:
        return "Nothing was evaluated yet."
    names = list(dict.fromkeys(name for values in measured.values() for name in values))
    lines = [
        "| adaptation | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for adaptation, values in measured.items():
        cells = [_number(values.get(name)) for name in names] or ["metrics.json is not readable"]
        lines.append(f"| {_cell(adaptation)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else "–"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
