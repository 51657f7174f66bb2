"""Registered models: one per adaptation, one version per result, and an alias that can be taken back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio import models
from domainstudio.errors import CheckpointError
from domainstudio.integrations import mlflow_store
from domainstudio.integrations.mlflow_store import TrackingError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

KEY, DIGEST = "domainstudio.key", "domainstudio.digest"
"""Tags by which the version of a result is found again."""

MAX_DESCRIPTION = 5000
"""MLflow's limit of a description, in characters."""


@dataclass(frozen=True)
class Entry:
    """What is registered: a model folder and what people want to know of it."""

    name: str
    """Name of the registered model."""
    folder: Path
    """The model in diffusers' format."""
    key: str
    """Hash of the parameters and inputs that made it."""
    run_id: str
    """The run that made it."""
    summary: str
    """One paragraph, the registered model's description."""
    card: str
    """The version's description, Markdown."""
    tags: Mapping[str, str]
    """The version's tags."""
    step: int = 0
    """The optimiser step at which it was saved."""
    seed: int = 0
    """Default of the parameter `seed`."""
    sampling_steps: int = 30
    """Default of the parameter `steps`."""


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

    The version's pyfunc draws images (see `pyfunc_model`), and its artifact `artifacts/<folder's name>` is
    the folder itself, which diffusers loads.

    Raises:
        CheckpointError: the folder is no diffusers pipeline.
        TrackingError: MLflow cannot be reached or refused.
    """
    if not (entry.folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{entry.folder} has no model_index.json: it is no diffusers pipeline. Run finetune"
        )
    digest = models.digest(entry.folder)
    with talking(root) as client:
        if (known := find_version(client, entry.name, entry.key, digest)) is not None:
            return Registered(entry.name, str(known.version), digest, created=False)
        _create_model(client, entry)
        model_id = _log_model(client, entry, digest)
        # Tags travel with the request that makes the version: were they set afterwards, a process that
        # is killed in between would leave a version which the next one cannot recognise.
        version = client.create_model_version(
            entry.name,
            source=f"models:/{model_id}",
            run_id=entry.run_id,
            tags={**entry.tags, KEY: entry.key, DIGEST: digest},
            description=shorten(entry.card),
            model_id=model_id,
        )
        return Registered(entry.name, str(version.version), digest, created=True)


def set_alias(name: str, version: str, alias: str, reason: str, root: str | Path = ".") -> str | None:
    """Give an alias to a version, and note in its tags who had it before, why and when.

    MLflow keeps no history of aliases; these tags are what `rollback` reads.

    Returns:
        The version that had the alias before; None if there was none or it was this one.

    Raises:
        TrackingError: MLflow cannot be reached, or there is no such version.
    """
    with talking(root) as client:
        previous = alias_holder(client, name, alias)
        if previous == version:
            return None
        if previous is not None:
            client.set_model_version_tag(name, version, f"previous_{alias}", previous)
        _move(client, name, version, alias, reason)
        if f"rolled_back_{alias}" in client.get_model_version(name, version).tags:
            client.delete_model_version_tag(name, version, f"rolled_back_{alias}")
        return previous


def rollback(name: str, alias: str, reason: str = "", root: str | Path = ".") -> tuple[str, str]:
    """Give an alias back to the version that had it before the present holder.

    A second call goes back one version more. The version that loses the alias is marked, so that registering
    the same result again does not promote it again.

    Returns:
        The version that had the alias, and the one that has it now.

    Raises:
        TrackingError: no version has the alias, or none had it before.
    """
    with talking(root) as client:
        if (current := alias_holder(client, name, alias)) is None:
            raise TrackingError(f"{name} has no version with alias {alias!r}: there is nothing to roll back")
        previous = client.get_model_version(name, current).tags.get(f"previous_{alias}")
        if previous is None:
            raise TrackingError(
                f"version {current} is the first of {name} with alias {alias!r}: there is nothing before it"
            )
        _move(client, name, previous, alias, f"rollback from version {current}. {reason}".strip())
        client.set_model_version_tag(name, current, f"rolled_back_{alias}", _now())
        return current, previous


def was_rolled_back(name: str, version: str, alias: str, root: str | Path = ".") -> bool:
    """Whether somebody took this alias away from a version by `rollback`."""
    with talking(root) as client:
        return f"rolled_back_{alias}" in client.get_model_version(name, version).tags


def find_version(client: MlflowClient, name: str, key: str, digest: str) -> ModelVersion | None:
    """Return the oldest version of a model with this key and folder digest, or None."""
    found = client.search_model_versions(
        f"name = '{name}' and tags.`{KEY}` = '{key}' and tags.`{DIGEST}` = '{digest}'"
    )
    return min(found, key=lambda version: int(version.version), default=None)


def alias_holder(client: MlflowClient, name: str, alias: str) -> str | None:
    """Return the version that has an alias, or None."""
    aliases = client.get_registered_model(name).aliases
    return str(aliases[alias]) if alias in aliases else None


def shorten(card: str) -> str:
    """Return a model card that fits MLflow's description; the whole is the run's `model_card.md`."""
    note = "\n\n… The whole card is the artifact `model_card.md` of the run.\n"
    return card if len(card) <= MAX_DESCRIPTION else card[: MAX_DESCRIPTION - len(note)] + note


@contextmanager
def talking(root: str | Path = ".") -> Iterator[MlflowClient]:
    """Yield a client for work that may take long; MLflow's exceptions become TrackingError."""
    # Model.log knows the tracking server by this variable alone.
    uri = {"MLFLOW_TRACKING_URI": mlflow_store.tracking_uri(root)}
    with mlflow_store.calling({**mlflow_store.PATIENT, **uri}):
        client = mlflow_store.client(root)
        from mlflow.exceptions import MlflowException

        try:
            yield client
        except MlflowException as error:
            said = mlflow_store.without_secrets(str(error))
            raise TrackingError(
                f"MLflow at {mlflow_store.shown_uri(root)}: {said}. Check MLFLOW_TRACKING_URI and the server"
            ) from error


def signature(entry: Entry) -> ModelSignature:
    """Describe what the pyfunc takes and gives: a row per request, parameters, a row per image."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    parts = json.loads((entry.folder / "model_index.json").read_text(encoding="utf-8"))
    prompt = [ColSpec(DataType.string, "prompt")] if "text_encoder" in parts else []
    return ModelSignature(
        inputs=Schema([*prompt, ColSpec(DataType.long, "seed", required=False)]),
        outputs=Schema([ColSpec(DataType.long, "seed"), ColSpec(DataType.string, "png")]),
        params=ParamSchema(
            [
                ParamSpec("number", DataType.long, 1),
                ParamSpec("seed", DataType.long, entry.seed),
                ParamSpec("steps", DataType.long, entry.sampling_steps),
                ParamSpec("scheduler", DataType.string, "saved"),
            ]
        ),
    )


def requirements(folder: Path) -> list[str]:
    """Return the packages that serving needs, pinned to the running versions.

    A local label such as `+cpu` is left out: it names a build that package indexes do not offer.
    """
    from importlib.metadata import version

    parts = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    text = ["transformers"] if "text_encoder" in parts else []
    packages: Sequence[str] = [
        "mlflow",
        "torch",
        "diffusers",
        "safetensors",
        "numpy",
        "pandas",
        "pillow",
        *text,
    ]
    return [f"{package}=={version(package).partition('+')[0]}" for package in packages]


def _create_model(client: MlflowClient, entry: Entry) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(entry.name, description=entry.summary)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_registered_model(entry.name, entry.summary)


def _log_model(client: MlflowClient, entry: Entry, digest: str) -> str:
    import mlflow
    from mlflow.models import Model

    experiment = client.get_run(entry.run_id).info.experiment_id
    ready = client.search_logged_models([experiment], f"tags.`{DIGEST}` = '{digest}'")
    for model in ready:  # complete but not registered: a process was killed in between
        if model.source_run_id == entry.run_id and model.status == "READY":
            return str(model.model_id)
    model = client.create_logged_model(
        experiment,
        entry.folder.name,
        entry.run_id,
        tags={KEY: entry.key, DIGEST: digest},
        model_type="diffusers",
    )
    options: dict[str, Any] = {
        "python_model": str(Path(__file__).with_name("pyfunc_model.py")),
        "artifacts": {"pipeline": str(entry.folder)},
        "signature": signature(entry),
        "pip_requirements": requirements(entry.folder),
    }
    Model.log(
        None,
        mlflow.pyfunc,
        name=model.name,
        run_id=entry.run_id,
        model_id=model.model_id,
        step=entry.step,
        **options,
    )
    return str(model.model_id)


def _move(client: MlflowClient, name: str, version: str, alias: str, reason: str) -> None:
    client.set_model_version_tag(name, version, f"{alias}_reason", reason)
    client.set_model_version_tag(name, version, f"{alias}_since", _now())
    client.set_registered_model_alias(name, alias, version)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
