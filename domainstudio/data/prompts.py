"""Prompts and classes: templates filled from the manifest, files of subjects, and paraphrases."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from domainstudio.errors import ConfigError

if TYPE_CHECKING:
    from domainstudio.config import Adaptation, PromptPair
    from domainstudio.data import ImageRecord

FIELDS = ("caption", "label")

Kind = Literal["source", "target"]
"""Of a pair of prompts: the source domain's or the target domain's."""


def of_image(template: str, record: ImageRecord, where: str) -> str:
    """Return a template with `{caption}` and `{label}` of an image.

    Args:
        template: for example `{caption} in [V] style`; without fields it is the prompt of every image.
        record: the image's record.
        where: the params key of the template, for errors.

    Raises:
        ConfigError: a field is unknown, or the image has none.
    """
    _check(template, [record], where)
    return template.format(**_values(record))


def of_images(adaptation: Adaptation, kind: Kind, records: Sequence[ImageRecord]) -> tuple[str, ...]:
    """Return the prompt or class of each image.

    Args:
        adaptation: the prompts.
        kind: those of the source domain or of the target domain.
        records: the images' records.

    Raises:
        ConfigError: a field is unknown, or images have none; it names all of them.
    """
    chosen = [_template(adaptation, kind, record) for record in records]
    for template, where in dict.fromkeys(chosen):
        _check(template, [each for each, own in zip(records, chosen, strict=True) if own[1] == where], where)
    return tuple(own[0].format(**_values(each)) for each, own in zip(records, chosen, strict=True))


def _template(adaptation: Adaptation, kind: Kind, record: ImageRecord) -> tuple[str, str]:
    """Return an image's template, and its key in params.yaml."""
    pair: PromptPair = adaptation.prompts
    where = f"adaptations.{adaptation.name}.prompts"
    if record.label in adaptation.prompts.by_label:
        pair, where = adaptation.prompts.by_label[record.label], f"{where}.by_label.{record.label}"
    return getattr(pair, kind), f"{where}.{kind}"


def _check(template: str, records: Sequence[ImageRecord], where: str) -> None:
    for name in _fields(template, where):
        if lacking := [str(record.origin) for record in records if not _values(record)[name]]:
            number = "an image has" if len(lacking) == 1 else f"{len(lacking)} images have"
            raise ConfigError(
                f"{where} {template!r}: {number} no {name}: {', '.join(lacking)}. Give each one (a .txt file "
                f"of the same name for a caption, a folder for a label), or leave {{{name}}} out"
            )


def _values(record: ImageRecord) -> dict[str, str]:
    return {"caption": record.caption, "label": record.label or ""}


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
