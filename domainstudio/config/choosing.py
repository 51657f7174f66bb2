"""The choice of a checkpoint, at the end of the stage `finetune`."""

from __future__ import annotations

from pydantic import Field

from domainstudio.config.base import MANY, Section, Seed


class ChooseSettings(Section):
    """Which state along training becomes the model, by a few samples of each.

    `finetune.candidate_every` says how far apart the states are; 0 switches the choice off, and the last step
    is taken. No image but the training images is looked at, and none of the training's time is spent again.
    """

    number: int = Field(default=64, ge=8, le=MANY)
    """Samples of each candidate, all from the same noise."""
    steps: int = Field(default=8, ge=1)
    """Denoising steps of these samples. The rest is as in the section `sample`."""
    seed: Seed = 0
    """Seed of the first sample; away from `sample.seed`, so that figures are of noise that chose nothing."""
    copy_distance: float = Field(default=0.3, gt=0)
    """A sample is a copy where its distance to a training image is below this share of the distance from a
    training image to the nearest other one (the median of them)."""
    max_copies: float = Field(default=0.1, ge=0, le=1)
    """Candidates count up to the first one with a larger share of copies. Of real images that nobody trained
    on, up to 6 in 100 lie as near to a training image by the default distance: they repeat its parts."""
    gain_per_loss: float = Field(default=1.0, ge=0)
    """The least gain in fidelity, as a share of the way from the source model to the domain, for a loss of
    diversity, as a share of that of the training images. Where less is gained, training went on too long.
    Larger: stop earlier. The default weighs both alike; it was not tuned on trainings."""
    keep: bool = True
    """Keep the candidates beside the training states, so that another rule needs no training. False deletes
    all but the chosen one."""
