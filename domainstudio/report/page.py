"""One self-contained HTML file that puts every adaptation side by side, made for looking.

The page depends on its inputs, the commit and the installed versions alone: no clock, no network, so that
the same inputs give the same bytes.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from markupsafe import Markup

from domainstudio.config import Settings
from domainstudio.data.image_set import Manifest
from domainstudio.git import State
from domainstudio.report import curves, fronts, tables
from domainstudio.report.reading import Content, read
from domainstudio.report.sections import COLUMNS, comparisons, section
from domainstudio.report.templating import template

SCATTERS = (
    (
        ("frechet_distance_infinity", "Fréchet distance ∞ (← closer to the domain)"),
        ("intra_distance_in_domain", "intra distance in the domain (more varied →)"),
        "Closeness against variety.",
        "Up and to the left is better, but only as high as real images go.",
    ),
    (
        ("in_domain_share", "in the domain (more faithful →)"),
        ("recall", "recall (more of the domain →)"),
        "Faithfulness against reach.",
        "Up and to the right is better.",
    ),
)
PACKAGES = ("domainstudio", "torch", "diffusers", "accelerate", "numpy", "pillow")


def render(
    root: Path, settings: Settings, git: State | None = None, names: Sequence[str] | None = None
) -> str:
    """Make the report.

    Args:
        root: folder that holds the outputs of the stages; what is missing there is said in the report.
        settings: the whole of `params.yaml`.
        git: the commit to name.
        names: the adaptations to show; by default all.

    Returns:
        The HTML page: every picture inside, no request to anywhere.

    Raises:
        DataError: an output is there but damaged.
        ConfigError: `names` has one that `params.yaml` has not.
    """
    content = read(root, settings, names)
    slots = {item.adaptation.name: index for index, item in enumerate(content.results)}
    differing, shared = tables.setting_rows([item.adaptation for item in content.results])
    comparable = tables.metric_tables(content.results)
    return template("report.html.j2").render(
        content=content,
        slots=slots,
        comparisons=comparisons(content, slots),
        tables=[
            (table, [*_scatters(table, slots), *fronts.figures(table.results, slots)]) for table in comparable
        ],
        sections=[section(content, item, slots) for item in content.results],
        differing=differing,
        shared=shared,
        image_sets=_image_sets(content),
        git=git,
        versions=_versions(),
        columns=COLUMNS,
    )


def _scatters(table: tables.MetricTable, slots: Mapping[str, int]) -> list[tuple[str, str, Markup]]:
    found = []
    for (x_key, x_label), (y_key, y_label), name, advice in SCATTERS:
        measured = [
            (i.adaptation.name, (i.metrics or {}).get("samples"), slots[i.adaptation.name])
            for i in table.results
        ]
        beside = [(name, values, None) for name, values in tables.references(table.results).items()]
        points = [
            curves.Point(label, x, y, slot)
            for label, values, slot in (*measured, *beside)
            if (x := tables.number(values, x_key)) is not None
            and (y := tables.number(values, y_key)) is not None
        ]
        if (drawing := curves.scatter(points, x_label, y_label)) is not None:
            found.append((name, advice, drawing))
    return found


def _image_sets(content: Content) -> list[tuple[str, Manifest]]:
    found = [(f"{name}: source domain", images) for name, images in content.source_images.items()]
    for name, target in content.targets.items():
        found += [(f"{name}: training images", target.shots), (f"{name}: whole domain", target.domain)]
    return [(name, images.manifest) for name, images in found if images is not None]


def _versions() -> list[tuple[str, str]]:
    found = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found
