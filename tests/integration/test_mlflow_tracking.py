"""Trainings in MLflow: one run per result, whatever happens to the process or the server."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from domainstudio import config, git
from domainstudio.tracking.runs import git_tags
from domainstudio.tracking.tracker import RunTracker, run_for
from tests import warm
from tests.integration.conftest import free_port
from tests.integration.mlflow_parts import (
    KEY,
    NAME,
    ROOT,
    environment,
    history,
    rows,
    tracking_server,
    use_local_store,
)

PARAMS = [str(ROOT / name) for name in ("params.yaml", "benchmarks/ink.yaml")]
ADAPTATION = config.load(*PARAMS).adaptation(NAME)

TRAINING = """
import os, signal

from tests.integration.mlflow_parts import KEY, NAME, history
from domainstudio import config
from domainstudio.tracking.tracker import run_for

adaptation = config.load(*{params!r}).adaptation(NAME)
with run_for(NAME, KEY, adaptation, {{"source": "a", "shots": "b"}}) as tracker:
{body}
"""


def training(python: str, body: str) -> subprocess.Popen[str]:
    """Run a training with tracker in a process of its own, in the current folder."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    code = TRAINING.format(params=PARAMS, body=lines)
    return subprocess.Popen(
        [python, "-c", code],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def database(tmp_path, monkeypatch):
    return use_local_store(tmp_path, monkeypatch)


@contextmanager
def run(key: str = KEY, inputs: dict[str, str] | None = None) -> Iterator[RunTracker]:
    with run_for(NAME, key, ADAPTATION, inputs) as tracker:
        assert tracker is not None
        yield tracker


def runs(database: Path) -> list[tuple[Any, ...]]:
    return rows(database, "select name, status from runs")


def logged(database: Path, name: str = "total") -> list[int]:
    return [
        step for (step,) in rows(database, f"select step from metrics where key = '{name}' order by step")
    ]


def tags(database: Path) -> dict[str, str]:
    return dict(rows(database, "select key, value from tags"))


def test_a_killed_training_goes_on_in_its_run(database):
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    killed = training(warm.python(), f"tracker.log_history(history(1, 20))\n{kill}")
    _, stderr = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, stderr
    assert runs(database) == [(NAME, "RUNNING")]
    assert logged(database) == list(range(1, 21))

    again = "tracker.log_history(history(1, 20))\ntracker.log_history(history(15, 40))"
    resumed = training(sys.executable, again)  # not a warm one: what it imports could write too
    stdout, stderr = resumed.communicate(timeout=120)
    assert (resumed.returncode, stdout, stderr) == (0, "", ""), "MLflow must not write into a stage's output"
    assert runs(database) == [(NAME, "FINISHED")]
    assert logged(database) == logged(database, "simple") == list(range(1, 41))


def test_sigterm_marks_the_run_killed(database):
    process = training(warm.python(), "import time\nprint('ready', flush=True)\ntime.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert runs(database) == [(NAME, "KILLED")]


def test_an_exception_fails_the_run_and_a_restart_finishes_it(database):
    with pytest.raises(ZeroDivisionError), run():
        raise ZeroDivisionError
    assert runs(database) == [(NAME, "FAILED")]
    with run():
        assert runs(database) == [(NAME, "RUNNING")]
    assert runs(database) == [(NAME, "FINISHED")]


def test_steps_that_were_lost_and_trained_again_are_logged_once(database):
    with run() as tracker:
        tracker.log_history(history(1, 20))
    again = [{**record, "timestamp": record["timestamp"] + 5000} for record in history(11, 30)]
    with run() as tracker:
        tracker.log_history([*history(1, 10), *again])
    assert runs(database) == [(NAME, "FINISHED")]
    for name in ("seconds", "total"):
        assert logged(database, name) == list(range(1, 31))


def test_another_key_is_another_run(database):
    for key in (KEY, "6" * 64, KEY):
        with run(key):
            pass
    assert runs(database) == [(NAME, "FINISHED")] * 2


def test_what_a_run_says_of_itself(database, tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAINSTUDIO_PARENT_RUN_ID", "c" * 32)
    monkeypatch.setenv("DVC_STAGE", f"finetune@{NAME}")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with run(inputs={"shots": "b" * 64}) as tracker:
        tracker.log_image(Image.new("RGB", (8, 8)), "previews/step-000100.png")

    found = tags(database)
    expected = {
        "domainstudio.adaptation": NAME,
        "domainstudio.kind": "finetune",
        "method": "domainstudio",
        "source": "noto",
        "target": "ink",
        "input.shots": "b" * 64,
    }
    assert expected.items() <= found.items()
    assert found["mlflow.parentRunId"] == "c" * 32
    assert found["DVC_STAGE"] == f"finetune@{NAME}"
    assert found["DVC_ROOT"] == tmp_path.name
    assert "version.torch" in found
    assert not any(str(tmp_path) in value for value in found.values())
    params = dict(rows(database, "select key, value from params"))
    assert params["weights.high_frequency"] == str(ADAPTATION.weights.high_frequency)
    assert params["training.steps"] == str(ADAPTATION.training.steps)
    assert [p.name for p in tmp_path.glob("mlartifacts/*/artifacts/previews/*")] == ["step-000100.png"]


def test_git_tags_name_commit_and_changes(monkeypatch):
    states = iter([None, git.State("c" * 40, False), git.State("c" * 40, True)])
    monkeypatch.setattr(git, "state", lambda root: next(states))
    assert git_tags() == {}
    commit = {"git.commit": "c" * 40, "mlflow.source.git.commit": "c" * 40}
    assert git_tags() == {**commit, "git.dirty": "false"}
    assert git_tags() == {**commit, "git.dirty": "true"}


def test_only_the_first_process_has_a_run(database, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with run_for(NAME, KEY, ADAPTATION) as tracker:
        assert tracker is None
    assert runs(database) == []


def test_a_refused_record_does_not_hold_up_the_rest(database, caplog):
    with run() as tracker:
        tracker.log_history([{"step": 1, "timestamp": 1, "not\nallowed": 1.0}])
        tracker.log_history(history(1, 3))
    assert logged(database) == [1, 2, 3]
    assert "refused" in caplog.text


@pytest.mark.timeout(600)
def test_a_server_that_goes_down_gets_everything_later(database, tmp_path, monkeypatch, caplog):
    port, folder = free_port(), tmp_path / "server"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    with run() as tracker:
        tracker.log_history(history(1, 10))  # no server yet, no run
        assert tracker.run_id is None
        with tracking_server(folder, port):
            tracker._retry_at = 0.0
            tracker.log_history(history(11, 20))
            assert logged(folder / "mlflow.db") == list(range(1, 21))
        started = time.monotonic()
        for step in range(21, 31):
            tracker.log_history(history(2 * step - 21, 2 * step - 21))
            tracker.log_history(history(2 * step - 20, 2 * step - 20))  # joins the one before
            tracker.log_image(Image.new("RGB", (8, 8)), f"previews/step-{step:06d}.png")
        assert time.monotonic() - started < 10, "a training must not wait for a server that is down"
        assert tracker.pending == 20
        with tracking_server(folder, port):
            tracker._retry_at = 0.0
            tracker.log_history(history(41, 50))
            assert tracker.pending == 0
            tracker.close("FINISHED")

    assert logged(folder / "mlflow.db") == list(range(1, 51))
    assert runs(folder / "mlflow.db") == [(NAME, "FINISHED")]
    assert len(list(folder.glob("artifacts/**/previews/*.png"))) == 10
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING and "training goes on" in r.message]
    assert len(warnings) == 1
    assert "secret" not in caplog.text


def test_a_failure_after_a_long_replay_is_tried_again_soon(database):

    def fail(client: object, run_id: str) -> None:
        raise OSError("the server is away")

    with run() as tracker:
        tracker._retry_at = time.monotonic() + 60
        tracker.submit(lambda client, run_id: time.sleep(1))
        tracker.submit(fail)
        tracker._retry_at = 0.0
        tracker.log_history(history(1, 1))
        assert tracker.pending == 2
        assert tracker._retry_at - time.monotonic() <= 15
        tracker._pending.popleft()
    assert tracker.pending == 0


def test_a_server_that_hangs_costs_little(database, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        started = time.monotonic()
        with run() as tracker:
            for step in range(1, 51):
                tracker.log_history(history(step, step))
        assert 2 <= time.monotonic() - started < 8, "one try of 1 s at the start and one at the end"
