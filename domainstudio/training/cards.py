"""Model cards: the `README.md` of a trained model's folder, in Markdown with the hub's header."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from domainstudio import markdown

if TYPE_CHECKING:
    from domainstudio.data import ImageSet
    from domainstudio.tracking.provenance import Provenance

_NO_TERMS = frozenset({"pairwise_temperature", "min_snr_gamma"})
"""Numbers among a method's settings that are no weights of loss terms."""


def adapted_card(record: Provenance, shots: ImageSet, kind: str = "unconditional") -> str:
    """Return an adapted model's card, with code that draws from the model.

    Args:
        record: What decided the model.
        shots: The training images. The code uses the prompt or class of the first.
        kind: The model's kind.
    """
    prompts, weights, first = record.params["prompts"], record.params["weights"], shots.records[0]
    template: str = prompts["by_label"].get(first.label, prompts)["target"]
    condition = template.format(caption=first.caption, label=first.label or "")
    return markdown.render(
        "domainstudio.training",
        "adapted_card.md.j2",
        record=record,
        shots=shots,
        kind=kind,
        noun={"text-to-image": "prompt", "class-conditional": "class"}.get(kind),
        trigger=trigger(prompts) if kind == "text-to-image" else "",
        terms={k: v for k, v in weights.items() if isinstance(v, float) and v > 0 and k not in _NO_TERMS},
        condition=json.dumps(condition, ensure_ascii=False),
    )


def source_card(
    kind: str,
    params: Mapping[str, Any],
    images: ImageSet,
    history: Sequence[Mapping[str, float]],
    start: str = "from scratch",
) -> str:
    """Return a pretrained source model's card.

    Args:
        kind: What the model is, for example "Unconditional pixel-space UNet".
        params: The section of params.yaml that it was trained by.
        images: The training images.
        history: The training log.
        start: What the training began with.
    """
    return markdown.render(
        "domainstudio.training",
        "source_card.md.j2",
        kind=kind,
        params=params,
        images=images,
        history=history,
        start=start,
        loss=statistics.fmean(record["simple"] for record in history[-500:]),
    )


def trigger(prompts: Mapping[str, Any]) -> str:
    """Return the words of the target prompt that its source prompt lacks: they call up the target domain.

    >>> trigger({"source": "a {label}", "target": "a {label} in [V] style"})
    'in [V] style'
    """
    known = prompts["source"].split()
    return " ".join(word for word in prompts["target"].split() if word not in known)
