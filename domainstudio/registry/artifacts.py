"""What a version of a registered model consists of: its files, its signature, and the packages it needs.

MLflow's own flavour `mlflow.diffusers` stores adapters and the name of their source model, for which it asks
the hub. The source model is a folder of this project here: a version of that flavour would draw on no other
machine, and not show the picture of a seed. So a version holds the whole pipeline, adapters fused into it.
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
from domainstudio.models.kinds import has_adapters, kind_of

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

KEY, DIGEST = "domainstudio.key", "domainstudio.digest"
"""Tags by which the version of a result is found again."""

MERGED, ADAPTERS = "pipeline", "lora"
"""Folders in the artifacts of a version that was trained as adapters."""


@dataclass(frozen=True)
class Entry:
    """What is registered: a model folder and what people want to know of it."""

    name: str
    """Name of the registered model."""
    folder: Path
    """The model in diffusers' format, or its adapters."""
    key: str
    """Hash of the parameters and inputs that made it."""
    run_id: str
    """The run that made it."""
    summary: str
    """One paragraph, the registered model's description."""
    tags: Mapping[str, str]
    """The version's tags."""
    step: int = 0
    """The optimiser step at which it was saved."""
    seed: int = 0
    """Default of the parameter `seed`."""
    sampling_steps: int = 30
    """Default of the parameter `steps`."""
    guidance_scale: float = 1.0
    """Default of the parameter `guidance_scale`, of models that are told something."""
    template: str = ""
    """Template of the prompts that a model of text was trained on."""
    example: str = ""
    """A prompt or class that it draws."""


def log_model(client: MlflowClient, entry: Entry, digest: str) -> str:
    """Store the files of a version with its run, and return the id of the logged model.

    What a process has stored that was killed before it could register is used again.

    Args:
        client: of the tracking server.
        entry: what is registered.
        digest: of the model folder.
    """
    import mlflow
    from mlflow.models import Model

    experiment = client.get_run(entry.run_id).info.experiment_id
    ready = client.search_logged_models([experiment], f"tags.`{DIGEST}` = '{digest}'")
    for model in ready:  # complete but not registered: a process was killed in between
        if model.source_run_id == entry.run_id and model.status == "READY":
            return str(model.model_id)
    with stored_folders(entry.folder) as folders:
        model = client.create_logged_model(
            experiment,
            entry.folder.name,
            entry.run_id,
            tags={KEY: entry.key, DIGEST: digest},
            model_type="diffusers",
        )
        options: dict[str, Any] = {
            "python_model": str(Path(__file__).with_name("serving.py")),
            "artifacts": {name: str(folder) for name, folder in folders.items()},
            "signature": signature(entry),
            "pip_requirements": requirements(folders["pipeline"]),
        }
        if entry.example:
            options["model_config"] = {"template": entry.template, "example": entry.example}
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


@contextmanager
def stored_folders(folder: Path) -> Iterator[dict[str, Path]]:
    """Yield the folders that a version stores as `artifacts/<folder's name>`, by the names of artifacts.

    `pipeline` is the model folder. Of adapters it is the source model with them fused in, made for this
    block, and `lora` is the small folder itself.

    Raises:
        CheckpointError: the source model of the adapters is gone, or another one.
        MissingExtraError: peft is not installed.
    """
    if not has_adapters(folder):
        yield {"pipeline": folder}
        return
    from domainstudio.models import lora

    with TemporaryDirectory() as place:
        merged, adapters = Path(place, MERGED), Path(place, ADAPTERS)
        lora.save_merged(models.load(folder), merged)
        shutil.copytree(folder, adapters)
        yield {"pipeline": merged, "lora": adapters}


def signature(entry: Entry) -> ModelSignature:
    """Describe what the pyfunc takes and gives: a row per request, parameters, a row per image.

    No column is required here, though models of text need `prompt` and models of classes `label`: MLflow's
    own refusal would not say what to write there, and the pyfunc's does.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    kind = kind_of(entry.folder)
    told = {"text-to-image": ("prompt", "negative_prompt"), "class-conditional": ("label",)}.get(kind, ())
    parameters = [
        ParamSpec("number", DataType.long, 1),
        ParamSpec("seed", DataType.long, entry.seed),
        ParamSpec("steps", DataType.long, entry.sampling_steps),
        ParamSpec("scheduler", DataType.string, "saved"),
    ]
    if told:
        parameters.append(ParamSpec("guidance_scale", DataType.double, entry.guidance_scale))
    columns = [ColSpec(DataType.string, name, required=False) for name in told]
    return ModelSignature(
        inputs=Schema([*columns, ColSpec(DataType.long, "seed", required=False)]),
        outputs=Schema([ColSpec(DataType.long, "seed"), ColSpec(DataType.string, "png")]),
        params=ParamSchema(parameters),
    )


def requirements(folder: Path) -> list[str]:
    """Return the packages that serving a pipeline folder needs, pinned to the running versions.

    A local label such as `+cpu` is left out: it names a build that package indexes do not offer.
    """
    from importlib.metadata import version

    parts = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    packages = ["mlflow", "torch", "diffusers", "safetensors", "numpy", "pandas", "pillow"]
    if "text_encoder" in parts:
        packages.append("transformers")
    return [f"{package}=={version(package).partition('+')[0]}" for package in packages]
