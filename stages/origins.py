"""The origins of images that the pipeline knows beside folders. A new kind is a lister and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from domainstudio.config import Settings
from domainstudio.config.pretraining import PretrainingImages
from domainstudio.data import ImageSet
from domainstudio.data.origins import Entry, Lister, Listing, listing_of
from domainstudio.data.packing import prepare
from domainstudio.demo.domains import list_demo
from domainstudio.storage import s3


def list_s3(url: str) -> Listing:
    """List the objects of `s3://bucket/prefix` as if they were the files of a folder.

    Raises:
        DataError: as `storage.s3.list_objects`.
        MissingExtraError: boto3 is not installed.
    """
    return listing_of(
        Entry(
            item.path,
            item.url,
            item.size,
            item.read,
            None if s3.is_safe(item.path) else "its key is not a plain path. Rename the object",
            version=f"{item.etag} {item.size}" if item.etag else "",
        )
        for item in s3.list_objects(url)
    )


LISTERS: Mapping[str, Lister] = {"s3://*": list_s3, "*.yaml": list_demo, "*.yml": list_demo}
"""By the pattern of their origins."""


def prepared(settings: Settings, section: PretrainingImages) -> ImageSet:
    """Read, check and pack the images that a section trains a model on from scratch."""
    preparing = settings.prepare.model_copy(update={"resolution": section.resolution})
    return prepare(section.images, preparing, LISTERS, number=section.number, seed=section.seed)
