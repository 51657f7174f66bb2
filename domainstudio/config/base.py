"""What every section of params.yaml shares: frozen, unknown keys refused, errors that name the key."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from domainstudio.config.document import Document, Key
from domainstudio.errors import ConfigError
from domainstudio.redaction import redact

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]
"""A name that is safe as a folder, a DVC stage, an MLflow model and a URL."""

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
"""A text that says something: an empty path would be the project's root."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""A seed: what generators of 64 bits take, with room for the images after the first."""

MANY = 1_000_000
"""No stage draws or packs more images than this."""


class Section(BaseModel):
    """Base of all settings: immutable, unknown keys are errors, and numbers are finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        """Refuse true and false where a number is meant, as 1 and 0, and numbers where these are."""
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if name not in cls.model_fields:
                continue
            allowed = _parts(cls.model_fields[name].annotation)
            inside = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(each, bool) for each in inside) and not {bool, Any} & allowed:
                raise KeyedError((name,), f"true and false are not possible here, got {shown(value)}")
            if type(value) in (int, float) and allowed <= {bool, NoneType}:
                raise KeyedError((name,), f"must be true or false, got {shown(value)}")
        return values


S = TypeVar("S", bound=Section)


class KeyedError(ValueError):
    """A value is refused because of others; raised by validators of a section.

    Args:
        key: of the value, within the section.
        message: what is wrong, with the value.
    """

    def __init__(self, key: Sequence[str], message: str) -> None:
        self.key = tuple(key)
        super().__init__(message)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a value.

    Attributes:
        key: of the value.
        message: what is wrong, with the value.
        place: file and line, where they are known.
        absent: whether the key is missing.
    """

    key: Key
    message: str
    place: str = ""
    absent: bool = False

    def __str__(self) -> str:
        place = f"{self.place}: " if self.place else ""
        return f"  {place}{'.'.join(self.key) or '(whole)'}: {self.message}"

    def located(self, documents: Sequence[Document]) -> Problem:
        """Return the problem with its place: the last of the files that has most of its key."""
        document = max(reversed(documents), key=lambda each: each.depth(self.key))
        written = document.written(self.key)
        key = (*written, *self.key[-1:]) if self.absent else written or self.key
        return Problem(key, self.message, document.place(self.key), self.absent)


class SettingsError(ConfigError):
    """Settings are not usable.

    Args:
        where: what to call them.
        problems: all that is wrong.
    """

    def __init__(self, where: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__(f"{where} cannot be used:\n" + "\n".join(map(str, self.problems)))


def merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with overrides, also of single keys of a section inside, such as `lora.rank`."""
    result = dict(values)
    for key, value in overrides.items():
        inside = values.get(key)
        both = isinstance(inside, Mapping) and isinstance(value, Mapping)
        result[key] = merged(inside, value) if both else value  # type: ignore[arg-type]
    return result


def shown(value: Any) -> str:
    """Return a value as messages show it: short, and without passwords."""
    printer = reprlib.Repr()
    printer.maxstring = printer.maxother = 80
    return redact(printer.repr(value))


def problems(error: ValidationError) -> list[Problem]:
    """Return each problem of a validation: its key, what is wrong there, and the value."""
    found = []
    for each in error.errors():
        cause = each.get("ctx", {}).get("error")
        key = (*map(str, each["loc"]), *(cause.key if isinstance(cause, KeyedError) else ()))
        message = str(cause) if cause is not None else each["msg"]
        absent = each["type"] == "missing"
        if cause is None and not absent:
            message += f", got {shown(each['input'])}"
        found.append(Problem(key, message, absent=absent))
    return found


def replaced(values: Any, place: Sequence[str], value: Any) -> Any:
    """Return nested mappings with another value at a place; what is missing on the way there is made."""
    if not place:
        return value
    first, *rest = place
    known = values if isinstance(values, Mapping) else {}
    return {**known, first: replaced(known.get(first), rest, value)}


def validated(model: type[S], values: Mapping[str, Any], where: str) -> S:
    """Return values as settings.

    Args:
        model: the section's class.
        values: by key.
        where: what to call them in errors.

    Raises:
        SettingsError: a key is missing, unknown or out of range.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SettingsError(where, problems(error)) from error


def _parts(annotation: Any) -> set[Any]:
    """Return the types that an annotation is made of."""
    inner = get_args(annotation)
    return set().union(*map(_parts, inner)) if inner else {annotation}
