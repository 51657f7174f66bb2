"""A team's day on its real servers: a schedule, new images, a lost worker, a worse model, a way back."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from prefect.client.schemas.schedules import IntervalSchedule

from domainstudio.registry import audit
from tests.integration.team_parts import NAME, Company, wait_for
from tests.project import run, write_images

pytestmark = [pytest.mark.slow, pytest.mark.team, pytest.mark.timeout(7200)]


def test_a_teams_day(company: Company) -> None:
    # The scheduler starts a run, in a clone of its own.
    with company.client() as client:
        deployment = client.read_deployment_by_name("adapt-revision/adapt")
        soon = datetime.now(UTC) + timedelta(seconds=5)
        minutely = IntervalSchedule(interval=timedelta(minutes=1), anchor_date=soon)
        (schedule,) = client.create_deployment_schedules(deployment.id, [(minutely, True)])
        wait_for(lambda: company.begun("adapt-revision"), "a scheduled run")
        client.delete_deployment_schedule(deployment.id, schedule.id)
    first = company.finished("adapt-revision", 1)
    assert first.auto_scheduled
    assert company.aliases() == {"champion": "1"}
    version = company.mlflow().get_model_version(company.model, "1")
    assert "no champion" in json.dumps(dict(version.tags)) or version.tags["champion_reason"]
    assert "finetune@ink-finetune" in company.lock(f"runs/{first.name}")
    runs = {each.data.tags["prefect.flow_run"]: each for each in company.runs("pipeline")}
    pipeline = runs[str(first.id)]
    kept = {item.path for item in company.mlflow().list_artifacts(pipeline.info.run_id)}
    assert {"dvc.lock", "params.yaml", "report.html"} <= kept
    assert pipeline.info.status == "FINISHED"
    with company.client() as client:
        shown = {item.key: item.data for item in client.read_latest_artifacts() if item.key}
    assert shown["samples-ink-finetune"].startswith("![ink-finetune](data:image/jpeg;base64,")
    assert "| finetune@ink-finetune | run |" in shown["adapt-summary"]
    assert f"{pipeline.info.run_id}/artifacts/report.html" in shown["adapt-report"]
    run(company.source, "git", "pull", "-q", str(company.origin), f"runs/{first.name}")
    run(company.source, "git", "push", "-q", str(company.origin), "HEAD:main")

    # Nothing new: nothing starts. A new image: a second run, of what depends on it alone.
    company.start("watch-targets/watch-targets")
    company.finished("watch-targets", 1)
    settled = company.finished("adapt-revision", 2)  # the watch had never seen the prefix
    assert "cached" in settled.state.message and " run" not in settled.state.message.partition(";")[0]
    company.start("watch-targets/watch-targets")
    company.finished("watch-targets", 2)
    assert len(company.begun("adapt-revision")) == 2
    write_images(company.source.parent / "more", 7)
    boto3.client("s3").upload_file(str(company.source.parent / "more/06.png"), company.bucket, "ink/06.png")
    company.start("watch-targets/watch-targets")
    company.finished("watch-targets", 3)
    second = company.finished("adapt-revision", 3)
    done = second.state.message.partition("; ")[0]
    assert set(done.split(", ")) == {"4 cached", "7 run"}
    tags = company.mlflow().get_model_version(company.model, "2").tags
    assert tags["gate"] in ("promoted", "refused")  # on the images of today
    assert tags["gate.reason"].endswith("; version 1 measured again")

    # A worse model does not take the place.
    run(company.source, "git", "pull", "-q", str(company.origin), f"runs/{second.name}")
    champion = company.aliases()["champion"]
    company.change("a learning rate that is far too high", learning_rate=1.0, mixed_precision="no")
    company.start("adapt-revision/adapt")
    company.finished("adapt-revision", 4)
    versions = company.mlflow().search_model_versions(f"name = '{company.model}'")
    newest = str(max(int(version.version) for version in versions))
    aliases = company.aliases()
    assert newest == "3" and aliases["champion"] == champion and aliases["challenger"] == newest

    # A person is asked, declines, is asked again, approves; and takes it back.
    asked = company.start("promote/promote", adaptation=NAME, approval=True)
    answer(company, asked, approve=False, by="ada", comment="too coarse")
    declined = company.finished("promote", 1).state
    assert declined.name == "Declined" and declined.message == "ada did not approve. too coarse"
    assert company.aliases()["champion"] == champion
    asked = company.start("promote/promote", adaptation=NAME, reason="to see what happens", approval=True)
    answer(company, asked, approve=True, by="grace", comment="let us try")
    company.finished("promote", 2)
    assert company.aliases()["champion"] == newest
    decision = audit.read(company.mlflow().get_registered_model(company.model).tags)[-1]
    told = (decision.version, decision.why, decision.by.partition(",")[0])
    assert told == (newest, "to see what happens let us try", "grace")
    company.start("rollback/rollback", adaptation=NAME, reason="as feared")
    company.finished("rollback", 1)
    assert company.aliases()["champion"] == champion
    assert_no_secret(company)


def answer(company: Company, flow_run: Any, **values: Any) -> None:
    """Fill in the form of a paused run, as its page does."""
    with company.client() as client:

        def asked() -> bool:
            state = client.read_flow_run(flow_run.id).state
            assert not state.is_final(), state.message
            return bool(state.is_paused())

        wait_for(asked, "the question")
        client.resume_flow_run(flow_run.id, run_input=values)


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
