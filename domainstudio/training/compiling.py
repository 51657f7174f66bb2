"""Which networks of a training step are compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from domainstudio.training.objective import Objective


def compile_step(objective: Objective) -> None:
    """Compile each network that a step runs, in place (`torch.compile`).

    A network is compiled when it first runs, and once more, for all sizes, when a second size comes. With
    adapters the source model is the same network, compiled a second time without them.

    Args:
        objective: its models; the VAE's decoder is compiled where terms compare its images.
    """
    adapted, source, weights = objective.adapted, objective.source, objective.weights
    adapted.network.compile()
    if source is not None and adapted.adapters is None:
        source.network.compile()
    if adapted.vae is not None and weights.compares_images and weights.decoder == "full":
        adapted.vae.decoder.compile()
