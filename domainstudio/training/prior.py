"""Prior preservation: images of the source domain that the adapted model must go on to draw."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from domainstudio.data import ImageSet
from domainstudio.data.buckets import Size, crop
from domainstudio.data.image_set import draw_indices
from domainstudio.errors import ConfigError
from domainstudio.project import SOURCE_IMAGES
from domainstudio.sampling import load_samples, sample_to_folder
from domainstudio.storage import checkpoint
from domainstudio.training.examples import Examples, texts_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from domainstudio.config import Adaptation, SampleSettings
    from domainstudio.models.denoiser import Denoiser

CACHE = Path(".cache/prior")


@dataclass(frozen=True)
class PriorImages:
    """Images of the source domain with their prompts or classes.

    Attributes:
        images: uint8, with shape (N, 3, H, W).
        texts: prompts or classes, or `None` for an unconditional model.
    """

    images: NDArray[np.uint8]
    texts: tuple[str, ...] | None

    @property
    def digest(self) -> str:
        """SHA-256 of images and texts."""
        total = hashlib.sha256(np.ascontiguousarray(self.images).data)
        total.update(repr(self.texts).encode())
        return total.hexdigest()

    def examples(self, denoiser: Denoiser, size: Size, encodings: Path | None = None) -> Examples:
        """Return them as examples for the model in training, cropped and resized to a bucket."""
        images = self.fitted(size).images
        if self.texts is None:
            return Examples.unconditional(images)
        return Examples.of(denoiser, images, [[text] for text in self.texts], folder=encodings)

    def fitted(self, size: Size) -> PriorImages:
        """Return the images cropped and resized to a bucket, whose batches they share."""
        if self.images.shape[2:] == size:
            return self
        pictures = (Image.fromarray(image) for image in self.images.transpose(0, 2, 3, 1))
        fitted = np.stack([np.asarray(crop(image, size)) for image in pictures])
        return replace(self, images=fitted.transpose(0, 3, 1, 2).copy())


def prior_images(
    denoiser: Denoiser,
    shots: ImageSet,
    adaptation: Adaptation,
    sampling: SampleSettings,
    digest: str,
    *,
    cache: Path = CACHE,
    source_images: Path = SOURCE_IMAGES,
) -> PriorImages | None:
    """Return the images of prior preservation, or `None` where the method has no prior.

    No image has a text that is a target prompt, because the prior would work against the adaptation. Of
    several processes all must take part: they share the drawing.

    Args:
        denoiser: the source model, not trained yet, on its device; it draws images to be generated.
        shots: the few images. Generated images have their source prompts in turn, or the model's classes.
        adaptation: weights, prompts, and where the images come from.
        sampling: sampler, guidance and batch size.
        digest: the source model's.
        cache: folder of generated images; what is there already is not drawn again.
        source_images: folder with a folder of prepared images for each source.

    Raises:
        ConfigError: a prompt cannot be filled, or every source prompt is a target prompt.
        DataError: the source images are asked for and not there: `source_images` names them.
    """
    if not adaptation.weights.uses_prior:
        return None
    adapted = frozenset(texts_of(denoiser, adaptation, "target", shots) or ())
    if adaptation.takes_source_images:
        return _given(denoiser, adaptation, adapted, ImageSet.load(source_images / adaptation.source))
    texts = None
    if denoiser.conditional:
        known = denoiser.classes or texts_of(denoiser, adaptation, "source", shots) or ()
        others = [known[index] for index in _others(known, adapted, adaptation)]
        texts = tuple(islice(cycle(others), adaptation.prior.number))
    return _generated(denoiser, adaptation, sampling, texts, digest, cache)


def _given(
    denoiser: Denoiser, adaptation: Adaptation, adapted: Collection[str], everything: ImageSet
) -> PriorImages:
    """Return a draw of the source images, with their own source prompts."""
    prior = adaptation.prior
    texts = texts_of(denoiser, adaptation, "source", everything) or (None,) * len(everything)
    others = _others(texts, adapted, adaptation)
    number = min(prior.number, len(others))
    drawn = draw_indices(len(others), number, prior.seed, everything.origin)
    chosen = everything.take([others[index] for index in drawn])
    return PriorImages(chosen.images, texts_of(denoiser, adaptation, "source", chosen))


def _generated(
    denoiser: Denoiser,
    adaptation: Adaptation,
    sampling: SampleSettings,
    texts: tuple[str, ...] | None,
    digest: str,
    cache: Path,
) -> PriorImages:
    """Return images that the source model draws of texts, from the cache where they were drawn before."""
    prior = adaptation.prior
    settings = sampling.model_copy(update={"number": prior.number, "seed": prior.seed})
    inputs = {"prompts": repr(texts), "source": digest}
    folder = cache / checkpoint.run_key(settings.model_dump(mode="json"), inputs)
    if not (folder / "manifest.json").is_file():
        sample_to_folder(denoiser, folder, settings, texts, model="prior")
    return PriorImages(load_samples(folder), texts)


def _others(texts: Sequence[str | None], adapted: Collection[str], adaptation: Adaptation) -> list[int]:
    """Return the indices of the texts that are no target prompt."""
    others = [index for index, text in enumerate(texts) if text not in adapted]
    if not others:
        raise ConfigError(
            f"adaptations.{adaptation.name}: every source prompt is a target prompt too, so prior "
            "preservation would work against the adaptation: choose other prompts, or a method without prior"
        )
    return others
