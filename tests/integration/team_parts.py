"""A team at work on its real servers: a project in git, its images on S3, its deployments."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("prefect")
pytest.importorskip("mlflow")

import boto3
from mlflow.tracking import MlflowClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.sorting import FlowRunSort

from services import Team
from tests.integration.conftest import prefect_client
from tests.project import ROOT, make_project, params, run, write_images

PATIENCE = 1800
"""Seconds after which something that should have happened counts as hanging."""
NAME = "ink-finetune"
"""The project's one adaptation."""


@dataclass
class Company:
    """A project in git, its servers, and who works on it.

    Attributes:
        name: Also of its experiment in MLflow; its buckets, models and flow runs are its own too.
        source: A working copy.
        origin: The repository that runs clone.
        environment: The variables with which its people find the servers.
        founded: Flow runs that began before are another company's.
    """

    name: str
    team: Team
    source: Path
    origin: Path
    environment: dict[str, str]
    founded: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def bucket(self) -> str:
        """The bucket with the images of its target, `ink/`."""
        return f"targets-{self.name}"

    @property
    def model(self) -> str:
        """The name of its registered model."""
        return f"{self.name}-{NAME}"

    def command(self, *arguments: str, folder: Path = ROOT) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env=self.environment | {"PWD": str(folder)},  # as a shell there sets it; prefect.yaml reads it
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def client(self) -> Any:
        return prefect_client(self.environment)

    def begun(self, flow: str) -> list[Any]:
        """Return the flow's runs that have started, in order; others are scheduled for days to come."""
        chosen = FlowFilter(name=FlowFilterName(any_=[flow]))
        with self.client() as client:
            runs = client.read_flow_runs(flow_filter=chosen, sort=FlowRunSort.EXPECTED_START_TIME_ASC)
        return [each for each in runs if each.start_time and each.start_time >= self.founded]

    def finished(self, flow: str, number: int) -> Any:
        """Wait until the flow's run of that number, counted from 1, has ended, and well; return it."""

        def ended() -> Any:
            runs = self.begun(flow)
            return runs[number - 1] if len(runs) >= number and runs[number - 1].state.is_final() else None

        found = wait_for(ended, f"run {number} of {flow}")
        assert found.state.is_completed(), found.state.message
        return found

    def start(
        self,
        deployment: str,
        variables: Mapping[str, str] | None = None,
        name: str | None = None,
        /,
        **parameters: Any,
    ) -> Any:
        """Start a run of a deployment, with further variables in its environment."""
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            job = {"env": dict(variables or {})}
            return client.create_flow_run_from_deployment(
                found.id, name=name, parameters=parameters, job_variables=job
            )

    def mlflow(self) -> Any:
        return MlflowClient(self.environment["MLFLOW_TRACKING_URI"])

    def runs(self, kind: str | None = None) -> list[Any]:
        """Return its runs in MLflow, all or those of a kind."""
        client = self.mlflow()
        if (experiment := client.get_experiment_by_name(self.name)) is None:
            return []
        chosen = f"tags.`domainstudio.kind` = '{kind}'" if kind else ""
        return list(client.search_runs([experiment.experiment_id], chosen))

    def history(self, training: Any, metric: str) -> list[Any]:
        """Return a metric's values in MLflow, by step."""
        values = self.mlflow().get_metric_history(training.info.run_id, metric)
        return sorted(values, key=lambda value: value.step)

    def aliases(self) -> dict[str, str]:
        found = self.mlflow().get_registered_model(self.model).aliases
        return {alias: str(version) for alias, version in found.items()}

    def change(self, message: str, branch: str = "main", /, **finetune: Any) -> None:
        """Change settings of `finetune`, and push them with all else that is new."""
        values = yaml.safe_load((self.source / "params.yaml").read_text())
        values["finetune"] |= finetune
        (self.source / "params.yaml").write_text(yaml.safe_dump(values))
        self.push(message, branch)

    def push(self, message: str, branch: str = "main") -> None:
        run(self.source, "git", "add", ".")
        run(self.source, "git", "commit", "-q", "-m", message)
        run(self.source, "git", "push", "-q", str(self.origin), f"HEAD:{branch}")

    def clone(self, branch: str, folder: Path) -> Path:
        run(folder.parent, "git", "clone", "-q", "--branch", branch, str(self.origin), str(folder))
        return folder

    def lock(self, branch: str) -> str:
        """Return a branch's `dvc.lock`."""
        return run(self.origin, "git", "show", f"{branch}:dvc.lock")


def manifests(prefix: str) -> list[Path]:
    """Return the manifests of whole training states in the bucket `checkpoints`, of older ones first."""
    found = boto3.client("s3").list_objects_v2(Bucket="checkpoints", Prefix=prefix)
    paths = [Path(item["Key"]) for item in found.get("Contents", [])]
    return [path for path in paths if path.name == "MANIFEST.json"]


def step_of(state: Path) -> int:
    """Return the step of a training state's folder, `step-<number>`."""
    return int(state.name.removeprefix("step-"))


def wait_for(question: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := question():
            return answer
        time.sleep(0.3)
    raise AssertionError(f"{what} did not come in {seconds:.0f} s")


@contextmanager
def founded(team: Team, base: Path, name: str) -> Iterator[Company]:
    """Put images in S3, a project in a bare repository, and deployments on the Prefect server.

    Args:
        team: The servers.
        base: An empty folder.
        name: Letters; other companies on these servers have other ones.
    """
    environment = {
        **os.environ,
        **team.environment,
        "DOMAINSTUDIO_REPOSITORY": str(base / "origin.git"),
        "PYTHONWARNINGS": "ignore",
        "DVC_NO_ANALYTICS": "1",
    }
    company = Company(name, team, base / "source", base / "origin.git", environment)
    source = make_project(company.source, more=("flows", "prefect.yaml"))
    values = params()
    values["adaptations"], values["sweeps"] = {NAME: values["adaptations"][NAME]}, {}
    values["targets"]["ink"] |= {"shots": f"s3://{company.bucket}/ink", "number": None, "domain": "images"}
    values["finetune"]["seed"] = sum(name.encode())  # nobody goes on from another company's states
    values["registry"] |= {"experiment": name, "models": {NAME: f"{name}-{NAME}"}}
    (source / "params.yaml").write_text(yaml.safe_dump(values))
    run(source, "dvc", "remote", "add", "-d", "store", f"s3://dvc/{name}")
    run(source, "dvc", "remote", "modify", "store", "endpointurl", environment["AWS_ENDPOINT_URL"])
    run(source, "git", "clone", "-q", "--bare", str(source), str(company.origin))
    company.push("the team's settings")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket=company.bucket)
        write_images(base / "shots", 6)
        for path in sorted((base / "shots").iterdir()):
            s3.upload_file(str(path), company.bucket, f"ink/{path.name}")
        company.command("flows.setup", "--gpus", "2")
        company.command("prefect", "--no-prompt", "deploy", "--all", folder=source)
        yield company
