"""Versions of registered models: one per result, however often it is registered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio import models
from domainstudio.errors import CheckpointError
from domainstudio.models.kinds import has_adapters
from domainstudio.registry import audit
from domainstudio.registry.aliases import CHALLENGER, MEASURED, PENDING, VERDICT, challenge
from domainstudio.registry.artifacts import DIGEST, KEY, Entry, log_model
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
    """Of the model folder: its weights and configurations."""
    created: bool
    """Whether this call made it; False where the same result was registered before."""


def register(entry: Entry, root: str | Path = ".") -> Registered:
    """Register a model folder, unless the same folder of the same key is registered already.

    The new version has the alias `challenger` until `mlflow_registry.judge` promotes it.
    The version's pyfunc draws images (see `pyfunc_model`), and its artifacts hold a pipeline that diffusers
    loads (see `mlflow_model.stored_folders`).

    Raises:
        CheckpointError: the folder is neither a diffusers pipeline nor one of adapters, or the source model
            of the adapters is gone.
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
            if known.tags.get(MEASURED) != entry.tags.get(MEASURED):  # the same model, measured anew
                for tag, value in entry.tags.items():
                    client.set_model_version_tag(entry.name, known.version, tag, value)
            return Registered(entry.name, str(known.version), digest, created=False)
        model_id = log_model(client, entry, digest)
        _create_model(client, entry)
        version = _create_version(client, entry, digest, model_id)
        first = find_version(client, entry.name, entry.key, digest)
        if first is not None and str(first.version) != version:  # another process was a moment faster
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
    """Return a model card that fits MLflow's description; the whole is the run's `model_card.md`."""
    note = "\n\n… The whole card is the artifact `model_card.md` of the run.\n"
    return card if len(card) <= MAX_DESCRIPTION else card[: MAX_DESCRIPTION - len(note)] + note


def _create_model(client: MlflowClient, entry: Entry) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(entry.name, description=entry.summary)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_registered_model(entry.name, entry.summary)


def _create_version(client: MlflowClient, entry: Entry, digest: str, model_id: str) -> str:
    # Tags travel with the request that makes the version: were they set afterwards, a process that is
    # killed in between would leave a version which the next one cannot recognise.
    version = client.create_model_version(
        entry.name,
        source=f"models:/{model_id}",
        run_id=entry.run_id,
        tags={**entry.tags, KEY: entry.key, DIGEST: digest, VERDICT: PENDING},
        model_id=model_id,
    )
    return str(version.version)
