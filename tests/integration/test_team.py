"""A team's day on its real servers: a schedule, new images, a lost worker, a worse model, a way back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.services import Team
from tests.project import ROOT, make_project, params, run, write_images

pytest.importorskip("prefect")

pytestmark = [pytest.mark.slow, pytest.mark.team, pytest.mark.timeout(1800)]
PATIENCE = 600
"""Seconds after which something that should have happened counts as hanging."""
NAME, MODEL = "ink-finetune", "domainstudio-ink-finetune"


@dataclass
class Company:
    """A project in git, its servers, and who works on it."""

    team: Team
    source: Path
    origin: Path
    environment: dict[str, str]

    def command(self, *arguments: str, folder: Path = ROOT) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def client(self) -> Any:
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

        values = {PREFECT_API_URL: self.environment["PREFECT_API_URL"]}
        values[PREFECT_API_AUTH_STRING] = self.environment.get("PREFECT_API_AUTH_STRING")
        with temporary_settings(values):
            return get_client(sync_client=True)

    def flow_runs(self, flow: str) -> list[Any]:
        from prefect.client.schemas.filters import FlowFilter, FlowFilterName
        from prefect.client.schemas.sorting import FlowRunSort

        chosen = FlowFilter(name=FlowFilterName(any_=[flow]))
        with self.client() as client:
            return client.read_flow_runs(flow_filter=chosen, sort=FlowRunSort.EXPECTED_START_TIME_ASC)

    def begun(self, flow: str) -> list[Any]:
        """Return the flow's runs that have started; others are scheduled for the days to come."""
        return [each for each in self.flow_runs(flow) if each.start_time]

    def finished(self, flow: str, number: int) -> Any:
        """Wait until the flow's run of that number, counted from 1, has ended; return it."""

        def ended() -> Any:
            runs = self.begun(flow)
            return runs[number - 1] if len(runs) >= number and runs[number - 1].state.is_final() else None

        return wait_for(ended, f"run {number} of {flow}")

    def start(self, deployment: str, **parameters: Any) -> Any:
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(found.id, parameters=parameters)

    def mlflow(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(self.environment["MLFLOW_TRACKING_URI"])

    def aliases(self) -> dict[str, str]:
        found = self.mlflow().get_registered_model(MODEL).aliases
        return {alias: str(version) for alias, version in found.items()}

    def push(self, message: str) -> None:
        run(self.source, "git", "add", ".")
        run(self.source, "git", "commit", "-q", "-m", message)
        run(self.source, "git", "push", "-q", str(self.origin), "HEAD:main")

    def branches(self) -> list[str]:
        return [line.strip("* ") for line in run(self.origin, "git", "branch").splitlines()]


def wait_for(question: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if answer := question():
            return answer
        time.sleep(1)
    raise AssertionError(f"{what} did not come in {PATIENCE} s")


@pytest.fixture(scope="module")
def company(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    """Images in S3, a project in a bare repository, deployments on the Prefect server."""
    base = tmp_path_factory.mktemp("company")
    (base / "workspaces").mkdir()
    environment = {
        **os.environ,
        **team.environment,
        "DOMAINSTUDIO_REPOSITORY": str(base / "origin.git"),
        "DOMAINSTUDIO_WORKSPACES": str(base / "workspaces"),
        "PYTHONWARNINGS": "ignore",
        "DVC_NO_ANALYTICS": "1",
    }
    source = make_project(base / "source")
    values = params()
    values["adaptations"], values["sweeps"] = {NAME: values["adaptations"][NAME]}, {}
    values["targets"]["ink"] |= {"shots": "s3://targets/ink", "number": None, "domain": "images"}
    (source / "params.yaml").write_text(yaml.safe_dump(values))
    run(source, "dvc", "remote", "add", "-d", "store", "s3://dvc/store")
    run(source, "dvc", "remote", "modify", "store", "endpointurl", environment["AWS_ENDPOINT_URL"])
    run(source, "git", "clone", "-q", "--bare", str(source), str(base / "origin.git"))
    found = Company(team, source, base / "origin.git", environment)
    found.push("the team's settings")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import boto3

        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="targets")
        write_images(base / "shots", 6)
        for path in sorted((base / "shots").iterdir()):
            s3.upload_file(str(path), "targets", f"ink/{path.name}")
        found.command("flows.setup", "--gpus", "2")
        found.command("prefect", "--no-prompt", "deploy", "--all")
        yield found


def test_a_teams_day(company: Company) -> None:
    from prefect.client.schemas.schedules import IntervalSchedule

    # The scheduler starts a run, in a clone of its own.
    with company.client() as client:
        deployment = client.read_deployment_by_name("adapt-revision/adapt")
        soon = IntervalSchedule(
            interval=timedelta(days=1), anchor_date=datetime.now(UTC) + timedelta(seconds=5)
        )
        client.create_deployment_schedules(deployment.id, [(soon, True)])
    first = company.finished("adapt-revision", 1)
    assert first.state.is_completed(), first.state.message
    assert first.auto_scheduled
    assert f"runs/{first.name}" in company.branches()
    assert company.aliases() == {"champion": "1"}
    version = company.mlflow().get_model_version(MODEL, "1")
    assert "no champion" in json.dumps(dict(version.tags)) or version.tags["champion_reason"]
    lock = run(company.origin, "git", "show", f"runs/{first.name}:dvc.lock")
    assert "finetune@ink-finetune" in lock
    (pipeline,) = company.mlflow().search_runs(
        [company.mlflow().get_experiment_by_name("domainstudio").experiment_id],
        f"tags.`domainstudio.kind` = 'pipeline' and tags.`prefect.flow_run` = '{first.id}'",
    )
    kept = {item.path for item in company.mlflow().list_artifacts(pipeline.info.run_id)}
    assert {"dvc.lock", "params.yaml", "report.html"} <= kept
    assert pipeline.info.status == "FINISHED"
    run(company.source, "git", "pull", "-q", str(company.origin), f"runs/{first.name}")
    run(company.source, "git", "push", "-q", str(company.origin), "HEAD:main")

    # Nothing new: nothing starts. A new image: a second run, of what depends on it alone.
    import boto3

    company.start("watch-targets/watch-targets")
    assert company.finished("watch-targets", 1).state.is_completed()
    settled = company.finished("adapt-revision", 2)  # the watch had never seen the prefix
    assert "cached" in settled.state.message and " run" not in settled.state.message.partition(";")[0]
    company.start("watch-targets/watch-targets")
    assert company.finished("watch-targets", 2).state.is_completed()
    assert len(company.begun("adapt-revision")) == 2
    write_images(company.source.parent / "more", 7)
    boto3.client("s3").upload_file(str(company.source.parent / "more/06.png"), "targets", "ink/06.png")
    company.start("watch-targets/watch-targets")
    assert company.finished("watch-targets", 3).state.is_completed()
    second = company.finished("adapt-revision", 3)
    assert second.state.is_completed(), second.state.message
    assert second.state.message.startswith("6 run, 2 cached"), second.state.message

    # A worse model does not take the place.
    run(company.source, "git", "pull", "-q", str(company.origin), f"runs/{second.name}")
    champion = company.aliases()["champion"]
    values = yaml.safe_load((company.source / "params.yaml").read_text())
    values["finetune"] |= {"learning_rate": 10.0, "mixed_precision": "no"}
    (company.source / "params.yaml").write_text(yaml.safe_dump(values))
    company.push("a learning rate that is far too high")
    company.start("adapt-revision/adapt")
    third = company.finished("adapt-revision", 4)
    assert third.state.is_completed(), third.state.message
    newest = str(max(int(v.version) for v in company.mlflow().search_model_versions(f"name = '{MODEL}'")))
    aliases = company.aliases()
    assert newest == "3" and aliases["champion"] == champion and aliases["challenger"] == newest

    # By hand it becomes champion all the same, and is taken back.
    company.start("promote/promote", adaptation=NAME, reason="to see what happens")
    assert company.finished("promote", 1).state.is_completed()
    assert company.aliases()["champion"] == newest
    company.start("rollback/rollback", adaptation=NAME, reason="as feared")
    assert company.finished("rollback", 1).state.is_completed()
    assert company.aliases()["champion"] == champion
    assert_no_secret(company)


def assert_no_secret(company: Company) -> None:
    """Look for every password and key in what is logged, stored and shown."""
    names = {"AWS_ACCESS_KEY_ID", "MLFLOW_TRACKING_USERNAME"}  # of accounts: S3 servers log who asked
    secrets = {value for name, value in company.team.credentials.items() if name not in names}
    places = [company.source.parent, company.team.layout.folder / "logs"]
    for path in (path for place in places for path in place.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not [value for value in secrets if value.encode() in content], path
    with company.client() as client:
        for each in client.read_flow_runs(limit=200):
            assert not [value for value in secrets if value in each.model_dump_json()], each.name
    client = company.mlflow()
    for experiment in client.search_experiments():
        for each in client.search_runs([experiment.experiment_id]):
            assert not [value for value in secrets if value in json.dumps(each.to_dictionary(), default=str)]
