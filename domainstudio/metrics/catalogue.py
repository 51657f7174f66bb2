"""All metrics. A new one is a file with a `METRIC` and a line here: metrics.json and the report show it."""

from __future__ import annotations

from dataclasses import fields

from domainstudio.metrics import (
    attributes,
    clip,
    diversity,
    frechet,
    in_domain,
    kernel,
    memorization,
    neighbours,
    pairing,
)
from domainstudio.metrics.metric import Figure, Metric

METRICS: tuple[Metric, ...] = (
    frechet.METRIC,
    kernel.METRIC,
    in_domain.METRIC,
    memorization.METRIC,
    neighbours.METRIC,
    diversity.METRIC,
)
"""Metrics of a set of images, in the order of their figures in metrics.json."""

FIGURES: tuple[Figure, ...] = (
    *(figure for metric in METRICS for figure in metric.figures),
    *attributes.FIGURES,
    *pairing.FIGURES,
    *clip.FIGURES,
)
"""All figures that the report explains, in its order."""

KEYS = frozenset(
    {key for figure in FIGURES for key in (figure.key, figure.spread) if key is not None}
    | {field.name for part in (pairing.Retrieval, clip.ClipScores) for field in fields(part)}
)
"""Keys that the samples' figures of metrics.json can have."""
