"""A team's servers, all real: they start, want passwords, survive crashes, and leave nothing behind."""

import os
import signal
import stat
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from services import ServiceError, Team, programs
from services.layout import BUCKETS, POOL, is_free
from services.supervision import leftovers
from tests.integration.conftest import S3Server, has_postgres, prefect_client, servers
from tests.integration.team_parts import wait_for

PATIENCE = 300
pytestmark = [pytest.mark.team, pytest.mark.timeout(900)]
needs_postgres = pytest.mark.skipif(
    not has_postgres(), reason="PostgreSQL is not installed: apt-get install postgresql"
)
SMALL = ("s3", "postgres") if has_postgres() else ("s3",)


@pytest.fixture
def variables(team, monkeypatch):
    for name, value in team.environment.items():
        monkeypatch.setenv(name, value)
    return team.environment


@pytest.fixture(scope="module")
def small():
    """S3 and, if it is there, PostgreSQL."""
    with servers(*SMALL) as services:
        yield services


def pids(team):
    return {state.name: state.pid for state in team.states()}


def states(team):
    return {state.name: state.state for state in team.states()}


def status_of(url, login=None):
    return httpx.get(url, auth=login, timeout=30).status_code


def mlflow(team, path):
    """Return the address of a question about MLflow's experiments, and the login of MLflow's user."""
    login = tuple(team.credentials[f"MLFLOW_TRACKING_{name}"] for name in ("USERNAME", "PASSWORD"))
    return f"{team.layout.url('mlflow')}/api/2.0/mlflow/experiments/{path}", login


def command(team, *arguments):
    line = [sys.executable, "-m", "services", "--folder", str(team.layout.folder), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE)


def test_every_service_answers(team):
    assert states(team) == dict.fromkeys(team.layout.services, "ready")


def test_mlflow_and_prefect_refuse_strangers(team, variables):
    prefect = f"{variables['PREFECT_API_URL']}/admin/version", variables["PREFECT_API_AUTH_STRING"].split(":")
    for url, login in (mlflow(team, "search?max_results=1"), prefect):
        assert status_of(url) == 401
        assert status_of(url, ("admin", "wrong-password")) == 401
        assert status_of(url, tuple(login)) == 200
    assert status_of(team.layout.url("s3")) == 403


def test_prefects_pages_ask_the_right_server(team):
    settings = httpx.get(f"{team.layout.url('prefect')}/ui-settings", timeout=30).json()
    assert (settings["api_url"], settings["auth"]) == (team.layout.address("prefect"), "BASIC")


@needs_postgres
def test_postgres_lets_nobody_in_without_password_and_holds_the_tables(team):
    import psycopg2

    address = {"host": "127.0.0.1", "port": team.layout.port("postgres"), "user": "mlflow"}
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(**address, dbname="mlflow", password="wrong")
    password = team.credentials["MLFLOW_DATABASE_PASSWORD"]
    with psycopg2.connect(**address, dbname="mlflow", password=password) as connection:
        cursor = connection.cursor()
        cursor.execute("select count(*) from experiments")
        assert cursor.fetchone()[0] >= 1
    connection.close()
    with pytest.raises(psycopg2.OperationalError, match="permission denied"):
        psycopg2.connect(**address, dbname="prefect", password=password)


