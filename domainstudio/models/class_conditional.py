"""Class-conditional pixel-space models: a UNet with a class embedding, and the names of its classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from diffusers import UNet2DModel

from domainstudio.errors import CheckpointError, ConfigError
from domainstudio.models.pixel import PixelDenoiser, new_parts, read_parts
from domainstudio.models.unconditional import UnconditionalDenoiser

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler

    from domainstudio.config import NoiseSettings, UNetSettings
    from domainstudio.models.condition import Condition
    from domainstudio.models.denoiser import Denoiser

CLASSES = "classes.json"
"""The names beside `model_index.json`: a list in the order of the embedding's rows. Without it they are
"0", "1", ..."""

TABLE = "class_embedding.weight"
"""The embedding among the UNet's weights."""


class ClassConditionalDenoiser(PixelDenoiser):
    """A UNet that takes a class, whose embedding is added to the timestep's.

    An embedding with one more row than there are names has the null class last. Plain diffusers loads the
    folder, but DDPMPipeline and DDIMPipeline pass no classes when they sample: call their `unet` with
    `class_labels`.

    Args:
        network: the UNet, with `num_class_embeds`.
        scheduler: the scheduler saved with the model.
        pipeline: the class of the pipeline folder, kept when the model is saved.
        classes: names in the order of the embedding's rows; `None` numbers them.

    Raises:
        CheckpointError: names and embedding do not fit.
    """

    kind = "class-conditional"
    conditional = True

    def __init__(
        self,
        network: UNet2DModel,
        scheduler: DDPMScheduler | DDIMScheduler,
        pipeline: str = "DDIMPipeline",
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(network, scheduler, pipeline)
        rows = self._config.num_class_embeds
        self.classes = tuple(classes if classes is not None else map(str, range(rows)))
        _check_classes(self.classes, rows)
        self._rows = {name: row for row, name in enumerate(self.classes)}
        if rows > len(self.classes):
            self._rows[""] = len(self.classes)

    def condition(self, values: Sequence[str], size: tuple[int, int] | None = None) -> Condition:
        """Return the classes' rows of the embedding as `class_labels`, int64 with shape (N,).

        Args:
            values: names of classes; "" is the null class of classifier-free guidance.
            size: not used.

        Raises:
            ConfigError: there is no such class.
        """
        for name in values:
            if name not in self._rows:
                raise ConfigError(self._missing(name))
        device = next(self.network.parameters()).device
        return {"class_labels": torch.tensor([self._rows[name] for name in values], device=device)}

    def save(self, folder: Path, *, half: bool = False) -> None:
        """Write the pipeline folder and the names of the classes; of a model with adapters, these alone."""
        super().save(folder, half=half)
        if self.adapters is None:
            text = json.dumps(self.classes, ensure_ascii=False) + "\n"
            (folder / CLASSES).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, half: torch.dtype | None = None) -> Self:
        """Read a pipeline folder and the names of its classes (see `loading.Kind`)."""
        parts = read_parts(folder, half)
        kind = parts[0].config.class_embed_type
        if kind is not None:
            raise CheckpointError(
                f"{folder}/unet/config.json: class_embed_type {kind!r} is not supported; use a model whose "
                "classes are an embedding: num_class_embeds, and class_embed_type null"
            )
        return cls(*parts, _read_classes(folder / CLASSES))

    @classmethod
    def new(
        cls, unet: UNetSettings, noise: NoiseSettings, resolution: int, classes: Sequence[str]
    ) -> ClassConditionalDenoiser:
        """Make an untrained model with a null class, initialised from torch's global generator."""
        return cls(*new_parts(unet, noise, resolution, len(classes) + 1), classes)

    @classmethod
    def from_unconditional(cls, denoiser: Denoiser, classes: Sequence[str]) -> ClassConditionalDenoiser:
        """Give an unconditional model classes, and a null class.

        The new model has weights of its own. Its embedding starts at zero, so that under every class it is
        the unconditional model until it is trained.

        Args:
            denoiser: the model to start from, which stays as it is.
            classes: names of the classes.

        Raises:
            ConfigError: the model is of another kind.
        """
        if not isinstance(denoiser, UnconditionalDenoiser):
            raise ConfigError(
                f"pretrain_class.source: {denoiser.name_or_path} is not unconditional; name a model without "
                "classes"
            )
        old = denoiser.network
        # Private entries list what the folder left at its default: with them it would stay there.
        config = {name: value for name, value in denoiser._config.items() if not name.startswith("_")}
        network = UNet2DModel(**{**config, "num_class_embeds": len(classes) + 1})
        table = torch.zeros_like(network.state_dict()[TABLE])
        network.load_state_dict({**old.state_dict(), TABLE: table})
        network.to(next(old.parameters()).device)
        return cls(network, denoiser.scheduler, denoiser.pipeline, classes)

    def _missing(self, name: str) -> str:
        known = ", ".join(self.classes)
        if name:
            return f"the model has no class {name!r}; there are {known}"
        return (
            "the model has no null class, as it was not trained with condition dropout: guidance_scale must "
            f"be 1, condition_dropout 0, and every image needs a class; there are {known}"
        )


def _read_classes(path: Path) -> list[str] | None:
    if not path.exists():
        return None
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f'{path} must hold a list of names, such as ["cat", "dog"]')
    return classes


def _check_classes(classes: Sequence[str], rows: int) -> None:
    if "" in classes or len(set(classes)) < len(classes):
        raise CheckpointError(f"{CLASSES}: names must differ and not be empty, got {list(classes)}")
    if rows - len(classes) not in (0, 1):
        raise CheckpointError(
            f"{CLASSES}: there are {len(classes)} names and the embedding has {rows} rows; name each row but "
            "a null class at the end"
        )
