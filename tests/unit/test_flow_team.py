"""What keeps a team's flows from doing harm: work done twice, results lost, secrets shown."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

pytest.importorskip("prefect")
pytest.importorskip("mlflow")

from prefect import Flow
from prefect.logging import disable_run_logger
from prefect.server.events.schemas.automations import EventTrigger as ServerTrigger
from prefect.server.events.schemas.events import ReceivedEvent

import flows
from domainstudio.registry import aliases
from domainstudio.registry.aliases import Alias, Promotion
from domainstudio.tracking import pipeline_run
from domainstudio.tracking.runs import PARENT_RUN_VARIABLE, RunPlan
from domainstudio.tracking.server import TrackingError, connect
from flows import events, registry, revision, setup, watch
from flows.parent_run import parent_run
from flows.run.workspace import WORKSPACES_VARIABLE, Workspace, WorkspaceError
from tests.integration.mlflow_parts import use_local_store
from tests.project import ROOT

MODEL = "m"


@pytest.fixture
def emitted(monkeypatch):
    """The events that would have gone to the server."""
    seen: list[str] = []
    monkeypatch.setattr(events, "emit_event", lambda event, **_: seen.append(event))
    return seen


@pytest.fixture
def versions(tmp_path, monkeypatch):
    """A model with three versions, of which each was the champion in its turn."""
    use_local_store(tmp_path, monkeypatch)
    with connect() as client:
        client.create_registered_model(MODEL)
        for number in "123":
            client.create_model_version(MODEL, str(tmp_path))
            aliases.promote(Alias(MODEL), number, "first", by="ada")
    monkeypatch.setattr(registry, "_alias", lambda adaptation, revision: Alias(MODEL))


def champion():
    with connect() as client:
        return str(client.get_registered_model(MODEL).aliases["champion"])


def start(monkeypatch, run_id, count):
    """Be the start of a flow run, as Prefect's runtime tells of it."""
    for name, value in (("NAME", "red-fox"), ("ID", run_id), ("RUN_COUNT", str(count))):
        monkeypatch.setenv(f"PREFECT__RUNTIME__FLOW_RUN__{name}", value)


@pytest.mark.usefixtures("versions", "emitted")
def test_a_lost_run_does_not_roll_back_once_more(monkeypatch):
    start(monkeypatch, "a", 1)
    registry.rollback.fn("ink")
    assert champion() == "2"
    start(monkeypatch, "a", 2)
    assert "done already" in registry.rollback.fn("ink").message
    assert champion() == "2"
    start(monkeypatch, "b", 2)  # another run of that name, which was lost before it began
    registry.rollback.fn("ink")
    assert champion() == "1"


@pytest.mark.usefixtures("versions", "emitted")
def test_a_lost_run_does_not_miss_the_challenger_that_it_promoted(monkeypatch):
    with connect() as client:
        client.set_registered_model_alias(MODEL, "challenger", "1")
    start(monkeypatch, "a", 1)
    registry.promote.fn("ink")
    start(monkeypatch, "a", 2)
    assert "done already" in registry.promote.fn("ink").message
    assert champion() == "1"


@pytest.mark.usefixtures("versions")
def test_a_declined_approval_changes_nothing_and_is_no_error(monkeypatch):
    answer = registry.Approval(by="ada", comment="too coarse")
    monkeypatch.setattr(registry, "pause_flow_run", lambda **_: answer)
    with disable_run_logger():
        state = registry.promote.fn("ink", "1", approval=True)
    assert (state.type.value, state.name) == ("COMPLETED", "Declined")
    assert state.message == "ada did not approve. too coarse"
    assert champion() == "3"


@pytest.mark.usefixtures("versions")
def test_a_version_that_is_not_there_is_refused_before_anybody_is_asked():
    assert aliases.version_number(Alias(MODEL), "2") == "2"
    with pytest.raises(TrackingError, match="4"):
        aliases.version_number(Alias(MODEL), "4")


@pytest.mark.parametrize(("changed", "number"), [(True, 2), (False, 1)])
def test_a_promotion_is_told_where_the_alias_moved(emitted, changed, number):
    events.emit(Promotion(MODEL, "1", True, "", None, changed))
    assert emitted == [events.REGISTERED, events.PROMOTED][:number]


