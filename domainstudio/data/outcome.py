"""What became of one file that was meant as an image: what is known of it, or why it is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from domainstudio.config import PrepareSettings
from domainstudio.data.buckets import Size
from domainstudio.data.image_set import ImageRecord
from domainstudio.data.origins import Candidate, printable
from domainstudio.data.reading import Prepared, prepare_image
from domainstudio.errors import DataError


@dataclass(frozen=True)
class Outcome:
    """What is known of one candidate, without its pixels.

    Attributes:
        refusal: Why it cannot be used, or None.
        sha256: Hash of the file's bytes.
        pixels: Hash of the prepared square.
        width: Pixels of the upright original.
        height: The same.
        bucket: Height and width of the image in its bucket, if one was asked for.
        caption: Its caption, or an empty string.
        attributes: What is known of it, by the attribute's name.
    """

    refusal: str | None = None
    sha256: str = ""
    pixels: str = ""
    width: int = 0
    height: int = 0
    bucket: Size | None = None
    caption: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)

    def record(self, candidate: Candidate) -> ImageRecord:
        """Return the manifest's record of the candidate, which was not refused."""
        return ImageRecord(
            id=candidate.id,
            sha256=self.sha256,
            width=self.width,
            height=self.height,
            origin=candidate.origin,
            caption=self.caption,
            label=candidate.label,
            codepoint=candidate.codepoint,
            keywords=candidate.keywords,
            attributes=self.attributes,
        )


def read_candidate(
    candidate: Candidate, settings: PrepareSettings, buckets: bool
) -> tuple[Outcome, Prepared | None]:
    """Read and prepare an image; no pixels are returned where it is refused.

    Args:
        candidate: The file.
        settings: Section `prepare` of `params.yaml`.
        buckets: Make the image in its aspect-ratio bucket too.

    Raises:
        MissingExtraError: a package that draws it is not installed.
    """
    try:
        data, caption = candidate.read(), candidate.caption()
        picture = candidate.rasterize(data, settings.resolution) if candidate.rasterize else data
        prepared = prepare_image(picture, settings, buckets)
        attributes = candidate.attributes()
    except DataError as error:
        return Outcome(printable(str(error))), None
    bucketed = prepared.bucketed
    outcome = Outcome(
        sha256=hashlib.sha256(data).hexdigest(),
        pixels=hashlib.sha256(prepared.pixels.data).hexdigest(),
        width=prepared.width,
        height=prepared.height,
        bucket=None if bucketed is None else (bucketed.shape[1], bucketed.shape[2]),
        caption=caption,
        attributes=attributes,
    )
    return outcome, prepared
