"""What people read of a registered model: its description, its headline figures and each version's card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from domainstudio import markdown
from domainstudio.config import Adaptation
from domainstudio.models.stored import StoredModel
from domainstudio.project import ADAPTED_SAMPLES
from domainstudio.registry.results import Result
from domainstudio.registry.versions import ADAPTERS, MERGED

HEADLINE = ("frechet_distance_infinity", "kid", "intra_distance_in_domain", "memorized_share")
"""Metrics that are shown first, if they were measured."""

FURTHER = (
    "frechet_distance",
    "in_domain_share",
    "attributes_kept",
    "top_1",
    "top_5",
    "clip_score",
    "intra_clip",
)
"""Further metrics, which follow in the table. Some need prompts or classes, or known attributes."""


def summary(adaptation: Adaptation, alias: str) -> str:
    """Return the registered model's description: what all its versions have in common."""
    return (
        f"Source model `{adaptation.source}` adapted to the domain `{adaptation.target}` by DomainStudio's "
        f"method `{adaptation.method}` (adaptation `{adaptation.name}` of `params.yaml`). Use the version "
        f"with the alias `{alias}`; every version has its own card."
    )


def headline(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the first metrics as tags, each with the feature network that it depends on."""
    network, samples = metrics.get("features", "unknown"), metrics.get("samples", {})
    return {name: f"{samples[name]:.4g} ({network})" for name in HEADLINE if _is_number(samples.get(name))}


def version_card(result: Result, uri: str, verdict: str, run_id: str) -> str:
    """Return a version's card in Markdown: verdict, samples, figures, the model's own card, and use.

    Args:
        result: The registered result. Of its own card the header for the hub and the code are left out.
        uri: What users load, such as `models:/name@champion`.
        verdict: The gate's verdict and its reason.
        run_id: The run with the artifact `samples/grid.png`.
    """
    title, _, own = _without_header(result.readme).partition("\n")
    figures = headline(result.metrics).items()
    columns, rows = _table(result.metrics)
    column = {"text-to-image": "prompt", "class-conditional": "label"}.get(result.kind)
    request = {column: result.example} if column else {}
    guidance = {"guidance_scale": result.guidance_scale} if column else {}
    has_grid = (ADAPTED_SAMPLES / result.adaptation.name / "grid.png").is_file()
    return markdown.render(
        "domainstudio.registry",
        "version_card.md.j2",
        result=result,
        uri=uri,
        verdict=verdict,
        run_id=run_id,
        # The title is no Markdown heading, because MLflow's list of versions shows the first line as it is.
        title=title.lstrip("# "),
        headline=", ".join(f"{_words(name)} {value}" for name, value in figures),
        # Relative to MLflow's own pages, which serve the artifacts of runs at this address.
        grid="samples/grid.png" if has_grid else None,
        metrics=result.metrics,
        columns=columns,
        rows=rows,
        own=own.partition("```python")[0].strip(),
        folder=MERGED if result.lora or result.together else result.adaptation.name,
        two=not StoredModel(result.folder, result.together).is_plain,
        adapters=ADAPTERS,
        request=_json(request),
        example=_json(result.example),
        params=_json({"number": 4, "seed": 0, "steps": 30, **guidance}),
    )


def _without_header(readme: str) -> str:
    has_header = readme.startswith("---\n") and readme.count("---\n") > 1
    return (readme.split("---\n", 2)[2] if has_header else readme).strip()


def _table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return titles of columns, and rows of text: a metric's name, then its value in each column."""
    columns: dict[str, dict[str, Any]] = {"this model": {}}
    for part in (metrics, *(metrics.get(name) or {} for name in ("attributes", "paired", "clip"))):
        for title, values in {"this model": part.get("samples", {}), **part.get("references", {})}.items():
            columns.setdefault(title, {}).update(values)
    rows = [
        [_words(name), *(f"{c[name]:.4g}" if _is_number(c.get(name)) else "–" for c in columns.values())]
        for name in (*HEADLINE, *FURTHER)
        if any(_is_number(values.get(name)) for values in columns.values())
    ]
    return list(columns), rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
