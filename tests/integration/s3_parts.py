"""A proxy before the S3 server that counts, stops and breaks what passes, as real networks do."""

from __future__ import annotations

import io
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from PIL import Image

from domainstudio.storage import s3
from tests.integration.conftest import S3Server

REQUEST = re.compile(rb"(?:^|\r\n)((?:GET|PUT|POST|HEAD|DELETE) \S+) HTTP/1\.1\r\n")


class Proxy:
    """Passes connections on to a server.

    Attributes:
        requests: Method and path of each request.
        received: Bytes that the server has sent.
        cut_after: Bytes after which the server is gone.
        change: What becomes of the bytes that clients send.
        refused: How requests begin that the server never sees, with the HTTP status and the S3 error code
            that answer them.
        flowing: Nothing passes while it is cleared.
    """

    def __init__(self, server: S3Server) -> None:
        self._target = ("127.0.0.1", int(server.endpoint.rpartition(":")[2]))
        self.requests: list[str] = []
        self.received = 0
        self.cut_after: int | None = None
        self.change: Callable[[bytes], bytes] = bytes
        self.refused: tuple[str, int, str] | None = None
        self.flowing = threading.Event()
        self.flowing.set()
        self._open: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self._port = 0
        self.listen()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def listen(self) -> None:
        """Take connections, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        """Be a server that is down: end every connection, refuse new ones."""
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes up accept
            self._listener.close()
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def count(self, start: str) -> int:
        """Return how many requests began like this."""
        return sum(request.startswith(start) for request in self.requests)

    def forget(self) -> None:
        """Count from zero."""
        self.requests.clear()
        self.received = 0

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            self._open += [client, server]
            back = threading.Thread(target=self._pass, args=(server, client, False), daemon=True)
            back.start()
            self._pass(client, server, True)
            back.join()

    def _pass(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                self.flowing.wait()
                if from_client:
                    requests = [found.decode() for found in REQUEST.findall(content)]
                    self.requests += requests
                    if self.refused and any(each.startswith(self.refused[0]) for each in requests):
                        source.sendall(_refusal(*self.refused[1:]))
                        break
                    content = self.change(content)
                else:
                    self.received += len(content)
                    if self.cut_after is not None and self.received > self.cut_after:
                        self.shut()
                target.sendall(content)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _refusal(status: int, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>as the test wants</Message></Error>"
    headers = f"Content-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    return f"HTTP/1.1 {status} Refused\r\n{headers}\r\n\r\n{body}".encode()


@contextmanager
def proxy_of(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Lead boto3 through a proxy, with little patience."""
    proxy = Proxy(server)
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    try:
        yield proxy
    finally:
        proxy.flowing.set()
        proxy.shut()


def png(seed: int, size: int = 24) -> bytes:
    """Return a PNG file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def remove_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave boto3 no credentials, in no place where it looks for them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nowhere")


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for something that other threads or processes do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
