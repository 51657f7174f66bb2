"""Images: how they are prepared, and the sections `sources` and `targets`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from domainstudio.config.base import Section


class PrepareSettings(Section):
    """How images are read, checked, cropped and packed."""

    resolution: int = Field(ge=8, le=2048, multiple_of=8)
    """Height and width of the prepared images, in pixels."""
    crop: Literal["center", "pad"] = "center"
    """`center` keeps the largest centred square; `pad` keeps everything on a square of `background`."""
    background: str = "#ffffff"
    """Colour under transparent pixels and around padded images, as `#rrggbb`."""
    min_size: int = Field(default=16, ge=1)
    """Images whose shorter side has fewer pixels are refused."""
    aspect_buckets: bool = False
    """Train on images of the nearest aspect ratio with about `resolution`² pixels, in place of squares. For
    models that take several sizes: text-to-image ones, and pixel-space ones whose UNet can halve every side.
    The domain stays square."""
    on_refusal: Literal["stop", "skip"] = "stop"
    """`stop`: refused files end the stage with a list of all of them. `skip`: they are left out and listed in
    the manifest. Stray files that are not images are never errors."""


class SourceSettings(Section):
    """A pretrained model, the folder `models/sources/<name>` in diffusers' format."""

    subjects: str
    """A text file with a subject or class per line. Text-to-image and class-conditional models draw them in
    turn. In an adaptation's prompts a subject takes the place of `{caption}` and `{label}`; for the source
    model the subject itself is the prompt or class."""


class TargetSettings(Section):
    """A target domain: the few images to learn from, and the whole domain to measure against."""

    shots: str
    """Origin of the training images: a folder, an `s3://bucket/prefix`, or a `.yaml` that describes a
    demo domain."""
    number: int | None = Field(default=None, ge=1)
    """How many of them to take, drawn with `seed`; `null` takes all."""
    seed: int = Field(default=0, ge=0)
    """Seed of that draw."""
    domain: str
    """Origin of the whole target domain, the reference of the Fréchet distance. Without one, name the shots
    again; the report then says so."""
