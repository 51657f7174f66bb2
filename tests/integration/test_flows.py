"""The flow against a real Prefect server and a real DVC repository whose stages sleep, fail, leave traces."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from domainstudio.errors import ConfigError
from flows.run import gpus, graph
from flows.run.commands import Commands, StoppedError

pytest.importorskip("prefect")
pytest.importorskip("dvc")

pytestmark = [
    # DVC reads its own graph with a call that pygtrie has deprecated.
    pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning"),
    # About two minutes on two idle cores; every start of Prefect's server takes long on busy ones.
    pytest.mark.timeout(900),
]
PATIENCE = 300
"""Seconds after which something that should have happened counts as hanging."""

PROJECT = Path(__file__).parents[2]

STEP = """
import json, os, pathlib, subprocess, sys, time
stage, out, sleep = os.environ["DVC_STAGE"], pathlib.Path(sys.argv[1]), float(sys.argv[2])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
def note(event):
    trace = {"stage": stage, "event": event, "time": time.time(), "pids": [os.getpid(), child.pid]}
    with open(os.environ["TRACES"], "a") as file:
        print(json.dumps(trace), file=file)
note("start")
try:
    print("working on", stage)
    status = json.loads(os.environ.get("FAIL", "{}")).get(stage, [])
    attempts = [json.loads(line) for line in open(os.environ["TRACES"])]
    number = sum(line["stage"] == stage and line["event"] == "start" for line in attempts)
    if number <= len(status):
        sys.exit(status[number - 1])
    time.sleep(float(os.environ.get("SLEEP", sleep)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"samples": {"frechet_distance": 12.5, "coverage": 0.25}}))
finally:
    note("end")
    child.kill()
"""

DVC_YAML = """
stages:
  prepare:
    foreach: [a, b]
    do:
      cmd: python step.py data/${item} 2.5
      deps: [step.py]
      outs: ["data/${item}"]
  finetune:
    foreach: ${adaptations}
    do:
      cmd: python step.py models/${key} 0.5
      deps: ["data/${item}"]
      meta: {gpu: 1}
      outs: ["models/${key}"]
  evaluate:
    foreach: ${adaptations}
    do:
      cmd: python step.py evaluation/${key}/metrics.json 0.1
      deps: ["models/${key}"]
      metrics:
        - evaluation/${key}/metrics.json: {cache: false}
  report:
    cmd: python step.py report.html 0.1
    deps: [evaluation]
    outs: [report.html]
"""

ADDRESSES = {f"{group}@{key}" for group in ("prepare", "finetune", "evaluate") for key in "ab"} | {"report"}


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    (folder / "step.py").write_text(STEP)
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "params.yaml").write_text("adaptations: {a: a, b: b}\n")
    git(folder, "init", "--quiet")
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], cwd=folder, check=True, env=environment)
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "template")
    return folder


@pytest.fixture
def repository(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "work")
    return tmp_path / "work"


class Server:
    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, **body: object) -> list[dict]:
        request = urllib.request.Request(
            f"{self.url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def last_run(self) -> dict:
        runs = self.post("flow_runs/filter", sort="START_TIME_DESC", limit=1)
        return runs[0]

    def tasks(self, run: dict) -> dict[str, str]:
        found = self.post("task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
        return {task["name"]: task["state"]["name"] for task in found}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    environment = {**os.environ, "PREFECT_HOME": str(home), "DO_NOT_TRACK": "1"}
    environment["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    environment["PREFECT_UI_ENABLED"] = "false"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield Server(wait_for_server(f"http://127.0.0.1:{port}/api", process, home / "log"))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def wait_for_server(url: str, process: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return url
        except OSError:
            time.sleep(0.25)
    raise AssertionError(log.read_text())


def start(repository: Path, url: str | None, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    chosen = {"PREFECT_API_URL": url} if url else {"PREFECT_HOME": str(repository.parent / "home")}
    return subprocess.Popen(
        [sys.executable, "-m", "flows.adapt", *arguments],
        cwd=repository,
        env={
            **inherited,
            **chosen,
            **environment,
            "PYTHONPATH": str(PROJECT),
            "TRACES": str(repository.parent / "traces"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A test run in a shell's background ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def traces(repository: Path) -> list[dict]:
    path = repository.parent / "traces"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spans(repository: Path) -> dict[str, tuple[float, float]]:
    times: dict[str, dict[str, float]] = {}
    for trace in traces(repository):
        times.setdefault(trace["stage"], {})[trace["event"]] = trace["time"]
    return {stage: (both["start"], both["end"]) for stage, both in times.items()}


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])


def wait_for_start(repository: Path, stage: str, process: subprocess.Popen[str]) -> list[int]:
    """Return the pids of the stage's process and of its child, once it runs."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        for trace in traces(repository):
            if trace["stage"] == stage:
                return trace["pids"]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)  # with a temporary server, which would keep the pipe open
    raise AssertionError(f"{stage} did not start:\n{process.communicate(timeout=30)[0]}")


