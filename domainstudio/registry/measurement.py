"""The figures of a model that the gate compares, and the conditions under which they were measured."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

TITLES = {
    "frechet_distance": "Fréchet distance",
    "kid": "kernel distance",
    "intra_distance": "intra distance",
    "top_1": "subject kept",
    "memorized_share": "memorised",
}
"""The compared figures by their key in metrics.json. All but the last have a tolerance."""


@dataclass(frozen=True)
class Measurement:
    """The figures of a model and their conditions.

    Attributes:
        figures: By name; None if a figure is not defined or not finite.
        conditions: Everything but the model that the figures depend on, named for people. Figures are
            comparable if all conditions are equal.
    """

    figures: Mapping[str, float | None]
    conditions: Mapping[str, str]

    @classmethod
    def of(
        cls,
        metrics: Mapping[str, Any],
        samples: Mapping[str, Any],
        shots: str,
        domain: str,
        threshold: float,
    ) -> Self:
        """Take the figures and conditions from the outputs of the stages.

        Args:
            metrics: `evaluation/<adaptation>/metrics.json`.
            samples: The manifest of the samples.
            shots: Content hash of the training images.
            domain: Content hash of the whole target domain.
            threshold: Distance below which a sample counted as memorised.

        Raises:
            KeyError: the files lack a value.
        """
        measured = {**metrics["samples"], **metrics.get("paired", {}).get("samples", {})}
        images = samples["images"]
        conditions = {
            "feature network": f"{metrics['features']} {metrics['features_digest'][:12]}",
            "number of samples": str(metrics["number"]),
            "seeds": span([image["seed"] for image in images]),
            "scheduler": str(samples["scheduler"]),
            "denoising steps": str(samples["steps"]),
            "guidance": f"{samples.get('guidance_scale', 1):g}",
            "negative": str(samples.get("negative", "")),
            "subjects": _short_hash([image.get("subject", "") for image in images]),
            "target domain": domain[:12],
            "training images": shots[:12],
            "memorised below": f"{threshold:g}",
        }
        return cls({name: _finite(measured.get(name)) for name in TITLES}, conditions)

    def figure(self, name: str) -> float | None:
        """Return a figure; None if it was not measured or is not finite."""
        return _finite(self.figures.get(name))

    @property
    def digest(self) -> str:
        """Hash of figures and conditions."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of `to_json`."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return figures and conditions as JSON; equal measurements give equal texts."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)


def span(seeds: Sequence[int]) -> str:
    """Return seeds in short: `1000-1199` if they are consecutive, else a hash."""
    first, last = seeds[0], seeds[-1]
    return f"{first}-{last}" if list(seeds) == list(range(first, last + 1)) else _short_hash(seeds)


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _short_hash(values: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()[:12] if any(values) else ""
