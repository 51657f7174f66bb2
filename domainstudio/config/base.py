"""What every section of params.yaml shares: frozen, unknown keys refused, errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from domainstudio.errors import ConfigError

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]
"""A name that is safe as a folder, a DVC stage, an MLflow model and a URL."""


class Section(BaseModel):
    """Base of all settings: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


S = TypeVar("S", bound=Section)


def merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with overrides, also of single keys of a section inside, such as `lora.rank`."""
    result = dict(values)
    for key, value in overrides.items():
        inside = values.get(key)
        both = isinstance(inside, Mapping) and isinstance(value, Mapping)
        result[key] = merged(inside, value) if both else value  # type: ignore[arg-type]
    return result


def problems(error: ValidationError) -> str:
    """Return a line per problem: its dotted key, and what is wrong there."""
    return "\n".join(f"  {'.'.join(map(str, e['loc'])) or '(whole)'}: {e['msg']}" for e in error.errors())


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
        ConfigError: a key is missing, unknown or out of range.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where} is not usable:\n{problems(error)}") from error
