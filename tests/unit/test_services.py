"""What of a team's servers can be told without starting any."""

import os
import re
import stat
from pathlib import Path

import pytest

from services import ServiceError, Team, free_ports, layout, postgres, programs
from services import credentials as secrets
from tests.project import ROOT

EXAMPLE = ROOT / "deploy" / "services.env.example"
NAMES = tuple(re.findall(r"^([A-Z_]+)=", EXAMPLE.read_text(), re.MULTILINE))


def test_credentials_are_made_once_and_differ_between_teams(tmp_path):
    first = secrets.ensure(tmp_path / "a.env")
    assert tuple(first) == NAMES
    assert stat.S_IMODE((tmp_path / "a.env").stat().st_mode) == 0o600
    assert secrets.ensure(tmp_path / "a.env") == first
    other = secrets.ensure(tmp_path / "b.env")
    assert [name for name in NAMES if first[name] == other[name]] == ["MLFLOW_TRACKING_USERNAME"]


def test_missing_credentials_are_added_and_the_others_kept(tmp_path):
    path = tmp_path / "secrets.env"
    path.write_text("# mine\nAWS_ACCESS_KEY_ID=mine\nMLFLOW_TRACKING_PASSWORD=\n")
    found = secrets.ensure(path)
    assert {*found} == {*NAMES}
    assert found["AWS_ACCESS_KEY_ID"] == "mine"
    assert len(found["MLFLOW_TRACKING_PASSWORD"]) >= 12
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_ports_and_database_are_remembered(tmp_path):
    layout.read(tmp_path, first_port=9000, database="sqlite").save()
    assert layout.read(tmp_path) == layout.Layout(tmp_path, 9000, "sqlite")
    assert layout.read(tmp_path, first_port=9100).first_port == 9100
    assert "postgres" not in layout.read(tmp_path).services


@pytest.mark.parametrize("port", [80, 60_000])
def test_ports_that_no_server_could_take_are_refused(tmp_path, port):
    with pytest.raises(ServiceError, match=f"--ports must be from 1024 to .*, got {port}"):
        Team(tmp_path, first_port=port)


def test_services_never_share_a_port(tmp_path):
    chosen = layout.Layout(tmp_path, free_ports())
    ports = [port for name in layout.SERVICES for port in chosen.ports(name)]
    assert len({*ports}) == len(ports) == 13
    assert all(layout.is_free(port) for port in ports)


def test_a_folder_too_deep_for_sockets_is_refused(tmp_path):
    with pytest.raises(ServiceError, match=r"too long a path for Unix sockets.*--folder"):
        Team(tmp_path / ("x" * 120)).start("s3")


def test_commands_hold_no_secret_and_servers_only_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(postgres, "find", lambda data: Path("/bin"))
    monkeypatch.setattr(postgres, "owner", lambda data: None)
    known = {name: f"<{name}>" for name in NAMES}
    chosen = layout.Layout(tmp_path)
    own = {
        "s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
        "postgres": set(),
        "mlflow": {*NAMES} - {"POSTGRES_PASSWORD", "PREFECT_DATABASE_PASSWORD", "PREFECT_API_AUTH_STRING"},
        "prefect": {"PREFECT_DATABASE_PASSWORD", "PREFECT_API_AUTH_STRING"},
        "worker": {name for name in NAMES if "AWS" in name or "TRACKING" in name or "API" in name},
    }
    for name in layout.SERVICES:
        program = programs.program(chosen, known, name)
        assert not any(value in part for part in program.command for value in known.values())
        held = {secret for secret, value in known.items() if value in program.environment.values()}
        assert held == own[name], name


def test_no_server_hears_of_the_callers_other_servers(monkeypatch):
    for name in ("AWS_PROFILE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PGHOST", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "0")
    kept = programs.inherited()
    assert not any(name.startswith(("AWS_", "PG", "MLFLOW_TRACKING", "PREFECT_API")) for name in kept)
    assert kept["CUDA_VISIBLE_DEVICES"] == "0"
    assert kept["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert kept["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_without_postgres_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(postgres, "_PACKAGED", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServiceError, match=r"apt-get install postgresql.*--database sqlite"):
        Team(tmp_path / "team").start()
    assert Team(tmp_path / "team", database="sqlite").layout.services == ("s3", "mlflow", "prefect", "worker")


def test_data_of_another_postgres_is_not_touched(tmp_path, monkeypatch):
    programs_folder = tmp_path / "17" / "bin"
    programs_folder.mkdir(parents=True)
    for name in ("initdb", "postgres"):
        (programs_folder / name).write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 17.2 (Debian)'\n")
        (programs_folder / name).chmod(0o755)
    monkeypatch.setattr(postgres, "_PACKAGED", tmp_path)
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    data = tmp_path / "data"
    data.mkdir()
    (data / "PG_VERSION").write_text("9\n")
    with pytest.raises(ServiceError, match="made by PostgreSQL 9, installed is 17: install 9, or move"):
        postgres.find(data)
    (data / "PG_VERSION").write_text("17\n")
    assert postgres.find(data) == programs_folder


@pytest.mark.skipif(os.geteuid() != 0, reason="only root must become another user")
def test_root_is_told_which_folder_shuts_postgres_out(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o700)
    (tmp_path / "shut" / "team").mkdir()
    with pytest.raises(ServiceError, match="chmod o\\+x "):
        postgres.owner(tmp_path / "shut" / "team" / "postgres")
