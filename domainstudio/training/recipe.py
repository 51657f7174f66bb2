"""From an adaptation's settings to its trainer: what it trains, on which images, and what is said of each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from domainstudio import models
from domainstudio.data import ImageSet, prompts
from domainstudio.data.buckets import Size, crop
from domainstudio.errors import ConfigError
from domainstudio.models import lora
from domainstudio.models.tiny_vae import load_decoder
from domainstudio.sampling import load_samples, sample_to_folder
from domainstudio.storage import checkpoint
from domainstudio.training.examples import Examples
from domainstudio.training.previews import previewer
from domainstudio.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from accelerate import PartialState
    from numpy.typing import NDArray

    from domainstudio.config import Adaptation, PromptPair, SampleSettings
    from domainstudio.models.denoiser import Denoiser
    from domainstudio.training.trainer import Tracker


PRIOR_CACHE, SOURCE_IMAGES = Path(".cache/prior"), Path("data/source")


@dataclass(frozen=True)
class PriorImages:
    """Images of the source domain, and what a model is told of each.

    Attributes:
        images: uint8, with shape (N, 3, H, W).
        texts: prompts or classes, or `None` for a model that is told nothing.
    """

    images: NDArray[np.uint8]
    texts: tuple[str, ...] | None

    @property
    def digest(self) -> str:
        """SHA-256 of images and texts."""
        total = hashlib.sha256(np.ascontiguousarray(self.images).tobytes())
        total.update(repr(self.texts).encode())
        return total.hexdigest()

    def fitted(self, size: Size) -> PriorImages:
        """Return the images cropped and resized to a bucket, whose batches they share."""
        if self.images.shape[2:] == size:
            return self
        pictures = (Image.fromarray(image) for image in self.images.transpose(0, 2, 3, 1))
        fitted = np.stack([np.asarray(crop(image, size)) for image in pictures])
        return replace(self, images=fitted.transpose(0, 3, 1, 2).copy())

    def examples(self, denoiser: Denoiser, encodings: Path | None = None) -> Examples:
        """Return them as examples for the model in training."""
        if self.texts is None:
            return Examples.unconditional(self.images)
        return Examples.of(denoiser, self.images, [[text] for text in self.texts], folder=encodings)


def prior_images(
    denoiser: Denoiser,
    shots: ImageSet,
    adaptation: Adaptation,
    drawing: SampleSettings,
    digest: str,
    *,
    cache: Path = PRIOR_CACHE,
    source_images: Path = SOURCE_IMAGES,
) -> PriorImages | None:
    """Return the images of prior preservation, or `None` where the method has no prior.

    Args:
        denoiser: the source model, not trained yet, on its device; it draws images to be generated.
        shots: the few images. Generated images have their source prompts in turn, or the model's classes;
            none has a prompt that is a target prompt, which the prior would work against.
        adaptation: weights, prompts, and where the images come from.
        drawing: sampler, guidance and batch size.
        digest: the source model's.
        cache: folder of generated images; what is there already is not drawn again.
        source_images: folder of the prepared source images.

    Raises:
        ConfigError: a prompt cannot be filled.
        DataError: the source images are asked for and not prepared.
    """
    prior = adaptation.prior
    if adaptation.weights.prior == 0:
        return None
    adapted = frozenset(_texts(denoiser, adaptation, "target", shots) or ())
    if prior.images == "source":
        everything = ImageSet.load(source_images)
        texts = _texts(denoiser, adaptation, "source", everything) or (None,) * len(everything)
        kept = everything.take(_others(texts, adapted, adaptation))
        chosen = kept.draw(min(prior.number, len(kept)), prior.seed)
        return PriorImages(chosen.images, _texts(denoiser, adaptation, "source", chosen))
    told = None
    if denoiser.conditional:
        texts = denoiser.classes or _texts(denoiser, adaptation, "source", shots) or ()
        others = [texts[index] for index in _others(texts, adapted, adaptation)]
        told = tuple(islice(cycle(others), prior.number))
    settings = drawing.model_copy(update={"number": prior.number, "seed": prior.seed})
    inputs = {"prompts": repr(told), "source": digest}
    folder = cache / checkpoint.run_key(settings.model_dump(mode="json"), inputs)
    if not (folder / "manifest.json").is_file():
        sample_to_folder(denoiser, folder, settings, told, model="prior")
    return PriorImages(load_samples(folder), told)


@dataclass(frozen=True)
class Inputs:
    """What an adaptation is trained from.

    Attributes:
        denoiser: The source model, on this process's device.
        shots: The few images.
        prior: Images of prior preservation, where the method has a prior.
        digests: Content hashes by name.
    """

    denoiser: Denoiser
    shots: ImageSet
    prior: PriorImages | None
    digests: Mapping[str, str]


def load_inputs(adaptation: Adaptation, drawing: SampleSettings, process: PartialState) -> Inputs:
    """Read what the stages before have prepared; images of prior preservation are drawn if need be.

    Args:
        adaptation: the adaptation.
        drawing: how images of prior preservation are drawn.
        process: this process; of several, the first one draws.

    Raises:
        CheckpointError: there is no source model.
        DataError: images are missing or damaged.
    """
    shots = ImageSet.load(Path("data/targets") / adaptation.target / "shots")
    source = Path("models/sources") / adaptation.source
    digests = {"source": models.digest(source), "shots": shots.digest}
    denoiser = models.load(source).to(process.device)
    with process.main_process_first():  # it draws; the others read
        prior = prior_images(denoiser, shots, adaptation, drawing, digests["source"])
    if prior is not None:
        digests["prior"] = prior.digest
    if adaptation.weights.tiny_vae and Path(adaptation.weights.tiny_vae).is_dir():
        digests["tiny_vae"] = models.digest(adaptation.weights.tiny_vae)
    return Inputs(denoiser, shots, prior, digests)


def make_trainer(
    denoiser: Denoiser,
    shots: ImageSet,
    prior: PriorImages | None,
    adaptation: Adaptation,
    checkpoints: Path,
    *,
    latents: Path | None = None,
    tracker: Tracker | None = None,
    drawing: SampleSettings | None = None,
) -> Trainer:
    """Return the trainer of an adaptation.

    Args:
        denoiser: the source model, which becomes the adapted model in place.
        shots: the few images.
        prior: images of the source domain, where the method has a prior.
        adaptation: what to train, and how.
        checkpoints: folder of this run's resumable states.
        latents: folder that keeps encoded images and prompts.
        tracker: where progress is logged.
        drawing: how previews are drawn; `None` draws none.

    Raises:
        ConfigError: a prompt cannot be filled, or the model lacks what is to be trained.
    """
    training, weights = adaptation.training, adaptation.weights
    if training.train_text_encoder or adaptation.prompts.new_tokens:
        _train_text(denoiser, adaptation)
    if weights.lora is not None:
        lora.attach(denoiser, weights.lora, training.seed)
    preview = None
    if drawing is not None:
        preview = previewer(drawing, _texts(denoiser, adaptation, "target", shots))
    buckets = shots.buckets()
    return Trainer(
        denoiser,
        [training_examples(denoiser, each, adaptation, latents) for each in buckets],
        training,
        weights,
        checkpoints,
        source=denoiser.frozen_source() if weights.pairwise else None,
        prior=[prior.fitted(each.images.shape[2:]).examples(denoiser, latents) for each in buckets]
        if prior
        else None,
        decode=load_decoder(weights.tiny_vae, denoiser) if weights.tiny_vae else None,
        latents=latents,
        tracker=tracker,
        preview=preview,
    )


def training_examples(
    denoiser: Denoiser, shots: ImageSet, adaptation: Adaptation, encodings: Path | None = None
) -> Examples:
    """Return the training images: the adapted model is told target prompts, the source model its own.

    Args:
        denoiser: the model to train.
        shots: the few images.
        adaptation: the prompts.
        encodings: folder that keeps encoded prompts.

    Raises:
        ConfigError: a prompt cannot be filled, or the model does not take it.
    """
    target, source = (_texts(denoiser, adaptation, kind, shots) for kind in ("target", "source"))
    if target is None or source is None:
        return Examples.unconditional(shots.images)
    told, compared = ([[text] for text in texts] for texts in (target, source))
    return Examples.of(denoiser, shots.images, told, compared, encodings)


def _others(texts: Sequence[str | None], adapted: frozenset[str], adaptation: Adaptation) -> list[int]:
    """Return the indices of the texts that are no target prompt."""
    others = [index for index, text in enumerate(texts) if text not in adapted]
    if not others:
        raise ConfigError(
            f"adaptations.{adaptation.name}: every source prompt is a target prompt too, so prior "
            "preservation would work against the adaptation: choose other prompts, or a method without prior"
        )
    return others


def _train_text(denoiser: Denoiser, adaptation: Adaptation) -> None:
    where, words = f"adaptations.{adaptation.name}", adaptation.prompts.new_tokens
    if not denoiser.text_encoders:
        raise ConfigError(
            f"{where}: the source model {adaptation.source} has no text encoder to train: set "
            "finetune.train_text_encoder to false, and no prompts.new_tokens"
        )
    if words and adaptation.weights.lora is not None:
        raise ConfigError(f"{where}: prompts.new_tokens cannot be saved with adapters: leave one of them out")
    lora_settings = adaptation.weights.lora
    if lora_settings is not None and not lora_settings.text_encoder:
        raise ConfigError(
            f"{where}: finetune.train_text_encoder is true and the method trains adapters in the UNet only: "
            "set the method's lora.text_encoder, or train_text_encoder to false"
        )
    denoiser.train(text_encoders=adaptation.training.train_text_encoder, new_tokens=words)


def _texts(denoiser: Denoiser, adaptation: Adaptation, kind: str, images: ImageSet) -> tuple[str, ...] | None:
    if not denoiser.conditional:
        return None
    chosen, texts = adaptation.prompts, []
    for record in images.records:
        pair: PromptPair = chosen
        where = f"adaptations.{adaptation.name}.prompts"
        if record.label in chosen.by_label:
            pair, where = chosen.by_label[record.label], f"{where}.by_label.{record.label}"
        texts.append(prompts.of_image(getattr(pair, kind), record, f"{where}.{kind}"))
    return tuple(texts)
