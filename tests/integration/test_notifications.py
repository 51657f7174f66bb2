"""Messages that a real Prefect server sends to a real webhook and a real mail server."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from email import message_from_string, policy
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

pytest.importorskip("prefect")

from prefect.states import Failed

from domainstudio.registry.aliases import Promotion
from tests.integration.conftest import prefect_client
from tests.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PATIENCE = 200
"""Seconds until a message must have come."""


class Webhook(BaseHTTPRequestHandler):
    """Keeps the JSON that is posted to it."""

    got: queue.Queue[tuple[str, dict[str, str]]] = queue.Queue()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.put((self.path, json.loads(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class MailServer(socketserver.StreamRequestHandler):
    """Takes mail by SMTP (RFC 5321), and keeps its addresses and text."""

    got: queue.Queue[tuple[list[str], str]] = queue.Queue()

    def handle(self) -> None:
        addresses: list[str] = []
        self._say("220 mail.example")
        for line in iter(self.rfile.readline, b""):
            word = line.decode().upper().split()[0]
            if word in ("MAIL", "RCPT"):
                addresses.append(line.decode().partition(":")[2].strip().split()[0].strip("<>"))
            if word == "DATA":
                self._say("354 go on")
                self.got.put((addresses, "".join(self._text())))
            self._say("221 bye" if word == "QUIT" else "250 ok")
            if word == "QUIT":
                return

    def _text(self) -> Iterator[str]:
        for line in iter(self.rfile.readline, b".\r\n"):
            yield line.decode().removeprefix(".")

    def _say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())


@contextlib.contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def command(environment, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def mail() -> tuple[list[str], str, str]:
    addresses, text = MailServer.got.get(timeout=PATIENCE)
    message = message_from_string(text, policy=policy.default)
    plain = message.get_body(("plain", "html"))
    assert plain is not None
    return addresses, str(message["subject"]), plain.get_content()


def test_failed_runs_and_promotions_reach_a_webhook_and_a_mailbox(prefect):
    with (
        serving(HTTPServer(("127.0.0.1", 0), Webhook)) as web,
        serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), MailServer)) as smtp,
    ):
        webhook = f"json://127.0.0.1:{web}/studio"
        mailbox = f"mailto://127.0.0.1:{smtp}?from=studio@a.example&to=ada@b.example&format=text"
        environment = {
            **os.environ,
            **prefect.environment,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        addresses = {"DOMAINSTUDIO_NOTIFY": f"{webhook}\n{mailbox}"}
        for _ in range(2):  # the second time everything is there
            told = command({**environment, **addresses}, "-m", "flows.setup")
        assert "automation 'domainstudio: tell of promotions': up to date" in told

        with prefect_client(environment) as client:
            for flow in ("somebody-elses", "sweep"):
                run = client.create_flow_run(named(flow), name=f"{flow}-1")
                client.set_flow_run_state(run.id, Failed(message="the disk is full"), force=True)
        path, posted = Webhook.got.get(timeout=PATIENCE)
        assert (path, posted["title"]) == ("/studio", "sweep: run sweep-1 failed")
        assert posted["message"].startswith("the disk is full") and str(run.id) in posted["message"]
        who, subject, text = mail()
        assert who == ["studio@a.example", "ada@b.example"]
        assert subject == posted["title"] and text.startswith("the disk is full")

        promotion = repr(Promotion("faces-ink", "7", True, "nearer to the domain", "6", True))
        code = "from domainstudio.registry.aliases import Promotion; from flows import events; "
        command(environment, "-c", f"{code}events.emit({promotion})")
        posted = Webhook.got.get(timeout=PATIENCE)[1]
        assert posted["title"] == mail()[1] == "faces-ink: version 7 is the champion"
        assert posted["message"] == "Before: 6. nearer to the domain"
        assert Webhook.got.empty() and MailServer.got.empty()


def named(name: str):
    from prefect import flow

    @flow(name=name)
    def nothing() -> None:
        pass

    return nothing