def alive(pids: list[int]) -> list[int]:
    return [
        pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


def members(session: int) -> list[int]:
    """Return the processes that the flow started in its own session: a temporary server."""
    return [pid for pid in alive(psutil.pids()) if os.getsid(pid) == session and pid != session]


def test_the_graph_is_run_side_by_side_and_the_second_run_is_cached(server: Server, repository: Path) -> None:
    status, output = finish(start(repository, server.url, "--gpus", "1"))
    assert status == 0, output
    first = server.last_run()
    assert server.tasks(first) == dict.fromkeys(ADDRESSES, "Completed")

    times = spans(repository)
    for key in "ab":
        assert times[f"prepare@{key}"][1] <= times[f"finetune@{key}"][0]
        assert times[f"finetune@{key}"][1] <= times[f"evaluate@{key}"][0]
        assert times[f"evaluate@{key}"][1] <= times["report"][0]
    assert overlap(times["prepare@a"], times["prepare@b"])
    assert not overlap(times["finetune@a"], times["finetune@b"])
    limit = server.post("v2/concurrency_limits/filter")
    assert [(item["name"], item["limit"], item["active_slots"]) for item in limit] == [("gpu", 1, 0)]

    artifacts = {
        item["key"]: item["data"]
        for item in server.post("artifacts/filter", flow_runs={"id": {"any_": [first["id"]]}})
    }
    assert artifacts["adapt-progress"] == 100.0
    assert "| a | 12.5 | 0.25 |" in artifacts["adapt-summary"]
    assert "| finetune@b | run |" in artifacts["adapt-summary"]
    logs = server.post("logs/filter", logs={"flow_run_id": {"any_": [first["id"]]}}, limit=200)
    assert {"working on finetune@a", "working on report"} <= {line["message"] for line in logs}

    before = traces(repository)
    status, output = finish(start(repository, server.url))
    assert status == 0, output
    assert "7 cached" in output
    assert server.tasks(server.last_run()) == dict.fromkeys(ADDRESSES, "Cached")
    assert traces(repository) == before


def test_the_first_run_sets_the_servers_limit_and_later_ones_keep_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv(gpus.CLASS_VARIABLE, "a100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5")

    def most(count: int | None) -> int:
        """Return the largest number of GPUs that a stage of a run may want."""
        slots = gpus.from_server(count)
        for number in range(1, 8):
            try:
                slots.check("train", number)
            except ConfigError:
                return number - 1
        raise AssertionError("nothing is too much")

    with temporary_settings({PREFECT_API_URL: server.url}), get_client(sync_client=True) as client:
        assert most(None) == 6  # there is no limit, and none is made
        assert most(3) == 3
        assert client.read_global_concurrency_limit_by_name("gpu-a100").limit == 3
        assert most(None) == 3
        assert (most(2), most(5)) == (2, 3)
        assert client.read_global_concurrency_limit_by_name("gpu-a100").limit == 3
        client.update_global_concurrency_limit("gpu-a100", GlobalConcurrencyLimitUpdate(active=False))
        assert most(None) == 6
        client.delete_global_concurrency_limit_by_name("gpu-a100")


def test_a_failure_stops_its_branch_only(server: Server, repository: Path) -> None:
    # finetune@a refuses its settings, which no retry mends; finetune@b fails once and then works.
    failing = json.dumps({"finetune@a": [2, 2], "finetune@b": [1]})
    arguments = ("--retries", "1", "--retry-delay", "0.5")
    status, output = finish(start(repository, server.url, *arguments, FAIL=failing, SLEEP="0"))
    assert status == 1
    assert "finetune@a failed with exit status 2" in output
    assert "finetune@a failed (4 run, 1 failed, 2 not run)" in output
    assert "Traceback" not in output
    tasks = server.tasks(server.last_run())
    assert server.last_run()["state"]["type"] == "FAILED"
    assert tasks["finetune@a"] == "Failed"
    assert tasks["evaluate@a"] == tasks["report"] == "NotRun"
    assert tasks["finetune@b"] == tasks["evaluate@b"] == "Completed"
    starts = [trace["stage"] for trace in traces(repository) if trace["event"] == "start"]
    assert starts.count("finetune@a") == 1
    assert starts.count("finetune@b") == 2
    assert not {"evaluate@a", "report"} & set(starts)


def test_sigterm_leaves_no_process(server: Server, repository: Path) -> None:
    process = start(repository, server.url, "a", SLEEP="100")
    pids = wait_for_start(repository, "prepare@a", process)
    assert alive(pids) == pids
    process.terminate()
    status, output = finish(process)
    assert status == 128 + signal.SIGTERM, output
    assert alive(pids) == []
    run = server.last_run()
    assert run["state"]["type"] == "CRASHED"
    assert set(server.tasks(run)) == {"prepare@a", "finetune@a", "evaluate@a", "report"}


def test_interrupt_without_a_server_leaves_no_process(repository: Path) -> None:
    process = start(repository, None, "a", SLEEP="100")
    pids = wait_for_start(repository, "prepare@a", process)
    assert members(process.pid), "the temporary server should be running"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the temporary server too
    status, output = finish(process)
    assert status == 128 + signal.SIGINT, output
    assert alive(pids) == []
    assert members(process.pid) == []


def test_cancelling_at_the_server_leaves_no_process(server: Server, repository: Path) -> None:
    process = start(repository, server.url, "a", SLEEP="100")
    pids = wait_for_start(repository, "prepare@a", process)
    run = server.last_run()
    server.post(f"flow_runs/{run['id']}/set_state", state={"type": "CANCELLING"}, force=True)
    status, output = finish(process)
    assert status == 1, output
    assert alive(pids) == []
    assert server.last_run()["state"]["type"] == "CANCELLED"
    assert server.tasks(run)["prepare@a"] == "Cancelled"


def test_a_lock_is_waited_for(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACES", str(repository.parent / "traces"))
    monkeypatch.setenv("SLEEP", "0")
    monkeypatch.setattr("flows.run.commands.DELAYS", (0.2, 0.2))
    rwlock = repository / ".dvc" / "tmp" / "rwlock"
    rwlock.parent.mkdir(exist_ok=True)
    blocker = {"pid": os.getpid(), "cmd": "another dvc"}
    held = {"read": {}, "write": {str(repository / "data" / "a"): blocker}}
    rwlock.write_text(json.dumps(held))
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if "another DVC process" in line:
            rwlock.unlink()

    outcome = Commands(repository).repro("prepare@a", log)
    assert not outcome.cached
    assert sum("another DVC process" in line for line in lines) == 1
    assert (repository / "data" / "a").exists()


def test_a_stage_that_ignores_sigterm_is_killed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid()); time.sleep(100)"
    (repository / "stubborn.py").write_text(script)
    (repository / "dvc.yaml").write_text("stages: {stubborn: {cmd: python stubborn.py, deps: [stubborn.py]}}")
    commands = Commands(repository, grace=1.0)
    pids: list[int] = []

    def log(line: str) -> None:
        if line.isdigit():
            pids.append(int(line))
            threading.Thread(target=commands.stop).start()

    with pytest.raises(StoppedError):
        commands.repro("stubborn", log)
    assert len(pids) == 1
    assert alive(pids) == []
    with pytest.raises(StoppedError, match="not run"):
        commands.repro("stubborn", log)


def test_the_graph_is_dvcs_own(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    stages = graph.read()
    assert set(stages) == ADDRESSES
    assert stages["finetune@a"].upstream == ("prepare@a",)
    assert stages["report"].upstream == ("evaluate@a", "evaluate@b")
    assert {address for address, stage in stages.items() if stage.gpus} == {"finetune@a", "finetune@b"}
    text = (repository / "dvc.yaml").read_text()
    (repository / "dvc.yaml").write_text(text.replace("gpu: 1", "gpu: all"))
    with pytest.raises(ConfigError, match=r"meta\.gpu of finetune@a"):
        graph.read()
    monkeypatch.chdir(repository.parent)
    with pytest.raises(ConfigError, match="DVC cannot read"):
        graph.read()


def test_a_misspelt_adaptation_is_told_before_anything_starts(repository: Path) -> None:
    status, output = finish(start(repository, None, "c"))
    assert status == 2
    assert output.startswith("error: no stage of dvc.yaml is called or ends with 'c'")
    assert "temporary server" not in output
