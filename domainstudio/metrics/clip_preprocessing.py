"""What a CLIP model sees of an image: resized, cropped and normalised pixels.

Not by transformers' own processor: without torchvision it works image by image on the CPU. It also rounds up
to one pixel in a hundred to another grey level, which would change recorded figures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from domainstudio.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MODES = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the resampling filters, by torch's names."""

STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
"""What CLIP's preprocessing does; a configuration that leaves one out is another preprocessing."""


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 images to CLIP's input, as transformers' `CLIPImageProcessor` with Pillow does it.

    Attributes:
        size: Height and width to resize to, or the length of the shorter side.
        crop: Height and width of the centre that is kept.
        mode: Filter, by torch's name.
        scale: Factor of the pixels, 1 / 255.
        mean: Of each channel, subtracted.
        std: Of each channel, divided by.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int]
    mode: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read `preprocessor_config.json`.

        Raises:
            CheckpointError: it is missing, or describes other steps than these.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            skipped = [key for key in STEPS if values.get(key) is False]
            if skipped:
                raise ValueError(f"{', '.join(skipped)} must not be false")
            size, crop = values["size"], values["crop_size"]
            if isinstance(size, dict):
                size = size.get("shortest_edge") or (size["height"], size["width"])
            crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
            if min(crop) < 1 or max(crop) > (size if isinstance(size, int) else min(size)):
                raise ValueError(f"crop_size {crop} must lie within size {size}")
            scale = values.get("rescale_factor") or 1 / 255
            mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
            return cls(size, crop, MODES[values["resample"]], scale, mean, std)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a CLIP model's preprocessing ({error!r}): name a model with the files of "
                "openai/clip-vit-large-patch14"
            ) from error

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 pixels with shape (N, 3, *crop) of uint8 images with shape (N, 3, H, W)."""
        import torch
        from torch.nn import functional

        height, width = self._resized(*images.shape[-2:])
        x = images.float()
        # Pillow resizes the width, rounds halves up to whole grey levels, then resizes the height.
        for target in (x.shape[-2], width), (height, width):
            if tuple(x.shape[-2:]) != target:
                x = functional.interpolate(x, target, mode=self.mode, antialias=True)
                x = (x + 0.5).floor().clamp(0, 255)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        x = x[..., top : top + self.crop[0], left : left + self.crop[1]] * self.scale
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        short, long = sorted((height, width))
        other = int(self.size * long / short)
        return (self.size, other) if height <= width else (other, self.size)
