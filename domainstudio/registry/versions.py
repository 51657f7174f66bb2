"""Versions of registered models: one per result, however often it is registered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio import models
from domainstudio.errors import CheckpointError
from domainstudio.models.kinds import has_adapters
from domainstudio.registry import audit
from domainstudio.registry.aliases import CHALLENGER, challenge
from domainstudio.registry.artifacts import Entry, log_model
from domainstudio.registry.tags import DIGEST, KEY, MEASUREMENT, PENDING, VERDICT
from domainstudio.tracking.server import connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

MAX_DESCRIPTION = 5000
"""MLflow's limit of a description, in characters."""


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    digest: str
    """Hash of the model folder: its weights and configurations."""
    created: bool
    """Whether this call created it; False if the same result was registered before."""


def register(entry: Entry, root: str | Path = ".") -> Registered:
    """Register a model folder, unless the same folder of the same key is registered already.

    The new version has the alias `challenger` until `judging.judge` promotes it. Its pyfunc draws images (see
    `serving`), and its artifacts hold a pipeline for diffusers (see `artifacts.stored_folders`).

    Raises:
        CheckpointError: the folder is neither a diffusers pipeline nor one of adapters, or the source model
            of the adapters is missing.
        MissingExtraError: adapters need peft, which is not installed.
        TrackingError: MLflow cannot be reached or refused.
    """
    if not (entry.folder / "model_index.json").is_file() and not has_adapters(entry.folder):
        raise CheckpointError(
            f"{entry.folder} has neither model_index.json nor adapter.json: it is no diffusers pipeline and "
            "no folder of adapters. Run finetune"
        )
    digest = models.digest(entry.folder)
    with connect(root) as client:
        if (known := find_version(client, entry.name, entry.key, digest)) is not None:
            _update_measurement(client, entry, known)
            return Registered(entry.name, str(known.version), digest, created=False)
        model_id = log_model(client, entry, digest)
        _create_model(client, entry)
        version = _create_version(client, entry, digest, model_id)
        first = find_version(client, entry.name, entry.key, digest)
        if first is not None and str(first.version) != version:  # another process was faster
            client.delete_model_version(entry.name, version)
            return Registered(entry.name, str(first.version), digest, created=False)
        challenge(client, entry.name, version)
        why = f"a result of {entry.folder.name}, not judged yet"
        audit.record(client, entry.name, "registered", version, CHALLENGER, why)
        return Registered(entry.name, version, digest, created=True)


def find_version(client: MlflowClient, name: str, key: str, digest: str) -> ModelVersion | None:
    """Return the oldest version of a model with this key and folder digest, or None."""
    found = client.search_model_versions(
        f"name = '{name}' and tags.`{KEY}` = '{key}' and tags.`{DIGEST}` = '{digest}'"
    )
    return min(found, key=lambda version: int(version.version), default=None)


def shorten(card: str) -> str:
    """Return a model card that fits MLflow's description; the whole card is the run's `model_card.md`."""
    note = "\n\n… The whole card is the artifact `model_card.md` of the run.\n"
    return card if len(card) <= MAX_DESCRIPTION else card[: MAX_DESCRIPTION - len(note)] + note


def _update_measurement(client: MlflowClient, entry: Entry, version: ModelVersion) -> None:
    if version.tags.get(MEASUREMENT) != entry.tags.get(MEASUREMENT):
        for tag, value in entry.tags.items():
            client.set_model_version_tag(entry.name, version.version, tag, value)


def _create_model(client: MlflowClient, entry: Entry) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(entry.name, description=entry.summary)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_registered_model(entry.name, entry.summary)


def _create_version(client: MlflowClient, entry: Entry, digest: str, model_id: str) -> str:
    # The tags are part of the request. If they were set afterwards, a process that is killed in between would
    # leave a version that the next process does not recognise.
    version = client.create_model_version(
        entry.name,
        source=f"models:/{model_id}",
        run_id=entry.run_id,
        tags={**entry.tags, KEY: entry.key, DIGEST: digest, VERDICT: PENDING},
        model_id=model_id,
    )
    return str(version.version)
