"""Samples and measures a registered version again, as another result was measured, so that both compare."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import ValidationError

from domainstudio.config import Adaptation, EvaluateSettings, SampleSettings
from domainstudio.data import prompts
from domainstudio.errors import CheckpointError, ConfigError, DataError
from domainstudio.metrics.measure import measure_folders
from domainstudio.models.stored import StoredModel
from domainstudio.project import CHECKPOINTS, SOURCE_IMAGES, SOURCE_SAMPLES, TARGETS
from domainstudio.registry.gate import Measurement
from domainstudio.registry.loading import download
from domainstudio.sampling import sample_stored
from domainstudio.tracking.server import TrackingError, TrackingUnavailableError, connect

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from domainstudio.registry.results import Result


def reevaluate(
    name: str, version: str, result: Result, sampling: SampleSettings, evaluation: EvaluateSettings
) -> Measurement | None:
    """Draw a result's samples from a registered version, and measure them against the result's images.

    An interrupted call is continued with the images that it has drawn.

    Args:
        name: Name of the registered model.
        version: The version's number.
        result: Names the subjects of the samples and the images to compare with.
        sampling: Settings of the result's samples.
        evaluation: Settings of the result's measurement.

    Returns:
        The measurement; None, with a message on stderr, if the version's files cannot be used here.

    Raises:
        TrackingUnavailableError: MLflow cannot be reached.
    """
    title = f"{name} version {version}"
    print(f"{title} was measured in another way: it is drawn and measured again, to compare", flush=True)
    try:
        with TemporaryDirectory() as place:
            with connect() as client:
                folder = download(f"models:/{name}/{version}", Path(place))
                adaptation = _adaptation(client, name, version)
            samples = _draw(folder, adaptation, result, sampling, title)
            return _measure(samples, result, evaluation)
    except TrackingUnavailableError:
        raise
    except (CheckpointError, ConfigError, DataError, TrackingError, OSError) as error:
        print(f"{title} cannot be measured again: {error}", file=sys.stderr)
        return None


def _adaptation(client: MlflowClient, name: str, version: str) -> Adaptation:
    """Return the adaptation that made a version, which holds the prompts for its subjects."""
    import mlflow

    run_id = client.get_model_version(name, version).run_id
    origin = mlflow.artifacts.load_dict(f"runs:/{run_id}/lineage.json")
    try:
        return Adaptation.model_validate(origin["adaptation"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"lineage.json of run {run_id} has another format: {error}") from error


def _draw(folder: Path, adaptation: Adaptation, result: Result, sampling: SampleSettings, title: str) -> Path:
    """Draw the samples that are not drawn yet; return their folder."""
    subjects = [str(image.get("subject", "")) for image in result.samples["images"]]
    conditions = prompts.sample_prompts(adaptation, subjects)
    model = StoredModel(folder)
    return sample_stored(model, CHECKPOINTS, "champion", sampling, conditions, subjects, model=title)


def _measure(samples: Path, result: Result, evaluation: EvaluateSettings) -> Measurement:
    """Measure samples against the result's images, and delete the samples."""
    source, target = SOURCE_SAMPLES / result.adaptation.source, TARGETS / result.adaptation.target
    known = SOURCE_IMAGES / result.adaptation.source
    metrics, nearest = measure_folders(samples, source, target, evaluation, source_images=known)
    drawn = json.loads((samples / "manifest.json").read_text(encoding="utf-8"))
    shutil.rmtree(samples)
    return Measurement.of(
        metrics, drawn, result.shots["digest"], result.domain["digest"], nearest["threshold"]
    )
