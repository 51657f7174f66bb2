"""The sections `prepare`, `sources` and `targets`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from domainstudio.config.base import MANY, Section, Seed, Text

NO_IMAGES = "demo/none.yaml"
"""The origin that stands for no images. DVC watches each origin, so it is a file."""


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
    """Train on images of about `resolution`² pixels whose shape is near the original's, in place of squares.
    For models that take several sizes: text-to-image models, and pixel-space models whose UNet can halve
    every side. Metrics still measure squares."""
    on_refusal: Literal["stop", "skip"] = "stop"
    """`stop` ends the stage with a list of all refused files. `skip` leaves them out and lists them in the
    manifest. Files that are not images are ignored in both cases."""


class SourceSettings(Section):
    """A pretrained model: the folder `models/sources/<name>`, in diffusers' format."""

    subjects: Text
    """A text file with one subject or class per line. Text-to-image and class-conditional models draw them in
    turn. The source model takes the line itself as its prompt or class. The adapted model takes its target
    prompt, with the line in the place of `{caption}` and `{label}`."""


class SourceImages(Section):
    """Real images of a source's domain."""

    images: Text
    """Their origin: a folder, an `s3://bucket/prefix`, or a `.yaml` that describes a demo domain.
    `demo/none.yaml` where you have none."""
    number: int | None = Field(default=None, ge=1, le=MANY)
    """How many, drawn at random with `seed`; `null` takes all."""
    seed: Seed = 0
    """Seed of that draw."""

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self.images != NO_IMAGES


class TargetSettings(Section):
    """A target domain: a few images to learn from, and the whole domain to measure against."""

    shots: Text
    """Origin of the training images: a folder, an `s3://bucket/prefix`, or a `.yaml` that describes a
    demo domain."""
    number: int | None = Field(default=None, ge=1, le=MANY)
    """Number of training images, drawn at random with `seed`; `null` takes all."""
    seed: Seed = 0
    """Seed of that draw."""
    domain: Text
    """Origin of the whole target domain, which samples are measured against. If you have no more images than
    the shots, name their origin again; the report then says so."""
    domain_number: int | None = Field(default=None, ge=1, le=MANY)
    """How many images of the domain to prepare, drawn at random with `seed`; `null` takes all. Metrics are
    the surer, the more there are."""
