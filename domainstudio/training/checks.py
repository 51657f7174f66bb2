"""What a training refuses before its first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from domainstudio.data.buckets import bucket_sizes
from domainstudio.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from domainstudio.models.denoiser import Denoiser
    from domainstudio.training.examples import Examples


def check_images(examples: Examples, denoiser: Denoiser) -> None:
    """Refuse images that are none, or of a size that the model does not take.

    Raises:
        TrainingError: they do not fit.
    """
    if not len(examples):
        raise TrainingError("there are no training images")
    found, wanted = tuple(examples.images.shape[2:]), denoiser.resolution
    allowed = bucket_sizes(wanted[0]) if wanted[0] == wanted[1] else (wanted,)
    if found not in allowed:
        raise TrainingError(
            f"the images have {found[0]}x{found[1]} pixels and the model {wanted[0]}x{wanted[1]}: set "
            f"prepare.resolution to {wanted[0]}"
        )
    if found != wanted and any(side % denoiser.multiple for side in found):
        raise TrainingError(
            f"prepare.aspect_buckets made images of {found[0]}x{found[1]} pixels (height, width), and beside "
            f"its own {wanted[0]}x{wanted[1]} the model takes multiples of {denoiser.multiple} only: set "
            "prepare.aspect_buckets to false"
        )


def check_full_precision(parameters: Iterable[Tensor]) -> None:
    """Refuse to train weights of less than 32 bits.

    Raises:
        TrainingError: a weight is another.
    """
    if any(p.dtype != torch.float32 for p in parameters):
        raise TrainingError(
            "trainable parameters must be float32: load the model in float32 and choose "
            "finetune.mixed_precision"
        )
