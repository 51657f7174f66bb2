"""The demo's domains: a `.yaml` each, which says what to draw. They need no network."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from domainstudio.config.base import problems
from domainstudio.config.document import Document
from domainstudio.data.origins import Listing
from domainstudio.demo.domains.avatars import FaceDomain, list_faces
from domainstudio.demo.domains.emoji import EmojiDomain, list_emoji
from domainstudio.errors import ConfigError, DataError


def list_demo(path: str | Path) -> Listing:
    """List the images of a demo domain, without reading them.

    Args:
        path: The demo domain's `.yaml`: faces if it has the key `faces`, else emoji.

    Raises:
        DataError: the `.yaml` is missing or not usable, or the packages lack what it names.
        MissingExtraError: a package is not installed.
    """
    path = Path(path)
    try:
        content = Document.read(path).values
        if "faces" in content:
            return list_faces(FaceDomain.model_validate(content), path)
        return list_emoji(EmojiDomain.model_validate(content), path)
    except ConfigError as error:
        raise DataError(str(error)) from error
    except ValidationError as error:
        wrong = "\n".join(map(str, problems(error)))
        raise DataError(f"{path} does not describe a demo domain:\n{wrong}") from error