def test_results_that_were_not_stored_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv(WORKSPACES_VARIABLE, str(tmp_path))
    with (
        pytest.raises(revision.NotStoredError, match=r"(?s)the remote is full.*kept in .*dvc push"),
        revision._folder() as folder,
        revision._storing(Workspace(folder, "")),
    ):
        raise WorkspaceError("the remote is full")
    assert [*tmp_path.iterdir()] == [folder]
    with pytest.raises(WorkspaceError), revision._folder() as other:
        raise WorkspaceError("cloning failed")
    assert not other.exists()


@pytest.mark.parametrize(("error", "status"), [(WorkspaceError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_the_pipelines_run_says_whether_it_failed_or_was_ended(tmp_path, monkeypatch, error, status):
    use_local_store(tmp_path, monkeypatch)
    plan = RunPlan("red-fox", "a", "pipelines", kind="pipeline")
    with pytest.raises(error), disable_run_logger(), parent_run(plan, tmp_path, [], "link"):
        run_id = os.environ[PARENT_RUN_VARIABLE]
        raise error
    assert PARENT_RUN_VARIABLE not in os.environ
    with connect() as client:
        assert client.get_run(run_id).info.status == status


def test_the_runs_page_does_not_show_the_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ada:secret@mlflow.example/base/")
    shown = pipeline_run.page("7", "r", Path())
    assert shown == "https://mlflow.example/base/#/experiments/7/runs/r"


def test_what_was_seen_is_remembered_for_each_repository_and_revision():
    wanted = [("Ink-2", "https://x:token@host/r", "main"), ("Ink-2", "https://x:token@host/r", "next")]
    wanted += [("Ink-2", "/r", "main"), ("ink_2", "/r", "main")]
    names = [watch.variable(*each) for each in wanted]
    assert len({*names}) == 4 and names == [watch.variable(*each) for each in wanted]
    assert all(re.fullmatch(r"domainstudio_ink_2_[0-9a-f]{12}", name) for name in names)


def covers(automation, name, flow):
    """Tell whether the server would count an event of a flow run for an automation's trigger."""
    related = {"prefect.resource.role": "flow", "prefect.resource.name": flow}
    event = {
        "id": uuid4(),
        "occurred": datetime.now(UTC),
        "event": name,
        "resource": {"prefect.resource.id": f"prefect.flow-run.{uuid4()}", "prefect.resource.name": "ink"},
        "related": [{"prefect.resource.id": f"prefect.flow.{uuid4()}", **related}],
    }
    trigger = ServerTrigger.model_validate(automation.trigger.model_dump(mode="json"))
    return trigger.covers(ReceivedEvent.model_validate(event))


@pytest.mark.parametrize(
    ("number", "name"), [(0, "heartbeat"), (0, "Completed"), (1, "Crashed"), (1, "Failed")]
)
def test_lost_and_failed_runs_of_our_flows_alone_count(number, name):
    automation, name = setup.automations(540, uuid4())[number], f"prefect.flow-run.{name}"
    assert name in automation.trigger.expect
    assert all(covers(automation, name, flow) for flow in setup.FLOWS)
    assert not covers(automation, name, "somebody-elses")
    assert len(setup.automations(540, None)) == 1


def test_the_automations_know_every_flow():
    names = [each.name for each in pkgutil.walk_packages(flows.__path__, "flows.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    found = {value.name for module in modules for value in vars(module).values() if isinstance(value, Flow)}
    assert found == {*setup.FLOWS}


def test_a_wrong_address_of_the_server_is_said_without_a_traceback():
    url = "http://ada:secret@127.0.0.1:1/api"
    environment = {**os.environ, "PREFECT_API_URL": url, "PREFECT_CLIENT_MAX_RETRIES": "0"}
    command = [sys.executable, "-m", "flows.setup"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "PREFECT_API_URL" in done.stderr and "PREFECT_API_AUTH_STRING" in done.stderr
    assert "secret" not in done.stderr
