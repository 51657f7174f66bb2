"""Versions of registered models: one per result, however often it is registered, and the files of each.

MLflow's own flavour `mlflow.diffusers` stores adapters and the name of their source model on the hub. Here
the source model is a folder of the project, so such a version would work on no other machine. It would also
not draw the same image for a seed. So a version holds the whole pipeline, with adapters fused into it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from domainstudio import models
from domainstudio.errors import CheckpointError
from domainstudio.models.combination_folder import ADAPTED
from domainstudio.models.folders import is_combination
from domainstudio.models.stored import StoredModel, Together
from domainstudio.registry import audit
from domainstudio.registry.aliases import CHALLENGER, challenge
from domainstudio.registry.tags import DIGEST, KEY, find_version
from domainstudio.tracking.server import connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

MEASUREMENT = "domainstudio.measured"
"""Tag: the figures of a version and the conditions under which they were measured (`gate.Measurement`)."""

VERDICT, REASON, FIGURES, JUDGED = "gate", "gate.reason", "gate.figures", "gate.judged"
"""Tags: the gate's verdict, its reason, the compared figures, and the hash of the judged measurement."""

PENDING = "pending"
"""The verdict of a version whose registration is not finished."""

MERGED, ADAPTERS = "pipeline", "lora"
"""Folders of the artifacts of a version that is not its model folder as it is."""


MAX_DESCRIPTION = 5000
"""MLflow's limit of a description, in characters."""


@dataclass(frozen=True)
class Entry:
    """A model to register."""

    name: str
    """Name of the registered model."""
    folder: Path
    """The model in diffusers' format, or its adapters."""
    key: str
    """Hash of the parameters and inputs that made it."""
    run_id: str
    """The run of its training."""
    summary: str
    """One paragraph, the registered model's description."""
    tags: Mapping[str, str]
    """The version's tags."""
    together: Together | None = None
    """How its source model takes part in drawing; `None` if it does not."""
    step: int = 0
    """The optimiser step at which it was saved."""
    seed: int = 0
    """The seed of an image if a request names none."""
    denoising_steps: int = 30
    """The same for the number of steps."""
    guidance_scale: float = 1.0
    """The same for guidance, of models with prompts or classes."""
    template: str = ""
    """Template of the prompts of the training, for error messages."""
    example: str = ""
    """A prompt or class of the samples, for error messages."""


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    digest: str
    """Hash of the model folder, its weights and configurations, and of how its source model takes part."""
    created: bool
    """Whether this call created it; False if the same result was registered before."""


def register(entry: Entry) -> Registered:
    """Register a model folder, unless the same folder of the same key is registered already.

    The new version has the alias `challenger` until `judging.judge` promotes it. Its pyfunc draws images (see
    `serving`), and its artifacts hold a pipeline for diffusers (see `stored_folders`).

    Raises:
        CheckpointError: the folder is neither a diffusers pipeline nor one of adapters, or the source model
            of the adapters is missing.
        MissingExtraError: adapters need peft, which is not installed.
        TrackingError: MLflow cannot be reached or refused.
    """
    if not (entry.folder / "model_index.json").is_file() and not models.has_adapters(entry.folder):
        raise CheckpointError(
            f"{entry.folder} has neither model_index.json nor adapter.json: it is no diffusers pipeline and "
            "no folder of adapters. Run finetune"
        )
    digest = StoredModel(entry.folder, entry.together).digest
    with connect() as client:
        if (known := find_version(client, entry.name, entry.key, digest)) is not None:
            _update_measurement(client, entry, known)
            return Registered(entry.name, str(known.version), digest, created=False)
        model_id = _log_model(client, entry, digest)
        _create_model(client, entry)
        version = _create_version(client, entry, digest, model_id)
        first = find_version(client, entry.name, entry.key, digest)
        if first is not None and str(first.version) != version:  # another process was faster
            client.delete_model_version(entry.name, version)
            return Registered(entry.name, str(first.version), digest, created=False)
        challenge(client, entry.name, version)
        drawn = f", {entry.together.combination.title}" if entry.together else ""
        why = f"a result of {entry.folder.name}{drawn}, not judged yet"
        audit.record(client, entry.name, "registered", version, CHALLENGER, why)
        return Registered(entry.name, version, digest, created=True)


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


