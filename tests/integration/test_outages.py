"""S3, MLflow and PostgreSQL go away while a flow run works: it waits or goes on, nothing is lost or twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest

from domainstudio import models
from flows.run import workspace
from flows.run.commands import Commands
from tests.integration.team_parts import NAME, PATIENCE, Company, manifests, step_of, wait_for
from tests.project import run

pytestmark = [pytest.mark.slow, pytest.mark.team, pytest.mark.timeout(3600)]
AWAY = 60.0
"""Seconds of an outage, at least."""
STEPS, EVERY, PREVIEWS = 480, 5, 120
"""More steps than the outages take at a step per second; the last ones are made without pauses."""
PACED = """
def paced() -> None:
    import os
    import time

    from domainstudio.training.trainer import Trainer

    def take_step(trainer, take=Trainer.take_step):
        time.sleep(not os.path.exists(os.environ["HURRY"]))
        return take(trainer)

    Trainer.take_step = take_step
    main()


if __name__ == "__main__":
    run(paced)
"""
STAGES = [f"{stage}@{NAME}" for stage in ("finetune", "sample", "evaluate")]


@dataclass
class Training:
    """A training of a flow run, seen from its checkpoints, from S3 and from MLflow.

    Attributes:
        company: Whose it is.
        workspaces: Where its flow run clones.
        key: Of its states, once there are any.
        run: In MLflow, once it is there.
    """

    company: Company
    workspaces: Path
    key: str = ""
    run: Any = None

    def step(self) -> int:
        """Return the step of the newest state on the disk of who trains."""
        return max(map(step_of, self._states()), default=0)

    def mirrored(self) -> int:
        """Return the step of the newest whole state in S3."""
        return max((step_of(path.parent) for path in self._manifests()), default=0)

    def state(self) -> Path:
        """Return the key of the newest whole state in S3."""
        return max(self._manifests()).parent

    def logged(self) -> int:
        """Return the last step in MLflow before the first that it lacks or has twice."""
        if self.run is None:
            self.run = next(iter(self.company.runs("finetune")), None)
        points = self.company.history(self.run, "seconds") if self.run else []
        return max((point.step for number, point in enumerate(points, 1) if point.step == number), default=0)

    @contextmanager
    def without(self, service: str) -> Iterator[None]:
        """Stop a service for a minute, in which the training goes on."""
        self.company.team.stop(service)
        began, before = time.monotonic(), self.step()
        try:
            yield
            time.sleep(max(0.0, began + AWAY - time.monotonic()))
            made = self.step() - before
        finally:
            self.company.team.start(service, timeout=PATIENCE)
        assert made > AWAY / 3, f"{made} steps in a minute without {service}: the training waited"
        assert self.step() < STEPS or service == "postgres", "the training ended before the outages did"

    def _states(self) -> list[Path]:
        return [*self.workspaces.glob("*/.checkpoints/*/step-*")]

    def _manifests(self) -> list[Path]:
        self.key = self.key or next((path.parent.name for path in self._states()), "")
        return manifests(f"states/{self.key}/")


def test_a_minute_without_each(company: Company, tmp_path: Path) -> None:
    hurry, team = tmp_path / "hurry", company.team
    slow_down(company)
    training = Training(company, tmp_path / "workspaces")
    variables = {"DOMAINSTUDIO_WORKSPACES": str(training.workspaces), "HURRY": str(hurry)}
    company.start("adapt-revision/adapt", variables, adaptations=[f"register@{NAME}"])
    wait_for(lambda: training.mirrored() and training.logged(), "the first steps")

    with training.without("s3"):
        pass
    missed = training.step()
    wait_for(lambda: training.mirrored() >= missed, "the states that S3 missed")

    with training.without("mlflow"):
        pass
    missed = training.step()
    assert training.mirrored() > missed - 4 * EVERY
    wait_for(lambda: training.logged() >= missed, "the steps that MLflow missed")

    # MLflow and Prefect without their database, while the training ends and the next stage begins.
    if "postgres" in team.layout.services:
        with training.without("postgres"):
            hurry.touch()
            wait_for(lambda: training.step() == STEPS, "the end of the training")
    hurry.touch()

    # What the last stages need is away when they come to it, one after the other.
    team.stop("mlflow")
    before = waits(company)
    wait_for(lambda: waits(company) > before, "register, waiting for MLflow")
    team.stop("s3")
    team.start("mlflow", timeout=PATIENCE)
    once = waits(company)
    wait_for(lambda: waits(company) > once, "register, waiting for S3")
    team.start("s3", timeout=PATIENCE)

    ended = company.finished("adapt-revision", 1)
    assert ended.run_count == 1
    clone = company.clone(f"runs/{ended.name}", tmp_path / "clone")
    run(clone, "dvc", "pull", *STAGES)
    assert_everything_once(training, clone)
    with company.client() as client:
        assert client.read_global_concurrency_limit_by_name("gpu").active_slots == 0
    assert_push_waits(company, clone)


def slow_down(company: Company) -> None:
    """Let a training last until the test is in a hurry."""
    stage = company.source / "stages/finetune.py"
    stage.write_text(stage.read_text().partition("\nif __name__")[0] + PACED)
    settings = {"steps": STEPS, "checkpoint_every": EVERY, "preview_every": PREVIEWS}
    company.change("a training that takes its time", **settings)


def waits(company: Company) -> int:
    """Return how often the worker has logged that `register` waits."""
    return company.team.layout.log("worker").read_text().count(f"register@{NAME} waits")


def assert_everything_once(training: Training, clone: Path) -> None:
    """Compare MLflow and S3 with the results that git and DVC hold."""
    company, client, s3 = training.company, training.company.mlflow(), boto3.client("s3")
    runs = {each.data.tags["domainstudio.kind"]: each for each in company.runs()}
    assert len(company.runs()) == len(runs) == 2
    assert {each.info.status for each in runs.values()} == {"FINISHED"}
    assert "dvc.lock" in {item.path for item in client.list_artifacts(runs["pipeline"].info.run_id)}

    records = [
        json.loads(line) for line in (clone / f"training/{NAME}/history.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records] == [*range(1, STEPS + 1)]
    pauses = [later["timestamp"] - earlier["timestamp"] for earlier, later in pairwise(records)]
    assert max(pauses) < 1000 * AWAY, "the training stood still, as long as an outage"
    for name in records[0].keys() - {"step", "timestamp"}:
        points = company.history(training.run, name)
        expected = [(record["step"], record["timestamp"], record[name]) for record in records]
        assert [(point.step, point.timestamp, point.value) for point in points] == expected, name
    previews = {path.name: path for path in (clone / f"training/{NAME}/previews").glob("*.png")}
    assert len(previews) == STEPS / PREVIEWS
    for name, path in previews.items():
        kept = client.download_artifacts(runs["finetune"].info.run_id, f"previews/{name}", str(clone.parent))
        assert Path(kept).read_bytes() == path.read_bytes(), name

    (version,) = client.search_model_versions(f"name = '{company.model}'")
    assert company.aliases() == {"champion": version.version}
    model = Path(mlflow.artifacts.download_artifacts(f"models:/{company.model}/{version.version}"))
    digest = models.digest(clone / "models/adapted" / NAME)
    assert version.tags["domainstudio.digest"] == digest
    assert [models.digest(path.parent) for path in model.rglob("model_index.json")] == [digest]

    state = training.state()
    manifest = json.loads(s3.get_object(Bucket="checkpoints", Key=f"{state}/MANIFEST.json")["Body"].read())
    assert step_of(state) == STEPS
    for name, file in manifest["files"].items():
        body = s3.get_object(Bucket="checkpoints", Key=f"{state.parent}/{name}")["Body"].read()
        assert hashlib.sha256(body).hexdigest() == file["sha256"], name
    assert not s3.list_multipart_uploads(Bucket="checkpoints").get("Uploads")


def assert_push_waits(company: Company, clone: Path) -> None:
    """Push all results to an empty remote while S3 is away; it comes back after the first attempt."""
    run(clone, "dvc", "remote", "modify", "store", "url", f"s3://dvc/{company.name}-again")
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if line.startswith("dvc push waits"):
            company.team.start("s3", timeout=PATIENCE)

    company.team.stop("s3")
    try:
        workspace.push(Commands(clone), log, STAGES)
    finally:
        company.team.start("s3", timeout=PATIENCE)
    assert any(line.startswith("dvc push waits") for line in lines), lines
    status = run(clone, "dvc", "status", "--cloud", *STAGES)
    assert "in sync" in status, status
