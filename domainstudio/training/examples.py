"""Training images together with their conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from domainstudio.data import prompts
from domainstudio.errors import TrainingError
from domainstudio.models.condition import take, to_device
from domainstudio.training.latents import condition_all, encode_all
from domainstudio.training.objective import Batch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from domainstudio.config import Adaptation, TrainingSettings
    from domainstudio.data import ImageSet
    from domainstudio.models.condition import Condition
    from domainstudio.models.denoiser import Denoiser


@dataclass(frozen=True)
class Examples:
    """Images and their conditions, all on the CPU.

    Attributes:
        images: uint8, with shape (N, 3, H, W).
        condition: condition of the model in training: tensors with shape (N, V, ...), of which each draw
            takes one of the V variants.
        source_condition: condition of the frozen source model, in the same form.
    """

    images: Tensor
    condition: Condition
    source_condition: Condition

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def unconditional(cls, images: NDArray[np.uint8]) -> Examples:
        """Return examples for a model without conditions."""
        return cls(torch.from_numpy(images), {}, {})

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        images: NDArray[np.uint8],
        texts: Sequence[Sequence[str]],
        source_texts: Sequence[Sequence[str]] | None = None,
        folder: Path | None = None,
    ) -> Examples:
        """Return examples with conditions of texts, encoded once.

        Args:
            denoiser: makes the conditions.
            images: uint8, with shape (N, 3, H, W).
            texts: prompts or classes of each image; several are variants, repeated to equal number.
            source_texts: prompts or classes for the source model, by default the same.
            folder: where encoded prompts are kept between runs.
        """
        size = images.shape[2], images.shape[3]
        condition = _variants(denoiser, texts, folder, size)
        source = condition if source_texts is None else _variants(denoiser, source_texts, folder, size)
        return cls(torch.from_numpy(images), condition, source)


class Feed:
    """Draws batches of examples: which images, mirrored or not, and with which condition.

    Images of models that encode are encoded once, mirrored ones too, so that augmentation still varies.

    Args:
        examples: what to draw from.
        denoiser: encodes; on the training device.
        settings: how images vary.
        latents: folder that keeps encoded images between runs.
        pixels: whether batches need the images themselves, where x0 is drawn from encoded ones.
    """

    def __init__(
        self,
        examples: Examples,
        denoiser: Denoiser,
        settings: TrainingSettings,
        latents: Path | None,
        *,
        pixels: bool = True,
    ) -> None:
        self.examples, self.denoiser, self.settings = examples, denoiser, settings
        self.device = next(denoiser.network.parameters()).device
        self.encoded = encode_all(denoiser, examples.images, settings.horizontal_flip, latents)
        self.pixels = pixels or self.encoded is None
        size = examples.images.shape[2], examples.images.shape[3]
        self.nothing: Condition = denoiser.condition([""], size) if settings.condition_dropout else {}

    def draw(
        self, draw: torch.Generator, noise: torch.Generator, batch_size: int, processes: int, rank: int
    ) -> Batch:
        """Return one process's share of a global batch, without replacement where that is possible.

        Args:
            draw: draws the same in every process.
            noise: draws of this process alone.
            batch_size: images per process.
            processes: number of processes.
            rank: this process.
        """
        number, size = len(self.examples), batch_size * processes
        rounds = [torch.randperm(number, generator=draw) for _ in range(-(-size // number))]
        flips = torch.rand(size, generator=draw) < 0.5
        mine = slice(rank * batch_size, (rank + 1) * batch_size)
        index = torch.cat(rounds)[:size][mine]
        flip = flips[mine] & self.settings.horizontal_flip
        images = self._images(index, flip) if self.pixels else torch.empty(batch_size, 0)
        if self.encoded is None:
            encoded = self.denoiser.encode(images)
        else:
            encoded = self._sent(self.encoded[flip.long(), index])
        condition, source_condition = self._conditions(draw, index, size, mine)
        return Batch(images, self.denoiser.x0(encoded, noise), condition, source_condition)

    def _images(self, index: Tensor, flip: Tensor) -> Tensor:
        """Return images in [-1, 1], with shape (N, 3, H, W), those mirrored that `flip` says."""
        images = self._sent(self.examples.images[index]).float() / 127.5 - 1
        return torch.where(self._sent(flip).view(-1, 1, 1, 1), images.flip(3), images)

    def _sent(self, values: Tensor) -> Tensor:
        """Return values on the training device; from pinned memory they go there while the CPU goes on."""
        if self.device.type != "cuda":
            return values.to(self.device)
        return values.pin_memory().to(self.device, non_blocking=True)

    def _conditions(
        self, draw: torch.Generator, index: Tensor, size: int, mine: slice
    ) -> tuple[Condition, Condition]:
        examples = self.examples
        if not examples.condition:
            return {}, {}
        variant = torch.rand(size, generator=draw)[mine]
        condition = take(examples.condition, index, variant)
        source = take(examples.source_condition, index, variant)
        if self.settings.condition_dropout:
            dropped = torch.rand(size, generator=draw)[mine] < self.settings.condition_dropout
            condition, source = (self._drop(each, dropped) for each in (condition, source))
        return to_device(condition, self.device), to_device(source, self.device)

    def _drop(self, condition: Condition, dropped: Tensor) -> dict[str, Tensor]:
        return {
            name: torch.where(dropped.view(-1, *[1] * (values.ndim - 1)), self.nothing[name].cpu(), values)
            for name, values in condition.items()
        }


def texts_of(
    denoiser: Denoiser, adaptation: Adaptation, kind: Literal["source", "target"], images: ImageSet
) -> tuple[str, ...] | None:
    """Return the prompt or class of each image, or `None` for an unconditional model.

    Args:
        denoiser: the model.
        adaptation: the prompts.
        kind: those of the source domain or of the target domain.
        images: fill the prompts' fields.

    Raises:
        ConfigError: a prompt cannot be filled.
    """
    return prompts.of_images(adaptation, kind, images.records) if denoiser.conditional else None


def _variants(
    denoiser: Denoiser, texts: Sequence[Sequence[str]], folder: Path | None, size: tuple[int, int]
) -> dict[str, Tensor]:
    if not all(texts):
        raise TrainingError(
            "an image has no prompt: give every image a caption, or set a prompt without {caption}"
        )
    number = max(len(each) for each in texts)
    padded = [each[i % len(each)] for each in texts for i in range(number)]
    unique = sorted(set(padded))
    condition = condition_all(denoiser, unique, folder, size)
    row = {text: index for index, text in enumerate(unique)}
    rows = torch.tensor([row[text] for text in padded]).view(len(texts), number)
    return {name: values[rows] for name, values in condition.items()}