def _log_model(client: MlflowClient, entry: Entry, digest: str) -> str:
    """Store the files of a version with its run, and return the id of the logged model.

    If a process was killed after it stored the files and before it registered them, those files are used.
    """
    import mlflow
    from mlflow.models import Model

    experiment = client.get_run(entry.run_id).info.experiment_id
    for model in client.search_logged_models([experiment], f"tags.`{DIGEST}` = '{digest}'"):
        if model.source_run_id == entry.run_id and model.status == "READY":
            return str(model.model_id)
    with stored_folders(StoredModel(entry.folder, entry.together)) as folders:
        tags = {KEY: entry.key, DIGEST: digest}
        model = client.create_logged_model(
            experiment, entry.folder.name, entry.run_id, tags=tags, model_type="diffusers"
        )
        Model.log(
            None,
            mlflow.pyfunc,
            name=model.name,
            run_id=entry.run_id,
            model_id=model.model_id,
            step=entry.step,
            **_pyfunc_options(entry, folders),
        )
    return str(model.model_id)


def _pyfunc_options(entry: Entry, folders: Mapping[str, Path]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "python_model": str(Path(__file__).with_name("serving.py")),
        "artifacts": {name: str(folder) for name, folder in folders.items()},
        "signature": _signature(entry),
        "pip_requirements": _requirements(folders["pipeline"]),
    }
    if entry.example:
        options["model_config"] = {"template": entry.template, "example": entry.example}
    return options


@contextmanager
def stored_folders(model: StoredModel) -> Iterator[dict[str, Path]]:
    """Yield the folders that a version stores as `artifacts/<folder's name>`, by the names of artifacts.

    `pipeline` is the model folder. For adapters it is the source model with them fused in, and `lora` is the
    small folder itself. Where the source model takes part in drawing, `pipeline` is the interpolated model,
    or both models and how they draw together. What is made for a version exists only in this block.

    Raises:
        CheckpointError: the source model of the adapters is missing, or another one.
        MissingExtraError: peft is not installed.
    """
    has_adapters = models.has_adapters(model.folder)
    if not has_adapters and model.together is None:
        yield {"pipeline": model.folder}
        return
    with TemporaryDirectory() as place:
        whole, adapters = Path(place, MERGED), Path(place, ADAPTERS)
        model.store(whole)
        if has_adapters:
            shutil.copytree(model.folder, adapters)
        yield {"pipeline": whole, **({"lora": adapters} if has_adapters else {})}


def _signature(entry: Entry) -> ModelSignature:
    """Describe the pyfunc: its input has a row per request, its output a row per image.

    The columns `prompt` and `label` are optional here, though models need them: the pyfunc's error for a
    missing column says what to write there, and MLflow's would not.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    columns_of = {"text-to-image": ("prompt", "negative_prompt"), "class-conditional": ("label",)}
    texts = columns_of.get(models.kind_of(entry.folder), ())
    parameters = [
        ParamSpec("number", DataType.long, 1),
        ParamSpec("seed", DataType.long, entry.seed),
        ParamSpec("steps", DataType.long, entry.denoising_steps),
        ParamSpec("scheduler", DataType.string, "saved"),
    ]
    if texts:
        parameters.append(ParamSpec("guidance_scale", DataType.double, entry.guidance_scale))
    columns = [ColSpec(DataType.string, name, required=False) for name in texts]
    return ModelSignature(
        inputs=Schema([*columns, ColSpec(DataType.long, "seed", required=False)]),
        outputs=Schema([ColSpec(DataType.long, "seed"), ColSpec(DataType.string, "png")]),
        params=ParamSchema(parameters),
    )


def _requirements(folder: Path) -> list[str]:
    """Return the packages that serve a pipeline folder, pinned to the installed versions.

    Local labels such as `+cpu` are left out, because package indexes do not offer such builds.
    """
    from importlib.metadata import version

    own = folder / ADAPTED if is_combination(folder) else folder
    parts = json.loads((own / "model_index.json").read_text(encoding="utf-8"))
    packages = ["mlflow", "torch", "diffusers", "safetensors", "numpy", "pandas", "pillow"]
    if "text_encoder" in parts:
        packages.append("transformers")
    return [f"{package}=={version(package).partition('+')[0]}" for package in packages]
