"""From an adaptation's settings to its trainer: what is trained, on which images, under which prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from domainstudio import models
from domainstudio.data import ImageSet
from domainstudio.errors import ConfigError
from domainstudio.models import lora
from domainstudio.precision import DTYPES, usable_precision
from domainstudio.project import SOURCE_MODELS, TARGETS
from domainstudio.sampling.generate import check_steps
from domainstudio.training.decoders import make_decoder
from domainstudio.training.examples import Examples, texts_of
from domainstudio.training.objective import Objective
from domainstudio.training.previews import previewer
from domainstudio.training.prior import PriorImages, prior_images
from domainstudio.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from accelerate import PartialState
    from torch import Tensor

    from domainstudio.config import Adaptation, SampleSettings
    from domainstudio.models.denoiser import Denoiser
    from domainstudio.training.trainer import Tracker

LATENTS = Path(".cache/latents")


@dataclass(frozen=True)
class Recipe:
    """An adaptation, and all that it is trained from.

    Attributes:
        adaptation: what to train, and how.
        denoiser: the source model, on this process's device. The training adapts it in place.
        shots: the few images.
        prior: images of the source domain, where the method has a prior.
        digests: content hashes of what it is trained from, by name.
        latents: folder that keeps encoded images and prompts.
        sampling: how previews are drawn; `None` draws none.
    """

    adaptation: Adaptation
    denoiser: Denoiser
    shots: ImageSet
    prior: PriorImages | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    latents: Path | None = None
    sampling: SampleSettings | None = None

    @classmethod
    def load(cls, adaptation: Adaptation, sampling: SampleSettings, process: PartialState) -> Recipe:
        """Read what the stages before have prepared. Images of prior preservation are drawn if need be.

        Args:
            adaptation: the adaptation.
            sampling: how images of prior preservation and previews are drawn.
            process: this process; several draw together.

        Raises:
            CheckpointError: there is no source model.
            ConfigError: it cannot be drawn as `sampling` says.
            DataError: images are missing or damaged.
        """
        shots = ImageSet.load(TARGETS / adaptation.target / "shots")
        source, tiny_vae = SOURCE_MODELS / adaptation.source, adaptation.weights.tiny_vae
        digests = {"source": models.digest(source), "shots": shots.digest}
        precision = usable_precision(adaptation.base_precision, process.device)
        denoiser = models.load(source, DTYPES[precision]).to(process.device)
        check_steps(denoiser, sampling.steps)
        drawn_by = digests["source"] if precision == "no" else f"{digests['source']} in {precision}"
        prior = prior_images(denoiser, shots, adaptation, sampling, drawn_by)
        if prior is not None:
            digests["prior"] = prior.digest
        if tiny_vae and Path(tiny_vae).is_dir():
            digests["tiny_vae"] = models.digest(tiny_vae)
        return cls(adaptation, denoiser, shots, prior, digests, LATENTS, sampling)

    def trainer(self, checkpoints: Path, tracker: Tracker | None = None) -> Trainer:
        """Return the trainer.

        Args:
            checkpoints: folder of this run's resumable states.
            tracker: where progress is logged.

        Raises:
            ConfigError: a prompt cannot be filled, or the model lacks what is to be trained.
        """
        adaptation, denoiser, latents = self.adaptation, self.denoiser, self.latents
        training, weights, prior = adaptation.training, adaptation.weights, self.prior
        if training.train_text_encoder or adaptation.prompts.new_tokens:
            _train_text(denoiser, adaptation)
        if weights.lora is not None:
            lora.attach(denoiser, weights.lora, training.seed)
        examples = [training_examples(denoiser, each, adaptation, latents) for each in self.shots.buckets()]
        sizes = [(each.images.shape[2], each.images.shape[3]) for each in examples]
        source = denoiser.frozen_source() if weights.pairwise else None
        texts = texts_of(denoiser, adaptation, "target", self.shots)
        return Trainer(
            Objective(denoiser, weights, source, self.decoder(examples), exact=weights.decoder != "linear"),
            examples,
            training,
            checkpoints,
            prior=[prior.examples(denoiser, size, latents) for size in sizes] if prior else None,
            latents=latents,
            tracker=tracker,
            preview=previewer(self.sampling, texts) if self.sampling else None,
        )

    def decoder(self, examples: Sequence[Examples]) -> Callable[[Tensor], Tensor] | None:
        """Return what decodes for the terms, if any of them compares images."""
        weights, prior = self.adaptation.weights, self.prior
        if not weights.compares_images:
            return None
        shots = [each.images for each in examples]
        others = None if prior is None else torch.from_numpy(prior.images)
        return make_decoder(self.denoiser, weights, shots, others, self.latents)


def training_examples(
    denoiser: Denoiser, shots: ImageSet, adaptation: Adaptation, encodings: Path | None = None
) -> Examples:
    """Return the training images: the adapted model gets target prompts, the source model source prompts.

    Args:
        denoiser: the model to train.
        shots: the few images.
        adaptation: the prompts.
        encodings: folder that keeps encoded prompts.

    Raises:
        ConfigError: a prompt cannot be filled, or the model does not take it.
    """
    target = texts_of(denoiser, adaptation, "target", shots)
    source = texts_of(denoiser, adaptation, "source", shots)
    if target is None or source is None:
        return Examples.unconditional(shots.images)
    texts, source_texts = [[text] for text in target], [[text] for text in source]
    return Examples.of(denoiser, shots.images, texts, source_texts, encodings)


def _train_text(denoiser: Denoiser, adaptation: Adaptation) -> None:
    where, words = f"adaptations.{adaptation.name}", adaptation.prompts.new_tokens
    if not denoiser.text_encoders:
        raise ConfigError(
            f"{where}: the source model {adaptation.source} has no text encoder to train: set "
            "finetune.train_text_encoder to false, and no prompts.new_tokens"
        )
    lora_settings = adaptation.weights.lora
    if words and lora_settings is not None:
        raise ConfigError(f"{where}: prompts.new_tokens cannot be saved with adapters: leave one of them out")
    if lora_settings is not None and not lora_settings.text_encoder:
        raise ConfigError(
            f"{where}: finetune.train_text_encoder is true and the method trains adapters in the UNet only: "
            "set the method's lora.text_encoder, or train_text_encoder to false"
        )
    denoiser.train(text_encoders=adaptation.training.train_text_encoder, new_tokens=words)
