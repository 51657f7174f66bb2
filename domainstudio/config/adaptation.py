"""Adaptations: a source, a target, a method, and prompts."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from domainstudio.config.base import Name, Section
from domainstudio.config.method import MIN_PAIRED_BATCH, Method
from domainstudio.config.training import TrainingSettings


class PromptPair(Section):
    """What each model is told of a training image: prompts, or classes.

    `{caption}` and `{label}` stand for the image's own. Models that are told nothing ignore them.
    """

    source: str = "{caption}"
    """What the source model is told, and the adapted model on images of the source domain."""
    target: str = "{caption} in [V] style"
    """What the adapted model is told of an image of the target domain."""


class PromptSettings(PromptPair):
    """Prompts or classes of the training images.

    To personalise, put images of the subject and of the style into two folders of one target, and say of each
    folder what its images are told: then "a [S] dog in [V] style" joins both.
    """

    new_tokens: dict[str, str] = Field(default_factory=dict)
    """New words for the text encoder, such as "[V]", each with a known word that its embedding begins as.
    Their embeddings are trained, the other words' are not."""
    by_label: dict[str, PromptPair] = Field(default_factory=dict)
    """Other prompts for images of some labels (folders of the target)."""


class PriorSettings(Section):
    """Images of the source domain for prior preservation, used where the method's `prior` is above 0."""

    images: Literal["generated", "source"] = "generated"
    """`generated`: drawn from the source model, once, and kept. `source`: the prepared source images."""
    number: int = Field(default=200, ge=1)
    """How many."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first generated image, or of the draw among the source images."""


class AdaptationSettings(Section):
    """One adaptation: which source becomes which target, how."""

    source: Name
    """The pretrained model in `models/sources/<source>`."""
    target: Name
    """A key of `targets`."""
    method: Name
    """A key of `methods`."""
    finetune: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the section `finetune` for this adaptation."""
    weights: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the method for this adaptation."""
    prompts: PromptSettings = PromptSettings()
    """Prompts or classes of the training images."""
    prior: PriorSettings = PriorSettings()
    """Images for prior preservation."""


class Adaptation(Section):
    """An adaptation with every default and override applied."""

    name: Name
    source: Name
    target: Name
    method: Name
    training: TrainingSettings
    weights: Method
    prompts: PromptSettings
    prior: PriorSettings

    @model_validator(mode="after")
    def _paired_batch(self) -> Self:
        if self.weights.pairwise and self.training.batch_size < MIN_PAIRED_BATCH:
            raise ValueError(
                f"finetune.batch_size must be at least {MIN_PAIRED_BATCH} per process, got "
                f"{self.training.batch_size}: with fewer images every pairwise loss is identically 0. Raise "
                "finetune.batch_size"
            )
        return self
