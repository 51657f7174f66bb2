"""Adaptations: a source, a target, a method, and prompts."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from domainstudio.config.base import MANY, KeyedError, Name, Section, Seed, Text
from domainstudio.config.combination import Combination
from domainstudio.config.method import MIN_PAIRED_BATCH, Method
from domainstudio.config.training import TrainingSettings


class PromptPair(Section):
    """The prompt or class of a training image, for each model.

    `{caption}` and `{label}` stand for the image's own. Unconditional models ignore both keys.
    """

    source: str = "{caption}"
    """Prompt or class for the source model. The adapted model gets it for images of the source domain."""
    target: str = "{caption} in [V] style"
    """Prompt or class for the adapted model, for images of the target domain."""


class PromptSettings(PromptPair):
    """Prompts or classes of the training images.

    To learn a subject and a style together, put their images into two folders of one target, and give each
    folder its prompts under `by_label`. Then "a [S] dog in [V] style" joins both.
    """

    new_tokens: dict[Text, Text] = Field(default_factory=dict)
    """New words for the text encoder, such as "[V]", each with a known word whose embedding it starts from.
    Only the embeddings of new words are trained."""
    by_label: dict[Text, PromptPair] = Field(default_factory=dict)
    """Prompts for the images of one label (a folder of the target), in place of those above."""


class PriorSettings(Section):
    """Images of the source domain for prior preservation, for methods whose weight `prior` is above 0."""

    images: Literal["generated", "source"] = "generated"
    """`generated`: drawn from the source model once, and kept. `source`: those that `source_images` names."""
    number: int = Field(default=200, ge=1, le=MANY)
    """Number of images."""
    seed: Seed = 0
    """Seed of the first generated image, or of the choice among the source images."""


class AdaptationSettings(Section):
    """One adaptation: a source model, a target domain and a method. It makes one adapted model."""

    source: Name
    """The pretrained model in `models/sources/<source>`."""
    target: Name
    """A key of `targets`."""
    method: Name
    """A key of `methods`."""
    finetune: dict[str, Any] = Field(default_factory=dict)
    """Keys of the section `finetune` with other values for this adaptation."""
    weights: dict[str, Any] = Field(default_factory=dict)
    """Keys of the method with other values for this adaptation."""
    prompts: PromptSettings = PromptSettings()
    """Prompts or classes of the training images."""
    prior: PriorSettings = PriorSettings()
    """Images for prior preservation."""
    combine: Combination | None = None
    """How the source model helps to draw; `null` draws from the adapted model alone. It trains nothing."""


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
    combine: Combination | None = Field(default=None, exclude=True)
    """Left out of dumps, which name trainings: it decides what is drawn, and nothing that is trained."""

    @property
    def takes_source_images(self) -> bool:
        """Whether prior preservation takes real images of the source's domain."""
        return self.weights.uses_prior and self.prior.images == "source"

    @property
    def base_precision(self) -> Literal["no", "bf16", "fp16"]:
        """Type in which the source model is read: `frozen_precision` where nothing but adapters learns."""
        adapters = self.weights.lora
        learns_text = self.training.train_text_encoder or self.prompts.new_tokens
        if adapters is None or adapters.text_encoder or learns_text:
            return "no"
        return self.training.frozen_precision

    @model_validator(mode="after")
    def _paired_batch(self) -> Self:
        if self.weights.pairwise and self.training.batch_size < MIN_PAIRED_BATCH:
            raise KeyedError(
                ("training", "batch_size"),
                f"must be at least {MIN_PAIRED_BATCH} per process, got {self.training.batch_size}: with "
                "fewer images every pairwise loss is identically 0. Raise it",
            )
        return self