def test_an_artifact_of_a_run_lands_in_the_bucket(team, variables):
    from mlflow import MlflowClient

    client = MlflowClient(variables["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment("services"))
    client.log_metric(run.info.run_id, "loss", 0.5)
    client.log_text(run.info.run_id, "drawn", "note.txt")
    assert client.get_run(run.info.run_id).data.metrics == {"loss": 0.5}

    bucket = S3Server(variables["AWS_ENDPOINT_URL"], "mlflow", variables).client()
    keys = [item["Key"] for item in bucket.list_objects_v2(Bucket="mlflow")["Contents"]]
    (key,) = [key for key in keys if run.info.run_id in key]
    assert bucket.get_object(Bucket="mlflow", Key=key)["Body"].read() == b"drawn"
    names = {each["Name"] for each in bucket.list_buckets()["Buckets"]}
    assert {name for name in names if not name.startswith("targets-")} == {*BUCKETS}  # those of other tests


def test_the_worker_serves_its_pool(team, variables):
    with prefect_client(variables) as client:
        assert client.read_work_pool(POOL).type == "process"
        (found,) = client.read_workers_for_work_pool(POOL)
    assert (found.name, found.status) == (POOL, "ONLINE")
    worker = programs.program(team.layout, team.credentials, "worker")
    assert worker.answers(0)
    assert not worker.answers(time.time() + 60), "the server heard it before, not since"


def test_a_second_start_changes_nothing(team):
    before = pids(team)
    Team(team.layout.folder).start()
    assert pids(team) == before

    with pytest.raises(ServiceError, match=f"--ports {team.layout.first_port} .*stop them first"):
        Team(team.layout.folder, first_port=team.layout.first_port + 20).start()


def test_what_is_killed_comes_back(team, variables):
    before = pids(team)["mlflow"]
    children = psutil.Process(before).children(recursive=True)
    os.kill(before, signal.SIGKILL)
    assert children, "its web server outlives it, and holds the port"
    wait_for(lambda: not any(child.is_running() for child in children), "the end of its children", PATIENCE)
    wait_for(lambda: pids(team)["mlflow"] not in (0, before), "another MLflow", PATIENCE)
    wait_for(lambda: states(team)["mlflow"] == "ready", "its answer", PATIENCE)


@needs_postgres
def test_a_crash_of_the_database_is_survived(team, variables):
    before = pids(team)["postgres"]
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: pids(team)["postgres"] not in (0, before), "another PostgreSQL", PATIENCE)
    wait_for(lambda: set(states(team).values()) == {"ready"}, "all services", PATIENCE)
    known = "get-by-name?experiment_name=services"
    wait_for(lambda: status_of(*mlflow(team, known)) == 200, "what MLflow knew", PATIENCE)


def test_one_service_stops_and_starts_again_with_its_data(small):
    s3 = S3Server(small.layout.url("s3"), "dvc", small.environment).client()
    s3.put_object(Bucket="dvc", Key="kept", Body=b"1")
    small.stop("s3")
    assert states(small)["s3"] == "stopped"
    assert not any(process.name() == "weed" for process in leftovers(small.layout.folder))
    assert all(states(small)[name] == "ready" for name in SMALL if name != "s3")
    small.start("s3")
    assert s3.get_object(Bucket="dvc", Key="kept")["Body"].read() == b"1"


def test_services_that_lost_their_supervisor_are_started_anew(small):
    before = pids(small)
    os.kill(int((small.layout.folder / "run" / "supervisord.pid").read_text()), signal.SIGKILL)
    small.start(*SMALL)
    after = pids(small)
    assert all(after[name] != before[name] and states(small)[name] == "ready" for name in SMALL)
    assert not any(psutil.pid_exists(before[name]) for name in SMALL)


def test_a_taken_port_is_named(small, tmp_path):
    other = Team(tmp_path, first_port=small.layout.first_port, database="sqlite")
    try:
        with pytest.raises(ServiceError, match=f"port {small.layout.port('s3')} of s3 is taken"):
            other.start("s3")
    finally:
        other.stop()


def test_the_commands_tell_everything_but_secrets(small):
    started = command(small, "start", *SMALL)
    assert started.returncode == 0
    table = command(small, "status")
    assert table.stdout in started.stdout
    assert table.returncode == 1, "not every service runs"
    shown = started.stdout + started.stderr
    assert all(f"{name} " in shown for name in small.layout.services)
    assert "ready" in shown and "stopped" in shown

    script = f'eval "$({sys.executable} -m services --folder {small.layout.folder} env)" && env'
    shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert {f"{name}={value}" for name, value in small.environment.items()} <= {*shell.stdout.splitlines()}
    assert command(small, "start", "s4").returncode == 2


@pytest.mark.parametrize("which", ["team", "small"])
def test_secrets_stay_in_their_file(which, request):
    team = request.getfixturevalue(which)
    folder = team.layout.folder
    assert stat.S_IMODE(team.layout.secrets.stat().st_mode) == 0o600
    public = {"MLFLOW_TRACKING_USERNAME", "AWS_ACCESS_KEY_ID"}
    secrets = {value for name, value in team.credentials.items() if name not in public}
    secrets |= {value.partition(":")[2] for value in secrets if ":" in value}
    assert len(secrets) == 8

    lines = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    files = [*folder.glob("*.*"), *(folder / "logs").iterdir(), *(folder / "mlflow").glob("*.ini")]
    texts = {path.name: path.read_text(errors="replace") for path in files if path != team.layout.secrets}
    assert {"supervisord.conf", "supervisord.log", "s3.log"} <= {*texts}
    for name, text in {"ps": lines, "status": command(team, "status").stdout, **texts}.items():
        assert not any(secret in text for secret in secrets), name


def test_stop_leaves_no_process_and_no_port(small):
    ports = [port for name in SMALL for port in small.layout.ports(name)]
    assert not any(is_free(port) for port in ports)
    assert command(small, "stop").returncode == 0
    assert leftovers(small.layout.folder) == []
    assert all(is_free(port) for port in ports)
    assert set(states(small).values()) == {"stopped"}
    assert command(small, "status").returncode == 1
    assert command(small, "stop").returncode == 0, "stopping twice is no error"
