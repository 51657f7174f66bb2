"""The figures that the report shows, in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher", None]


@dataclass(frozen=True)
class Metric:
    """A figure of `metrics.json` in plain words."""

    key: str
    name: str
    better: Better
    meaning: str
    percent: bool = False
    part: str | None = None
    """The part of `metrics.json` that holds its `samples` and `references`; `None`: the whole."""


METRICS = (
    Metric(
        "frechet_distance",
        "Fréchet distance",
        "lower",
        "How far the samples are, as a cloud of features, from real images of the domain. Too few images "
        "push it up, so only equal numbers of images compare.",
    ),
    Metric(
        "kid",
        "Kernel distance",
        "lower",
        "The same question without the bias of small sets; ± is the spread over random subsets. Around 0 the "
        "two sets cannot be told apart.",
    ),
    Metric(
        "precision",
        "Precision",
        "higher",
        "Share of the samples that look like some real image of the domain.",
        percent=True,
    ),
    Metric(
        "recall",
        "Recall",
        "higher",
        "Share of the real images that look like some sample: how much of the domain is reached.",
        percent=True,
    ),
    Metric(
        "density",
        "Density",
        "higher",
        "Like precision, but counts how many real images a sample is close to; outliers weigh less, and it "
        "can exceed 1.",
    ),
    Metric(
        "coverage",
        "Coverage",
        "higher",
        "Share of the real images with at least one sample close by.",
        percent=True,
    ),
    Metric(
        "intra_distance",
        "Intra distance",
        "higher",
        "Samples are grouped by their nearest training image; this is the mean distance inside a group. "
        "Exact copies give 0, but garbage gives much: read it beside precision.",
    ),
    Metric(
        "intra_clusters",
        "Groups",
        None,
        "How many training images have at least two samples grouped around them.",
    ),
    Metric(
        "memorized_share",
        "Memorised",
        "lower",
        "Share of the samples closer to a training image than the threshold.",
        percent=True,
    ),
    Metric(
        "nearest_distance_median",
        "Nearest distance",
        None,
        "Median distance of a sample to its nearest training image.",
    ),
    Metric(
        "top_1",
        "Subject kept",
        "higher",
        "Share of the samples that, of all real drawings of the domain, are nearest to that of their own "
        "subject. Subjects without a drawing, or that were trained on, do not count.",
        percent=True,
        part="paired",
    ),
    Metric(
        "top_5",
        "Subject among five",
        "higher",
        "The same, with their own subject's drawing among the five nearest.",
        percent=True,
        part="paired",
    ),
    Metric(
        "clip_score",
        "CLIP score",
        "higher",
        "How well samples show what their prompt says, by CLIP: 100 times the cosine of image and prompt.",
        part="clip",
    ),
    Metric(
        "subject_clip_score",
        "CLIP score of the subject",
        "higher",
        "The same against the bare subject, so that models with different prompts compare.",
        part="clip",
    ),
    Metric(
        "intra_clip",
        "Intra-CLIP",
        "higher",
        "Like the intra distance, with 1 minus the cosine of CLIP's image embeddings as the distance.",
        part="clip",
    ),
)
