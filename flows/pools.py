"""The job template of the Kubernetes work pool, with a cluster's own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from domainstudio.errors import ConfigError

TEMPLATE = Path(__file__).parents[1] / "deploy" / "kubernetes-pool.yaml"
_GIVEN = "given"
"""Key of a variable in the pool's template: its default is the cluster's own."""


def read_job_variables(path: Path) -> dict[str, Any]:
    """Read a cluster's defaults of the template's variables.

    Raises:
        ConfigError: the file cannot be read, or names something that is no variable of the template.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    known = sorted(_variables(_read()))
    if not isinstance(given, dict):
        raise ConfigError(f"{path} must map variables of {TEMPLATE.name} to their defaults")
    if unknown := sorted(set(given) - set(known)):
        names = ", ".join(map(str, unknown))
        raise ConfigError(f"{path}: {TEMPLATE.name} has no variable {names}; it has {', '.join(known)}")
    return given


def template(given: Mapping[str, Any] | None, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pool's job template.

    Args:
        given: The cluster's defaults by variable; None keeps those of `before`.
        before: The template that the pool has; empty without one.
    """
    made = _read()
    if given is None:
        present = _variables(before)
        given = {name: each["default"] for name, each in present.items() if each.get(_GIVEN)}
    variables = _variables(made)
    for name, value in given.items():
        if name in variables:  # else a version of the template that has it no more
            variables[name] |= {"default": value, _GIVEN: True}
    return made


def _read() -> dict[str, Any]:
    return dict(yaml.safe_load(TEMPLATE.read_text(encoding="utf-8")))


def _variables(template: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = template.get("variables", {}).get("properties", {})
    return found
