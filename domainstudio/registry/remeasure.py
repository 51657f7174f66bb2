"""A registered version is drawn and measured again as another result was, so that the gate can compare."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import ValidationError

from domainstudio import models
from domainstudio.config import Adaptation, EvaluateSettings, SampleSettings
from domainstudio.data import prompts
from domainstudio.errors import CheckpointError, ConfigError, DataError
from domainstudio.metrics.features import FEATURES
from domainstudio.metrics.measure import measure_folders
from domainstudio.registry.gate import Measurement
from domainstudio.sampling import default_device, sample_to_folder
from domainstudio.storage import checkpoint
from domainstudio.tracking.server import TrackingError, TrackingUnavailableError, connect

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from domainstudio.registry.results import Result


def measure_again(
    name: str, version: str, result: Result, sampling: SampleSettings, evaluation: EvaluateSettings
) -> Measurement | None:
    """Draw what a result drew from a registered version, and measure it against the result's images.

    Goes on with the images that an interrupted call has drawn.

    Args:
        name: of the registered model.
        version: the version's number.
        result: says from which subjects images are drawn, and against which images they are measured.
        sampling: how to draw, as it was for the result.
        evaluation: how to measure, as it was for the result.

    Returns:
        What was measured; None where the version's files cannot be used here, which is told on stderr.

    Raises:
        TrackingUnavailableError: MLflow cannot be reached.
    """
    title = f"{name} version {version}"
    print(f"{title} was measured in another way: it is drawn and measured again, to compare", flush=True)
    try:
        with TemporaryDirectory() as place:
            with connect(result.root) as client:
                folder = _download(client, name, version, Path(place))
                told = _adaptation(client, name, version)
            return _measure(_draw(folder, told, result, sampling, title), result, evaluation)
    except TrackingUnavailableError:
        raise
    except (CheckpointError, ConfigError, DataError, TrackingError, OSError) as error:
        print(f"{title} cannot be measured again: {error}", file=sys.stderr)
        return None


def _download(client: MlflowClient, name: str, version: str, place: Path) -> Path:
    """Return the version's pipeline folder; of a version with adapters the one with these fused in."""
    import mlflow
    from mlflow.models import Model

    location = mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=str(place))
    stored = Model.load(location).flavors["python_function"]["artifacts"]["pipeline"]["path"]
    folder = Path(location, stored).resolve()
    if not folder.is_relative_to(place.resolve()):
        raise CheckpointError(f"MLmodel names {stored!r}, which lies outside of the model's folder")
    return folder


def _adaptation(client: MlflowClient, name: str, version: str) -> Adaptation:
    """Return the adaptation that made a version: it says what the model is told of a subject."""
    import mlflow

    run_id = client.get_model_version(name, version).run_id
    origin = mlflow.artifacts.load_dict(f"runs:/{run_id}/lineage.json")
    try:
        return Adaptation.model_validate(origin["adaptation"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"lineage.json of run {run_id} is of another format: {error}") from error


def _draw(folder: Path, told: Adaptation, result: Result, sampling: SampleSettings, title: str) -> Path:
    """Draw what the result drew, where it is not drawn yet; return the folder of samples."""
    subjects = [str(image.get("subject", "")) for image in result.samples["images"]]
    conditions = prompts.sample_prompts(told, subjects)
    params = {"sample": sampling.model_dump(mode="json"), "told": conditions}
    key = checkpoint.run_key(params, {"model": models.digest(folder)})
    samples = result.root / ".checkpoints" / f"champion-{key}"
    denoiser = models.load(folder).to(default_device())
    sample_to_folder(denoiser, samples, sampling, conditions, subjects, model=title)
    return samples


def _measure(samples: Path, result: Result, evaluation: EvaluateSettings) -> Measurement:
    """Measure samples against the result's images, and delete them."""
    root, adaptation = result.root, result.adaptation
    metrics, nearest = measure_folders(
        samples,
        root / "samples/sources" / adaptation.source,
        root / "data/targets" / adaptation.target,
        evaluation,
        root / FEATURES,
    )
    drawn = json.loads((samples / "manifest.json").read_text(encoding="utf-8"))
    shutil.rmtree(samples)
    hashes = result.shots["digest"], result.domain["digest"]
    return Measurement.of(metrics, drawn, *hashes, nearest["threshold"])
