"""deploy/compose.yaml: what Docker would check, and that it describes what `make services` runs."""

import re
from pathlib import Path

import pytest
import yaml

from domainstudio import telemetry
from services import credentials, layout, postgres, programs

DEPLOY = Path(__file__).parents[2] / "deploy"
TEXT = (DEPLOY / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
MADE = (DEPLOY / "services.env.example").read_text()


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setattr(postgres, "find", lambda data: Path("/bin"))
    monkeypatch.setattr(postgres, "owner", lambda data: None)
    known = credentials.ensure(tmp_path / "secrets.env")
    names = {value: name for name, value in known.items()}
    chosen = layout.Layout(tmp_path)
    return {
        name: (each.command, {key: names.get(value, value) for key, value in each.environment.items()})
        for name in layout.SERVICES
        if (each := programs.program(chosen, known, name))
    }


def words(name: str) -> list[str]:
    return " ".join(map(str, SERVICES[name].get("command", []))).split()


def test_it_has_the_same_services_in_the_same_order():
    assert tuple(SERVICES) == layout.SERVICES
    for name, service in SERVICES.items():
        assert {*service.get("depends_on", {})} <= {*layout.SERVICES[: layout.SERVICES.index(name)]}
        for condition in service.get("depends_on", {}).values():
            assert condition == {"condition": "service_healthy"}


def test_every_service_is_watched_restarted_and_known():
    keys = {"image", "build", "entrypoint", "command", "environment", "volumes", "ports", "healthcheck"}
    keys |= {"depends_on", "restart", "init", "security_opt", "shm_size", "stop_grace_period"}
    for name, service in SERVICES.items():
        assert {*service} <= keys, name
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["restart"] == "unless-stopped"
        assert "HEALTH" in service["environment"] or service["healthcheck"]["test"][1] != "python"


def test_volumes_are_declared_and_files_exist():
    mounted = [mount.split(":")[0] for each in SERVICES.values() for mount in each.get("volumes", [])]
    assert {name for name in mounted if not name.startswith(".")} == {*COMPOSE["volumes"]}
    for name in mounted:
        assert not name.startswith(".") or (DEPLOY / name).exists()
    build = SERVICES["worker"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")


def test_only_this_machine_reaches_the_ports():
    published = [port for each in SERVICES.values() for port in each.get("ports", [])]
    assert len(published) == 3
    assert all(re.fullmatch(r"127\.0\.0\.1:740[023]:\d+", port) for port in published)


def test_images_name_no_registry():
    images = [each["image"] for each in SERVICES.values()]
    assert all(re.fullmatch(r"([a-z]+/)?[a-z]+:[\w.]+", image) for image in images)
    assert not re.search(r"\w+\.(io|com|org|net)\b", TEXT + (DEPLOY / "Dockerfile").read_text())


def test_no_password_has_a_default(tmp_path):
    made = {*credentials.ensure(tmp_path / "secrets.env")}
    assert {*re.findall(r"^([A-Z_]+)=", MADE, re.MULTILINE)} == made
    assert {*re.findall(r"^([A-Z_]+)=.+", MADE, re.MULTILINE)} == {"MLFLOW_TRACKING_USERNAME"}
    used = re.findall(r"\$\{([A-Z_]+)(:.)", TEXT)
    assert {name for name, kind in used if kind == ":?"} == made
    assert {name for name, kind in used if kind == ":-"}.isdisjoint(made)
    for each in SERVICES.values():
        for name, value in each["environment"].items():
            if re.search("PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY", name):
                assert value.startswith("${") and ":?" in value, name


def test_servers_get_the_settings_that_they_get_without_docker(local):
    """Addresses differ, passwords have the same names."""
    elsewhere = {"PREFECT_HOME", "MLFLOW_SERVER_ALLOWED_HOSTS", "HEALTH"}
    elsewhere |= {"DOMAINSTUDIO_WORKSPACES", *telemetry.OFF}
    for name in ("s3", "mlflow", "prefect", "worker"):
        here = {key: value for key, value in local[name][1].items() if key not in elsewhere}
        there = {key: value for key, value in SERVICES[name]["environment"].items() if key not in elsewhere}
        if name == "s3":
            here = {key: value for key, value in here.items() if key in there}
        assert {*here} == {*there}, name
        for key, value in there.items():
            if value.startswith("${"):
                assert value.startswith((f"${{{here[key]}:?", "${DOMAINSTUDIO_REPOSITORY")), key
            elif "://" not in value or value.startswith("s3://"):
                assert key == "MLFLOW_AUTH_CONFIG_PATH" or here[key] == value, key


def test_commands_are_those_of_the_servers_without_docker(local):
    for name in ("mlflow", "prefect", "worker"):
        options = [part for part in local[name][0] if part.startswith("--")]
        assert {*options} <= {*words(name)}, name
    assert f"-bucket={','.join(layout.BUCKETS)}" in words("s3")
    ours = {part.partition("=")[0] for part in local["s3"][0] if part.startswith("-")}
    assert {part.partition("=")[0] for part in words("s3") if part.startswith("-")} <= ours
    script = (DEPLOY / "postgres-init.sh").read_text()
    for database, user in programs.DATABASES.items():
        assert f"CREATE DATABASE {database} OWNER {user};" in script
        assert f"CREATE ROLE {user} LOGIN" in script
    assert "postgresql+psycopg2://mlflow@postgres/mlflow_auth" in (DEPLOY / "mlflow-auth.ini").read_text()


def test_the_image_takes_no_secrets_and_runs_without_root():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    assert not any(re.match(r"(ARG|ENV) .*(PASSWORD|SECRET|TOKEN|KEY)", line) for line in lines)
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored and "**/*.env" in ignored
    assert not {"!.git", "!.services", "!data", "!models"} & {*ignored}
