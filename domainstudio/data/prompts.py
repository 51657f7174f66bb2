"""Prompts and classes: templates filled from the manifest, files of subjects, and paraphrases."""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from domainstudio.errors import ConfigError

if TYPE_CHECKING:
    from domainstudio.config import Adaptation
    from domainstudio.data import ImageRecord

FIELDS = ("caption", "label")


def of_image(template: str, record: ImageRecord, where: str) -> str:
    """Return a template with `{caption}` and `{label}` of an image.

    Args:
        template: for example `{caption} in [V] style`; without fields it is the prompt of every image.
        record: the image's record.
        where: the params key of the template, for errors.

    Raises:
        ConfigError: a field is unknown, or the image has none.
    """
    values = {"caption": record.caption, "label": record.label or ""}
    for name in _fields(template, where):
        if not values[name]:
            raise ConfigError(
                f"{where} {template!r}: the image {record.origin} has no {name}. Give it one (a .txt file of "
                f"the same name for a caption, a folder for a label), or leave {{{name}}} out"
            )
    return template.format(**values)


def of_subject(template: str, subject: str, where: str) -> str:
    """Return a template with a subject in the place of `{caption}` and `{label}`.

    Raises:
        ConfigError: a field is unknown.
    """
    _fields(template, where)
    return template.format(caption=subject, label=subject)


def sample_prompts(adaptation: Adaptation, subjects: list[str]) -> list[str]:
    """Return the adapted model's prompt or class of each subject.

    Raises:
        ConfigError: the target prompt is malformed.
    """
    where = f"adaptations.{adaptation.name}.prompts.target"
    return [of_subject(adaptation.prompts.target, subject, where) for subject in subjects]


def read_subjects(path: str | Path) -> list[str]:
    """Read a file with a subject per line, without empty lines and lines that begin with #.

    Raises:
        ConfigError: the file is missing, is not UTF-8, or holds no subject.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of subjects {path} cannot be read: {error}") from error
    subjects = [line for line in lines if line and not line.startswith("#")]
    if not subjects:
        raise ConfigError(f"the file of subjects {path} is empty: write a subject or class per line")
    return subjects


def paraphrases(record: ImageRecord, number: int) -> list[str]:
    """Return texts that describe an image: caption, first keyword, and `number` draws of three keywords."""
    rng = np.random.default_rng([ord(character) for character in record.id])
    texts = [record.caption, record.keywords[0] if record.keywords else record.caption]
    others = list(record.keywords[1:])
    for _ in range(number if others else 0):
        texts.append(", ".join(rng.choice(others, size=min(3, len(others)), replace=False)))
    return texts


def _fields(template: str, where: str) -> list[str]:
    """Return the fields of a template.

    Raises:
        ConfigError: it is malformed, or names a field that no image has.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"{where} {template!r} is not a template: {error}") from error
    for name in names:
        if name not in FIELDS:
            raise ConfigError(f"{where} {template!r}: {{{name}}} is none of {{caption}} and {{label}}")
    return names
