"""Aliases of a registered model: which version is in use, who decided that, and how it is undone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from domainstudio.config import Settings
from domainstudio.errors import ConfigError
from domainstudio.registry import audit
from domainstudio.tracking.server import TrackingError, connect

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CHALLENGER = "challenger"
"""Alias of the newest version that has not become the champion."""


@dataclass(frozen=True)
class Alias:
    """An alias of a registered model. It marks the version to use."""

    model: str
    name: str = "champion"
    root: str | Path = "."
    """The project's root."""

    @classmethod
    def of(cls, adaptation: str, settings: Settings, root: str | Path = ".") -> Self:
        """Return the alias of an adaptation's model, as the section `registry` names both.

        Raises:
            ConfigError: params.yaml has no such adaptation, or names no model for it.
        """
        name = settings.adaptation(adaptation).name
        if (model := settings.registry.models.get(name)) is None:
            raise ConfigError(
                f"registry.models of params.yaml names no model for {name}: add `{name}: <the model's name>`"
            )
        return cls(model, settings.registry.alias, root)

    @property
    def previous(self) -> str:
        """Alias of the version before."""
        return f"previous_{self.name}"

    @property
    def rolled_back(self) -> str:
        """Tag of a version that lost this alias by a rollback: the time."""
        return f"rolled_back_{self.name}"


@dataclass(frozen=True)
class Promotion:
    """What became of a version."""

    model: str
    version: str
    promoted: bool
    """Whether the version has the alias now."""
    reason: str
    """Why it has the alias, or has not."""
    previous: str | None
    """The version that had the alias before this call, if any."""
    changed: bool
    """Whether this call moved the alias."""

    def describe(self, alias: str, adaptation: str) -> str:
        """Return one or two lines for people: which version has the alias, and what they can do."""
        if self.promoted:
            before = f", before it was {self.previous}" if self.changed and self.previous else ""
            return f"{self.model}@{alias} is version {self.version}{before}: {self.reason}"
        named = f"{self.model}@{alias}"
        stays = f"{named} stays version {self.previous}" if self.previous else f"{self.model} has no {alias}"
        by_hand = f"python -m stages.register --promote {self.version} --reason WHY {adaptation}"
        return f"{stays}; version {self.version}: {self.reason}\ntake it all the same: {by_hand}"


def promote(alias: Alias, version: str, reason: str, by: str | None = None) -> Promotion:
    """Give the alias to a version by hand, whatever the gate's verdict is.

    Args:
        alias: The alias.
        version: The number of any version of its model.
        reason: Why, for the audit trail.
        by: Who decided; by default git's user.

    Raises:
        TrackingError: MLflow cannot be reached, or there is no such version.
    """
    with connect(alias.root) as client:
        client.get_model_version(alias.model, version)
        holder = current_aliases(client, alias.model).get(alias.name)
        if holder == version:
            reason = f"it is {alias.name} already"
        else:
            give(client, alias, version, "promoted by hand", reason, by)
        return Promotion(alias.model, version, True, reason, holder, changed=holder != version)


def rollback(alias: Alias, reason: str = "", by: str | None = None) -> Promotion:
    """Give the alias back to the version that had it before. A second call goes back one version more.

    The version that loses the alias is marked, so registering the same result again does not promote it.

    Args:
        alias: The alias.
        reason: Why, for the audit trail.
        by: Who decided; by default git's user.

    Returns:
        The version that has the alias now; `previous` is the one that lost it.

    Raises:
        TrackingError: no version has the alias, or no other version had it before.
    """
    model, name = alias.model, alias.name
    with connect(alias.root) as client:
        if (current := current_aliases(client, model).get(name)) is None:
            raise TrackingError(f"{model} has no version with alias {name!r}: there is nothing to roll back")
        *earlier, _ = audit.holders(audit.read(client.get_registered_model(model).tags), name, current)
        if not earlier:
            raise TrackingError(
                f"version {current} is the first of {model} with alias {name!r}: there is nothing before it"
            )
        *before, version = earlier
        reason = f"rollback from version {current}. {reason}".strip()
        if before:
            client.set_registered_model_alias(model, alias.previous, before[-1])
        elif alias.previous in current_aliases(client, model):
            client.delete_registered_model_alias(model, alias.previous)
        _set(client, alias, version, reason)
        client.set_model_version_tag(model, current, alias.rolled_back, _now())
        audit.record(client, model, "rolled back", version, name, reason, by)
        return Promotion(model, version, True, reason, current, changed=True)


def history(alias: Alias) -> list[audit.Event]:
    """Return every decision about the alias's model, the oldest first.

    Raises:
        TrackingError: MLflow cannot be reached, or there is no such model.
    """
    with connect(alias.root) as client:
        return audit.read(client.get_registered_model(alias.model).tags)


def version_number(alias: Alias, version: str) -> str:
    """Return the number of a version of the alias's model.

    Args:
        alias: Names the model.
        version: A number, or any alias of the model.

    Raises:
        TrackingError: MLflow cannot be reached, or there is no such model or version.
    """
    with connect(alias.root) as client:
        if version.isdigit():
            return str(client.get_model_version(alias.model, version).version)
        if (found := current_aliases(client, alias.model).get(version)) is None:
            raise TrackingError(
                f"{alias.model} has no version with alias {version!r}: give a version's number"
            )
        return found


def current_aliases(client: MlflowClient, model: str) -> dict[str, str]:
    """Return a model's aliases, with the version of each."""
    return {alias: str(version) for alias, version in client.get_registered_model(model).aliases.items()}


def give(
    client: MlflowClient, alias: Alias, version: str, what: audit.Action, reason: str, by: str | None = None
) -> None:
    """Give the alias to a version and record who had it. After a kill, a second call completes the first."""
    aliases = current_aliases(client, alias.model)
    if (holder := aliases.get(alias.name)) not in (None, version):
        client.set_registered_model_alias(alias.model, alias.previous, holder)
    _set(client, alias, version, reason)
    if aliases.get(CHALLENGER) == version:
        client.delete_registered_model_alias(alias.model, CHALLENGER)
    audit.record(client, alias.model, what, version, alias.name, reason, by)


def challenge(client: MlflowClient, model: str, version: str) -> None:
    """Give the alias `challenger` to a version, unless a newer version has it."""
    if int(current_aliases(client, model).get(CHALLENGER, 0)) < int(version):
        client.set_registered_model_alias(model, CHALLENGER, version)


def _set(client: MlflowClient, alias: Alias, version: str, reason: str) -> None:
    client.set_model_version_tag(alias.model, version, f"{alias.name}_reason", reason)
    client.set_model_version_tag(alias.model, version, f"{alias.name}_since", _now())
    client.set_registered_model_alias(alias.model, alias.name, version)
    if alias.rolled_back in client.get_model_version(alias.model, version).tags:
        client.delete_model_version_tag(alias.model, version, alias.rolled_back)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
