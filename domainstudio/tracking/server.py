"""The connection to MLflow: where it keeps runs and models, and how long a request may take."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.errors import ConfigError, DomainStudioError, MissingExtraError, UnavailableError
from domainstudio.redaction import redact
from domainstudio.storage.disk import disk_error, is_of_a_disk
from domainstudio.tracking.relocation import relocate

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

QUIET = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Keeps MLflow from printing links, progress bars and advice."""

IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""Limits during a training. MLflow's default of 7 retries of 120 s would stop the training for minutes.
Without retries MLflow also never sends a request twice, so it cannot create a run twice."""

PATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "120", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""Limits during a registration, where uploads are large and nothing else waits."""


class TrackingError(DomainStudioError):
    """MLflow cannot be reached, or refused a request."""


class TrackingUnavailableError(TrackingError, UnavailableError):
    """MLflow, its database or its file store does not answer."""


def tracking_uri(root: str | Path = ".") -> str:
    """Return `MLFLOW_TRACKING_URI`, by default the SQLite file `mlflow.db` in the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(root).resolve() / 'mlflow.db'}"


def is_served(root: str | Path = ".") -> bool:
    """Tell whether a server keeps the runs, which other machines can reach too."""
    return tracking_uri(root).startswith(("http://", "https://", "databricks"))


def shown_uri(root: str | Path = ".") -> str:
    """Return `tracking_uri(root)` without its password."""
    return redact(tracking_uri(root))


def new_client(root: str | Path = ".") -> MlflowClient:
    """Return a client of `tracking_uri(root)`. Make it and use it inside a `configured` block.

    Raises:
        MissingExtraError: MLflow is not installed.
    """
    # MLflow reads this once, at import. Users who want to send usage statistics can set it to false.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise MissingExtraError(
            "tracking needs MLflow, which is not installed: pip install 'domainstudio[pipeline]'"
        ) from error
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what it logs it raises too
    return MlflowClient(tracking_uri=tracking_uri(root))


@contextmanager
def configured(limits: Mapping[str, str]) -> Iterator[None]:
    """Make MLflow quiet and set its limits in this block. Environment variables of the user come first.

    Args:
        limits: `IMPATIENT` or `PATIENT`.
    """
    missing = {key: value for key, value in {**QUIET, **limits}.items() if key not in os.environ}
    os.environ.update(missing)
    try:
        with warnings.catch_warnings():
            # MLflow warns about its own type hints and its own use of SQLAlchemy.
            warnings.filterwarnings("ignore", module=r"mlflow(\.|$)")
            yield
    finally:
        for key in missing:
            os.environ.pop(key, None)


@contextmanager
def connect(root: str | Path = ".") -> Iterator[MlflowClient]:
    """Yield a client for work that may take long. Errors of MLflow become TrackingError.

    Raises:
        TrackingUnavailableError: MLflow does not answer; the same call may succeed later.
        TrackingError: MLflow refused a request.
        DiskError: a disk is full, read-only or away that runs or artifacts are on, here.
    """
    # Model.log finds the tracking server by this variable alone.
    uri = {"MLFLOW_TRACKING_URI": tracking_uri(root)}
    with configured({**PATIENT, **uri}):
        client = new_client(root)
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException

        try:
            yield client
        except (MlflowException, RequestException) as error:  # file transfers raise the second kind
            if is_of_a_disk(error) and not is_served(root):
                raise disk_error(error, tracking_uri(root).removeprefix("sqlite:///")) from error
            kind = TrackingUnavailableError if is_unavailable(error) else TrackingError
            remedy = "the name, or register it first" if _status(error) == 404 else "the server"
            said = f"MLflow at {shown_uri(root)}: {redact(str(error))}"
            raise kind(f"{said}. Check MLFLOW_TRACKING_URI and {remedy}") from error
        except OSError as error:
            if not is_of_a_disk(error):
                raise
            raise disk_error(error) from error


def is_unavailable(error: Exception) -> bool:
    """Tell whether MLflow did not answer or could not do its work, so that a later call may succeed."""
    return not 400 <= _status(error) < 500 or _status(error) in (408, 429)


def is_refusal(error: Exception) -> bool:
    """Tell whether MLflow refused the request whoever sends it, so that sending it again is of no use."""
    return not is_unavailable(error) and _status(error) not in (401, 403)


def _status(error: Exception) -> int:
    """Return the HTTP status of an error of MLflow or requests; 503 if there was no answer."""
    if (status := getattr(error, "get_http_status_code", None)) is not None:
        return int(status())
    return int(getattr(getattr(error, "response", None), "status_code", 503))


def experiment_id(client: MlflowClient, name: str, root: str | Path = ".") -> str:
    """Return the id of an experiment, and create it if it is missing.

    Without a server its artifacts go to `mlartifacts` in the project's root, also in a copy of a project. A
    server chooses their place.

    Raises:
        ConfigError: the experiment is in MLflow's trash.
    """
    experiment = client.get_experiment_by_name(name) or _create_experiment(client, name, root)
    if experiment.lifecycle_stage != "active":
        raise ConfigError(
            f"registry.experiment: MLflow's experiment {name!r} was deleted. Restore it with `mlflow "
            f"experiments restore --experiment-id {experiment.experiment_id}`, or choose another name"
        )
    _keep_here(str(experiment.artifact_location), root)
    return str(experiment.experiment_id)


def _keep_here(location: str, root: str | Path) -> None:
    """Make the project's own database name this project's folder of artifacts: it may be a copy's."""
    database, folder = Path(root).resolve() / "mlflow.db", _artifacts(root)
    before = location.removeprefix("file://")
    if tracking_uri(root) == f"sqlite:///{database}" and before.endswith("/mlartifacts") and before != folder:
        relocate(database, before, folder)
        logger.info("%s: artifacts moved here from %s", database, before)


def _artifacts(root: str | Path) -> str:
    return str(Path(root).resolve() / "mlartifacts")


def _create_experiment(client: MlflowClient, name: str, root: str | Path) -> Experiment:
    from mlflow.exceptions import MlflowException

    folder = None if is_served(root) else _artifacts(root)
    # Without this tag MLflow's pages show it as an experiment with language models.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    try:
        client.create_experiment(name, artifact_location=folder, tags=tags)
    except MlflowException:
        if client.get_experiment_by_name(name) is None:  # else another stage has created it meanwhile
            raise
    return client.get_experiment_by_name(name)
