"""The flow against a real Prefect server and a real DVC repository whose stages sleep, fail, leave traces."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue

import psutil
import pytest

from domainstudio.errors import ConfigError
from flows.run import gpus, graph
from flows.run.commands import Commands, StoppedError
from tests import warm
from tests.integration.conftest import prefect_client
from tests.project import ROOT, start_repository

pytest.importorskip("prefect")
pytest.importorskip("dvc")

from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

pytestmark = [
    # DVC reads its own graph with a call that pygtrie has deprecated.
    pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning"),
    # About two minutes on two idle cores; every start of Prefect's server takes long on busy ones.
    pytest.mark.timeout(900),
]

PATIENCE = 300
"""Seconds after which something that should have happened counts as hanging."""

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


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    (folder / "step.py").write_text(STEP)
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "params.yaml").write_text("adaptations: {a: a, b: b}\n")
    start_repository(folder)
    return folder


@pytest.fixture
def repository(template, tmp_path):
    return shutil.copytree(template, tmp_path / "work")


@dataclass
class Server:
    """A Prefect server, and the variables that name it."""

    variables: dict[str, str]

    def client(self):
        return prefect_client(self.variables)

    def last_run(self):
        with self.client() as client:
            return client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]

    def tasks(self, run):
        """Return the state of each of a run's tasks, by name."""
        with self.client() as client:
            return {task.name: task.state.name for task in client.read_task_runs(flow_run_filter=only(run))}


def only(run):
    return FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))


@pytest.fixture(scope="session")
def server(prefect):
    names = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")
    return Server({name: prefect.environment[name] for name in names})


def run_flow(repository, server, *arguments: str, **environment: str):
    """Return the exit status and the output of a flow run that nobody ends before its time."""
    return finish(start(repository, server, *arguments, python=warm.python(), **environment))


def start(repository, server, *arguments: str, python: str = sys.executable, **environment: str):
    """Start a flow run; without a server it starts a temporary one."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    chosen = server.variables if server else {"PREFECT_HOME": str(repository.parent / "home")}
    traces = {"PYTHONPATH": str(ROOT), "TRACES": str(repository.parent / "traces")}
    return subprocess.Popen(
        [python, "-m", "flows.adapt", *arguments],
        cwd=repository,
        env={**inherited, **chosen, **environment, **traces},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A test run in a shell's background ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process):
    """Wait for a flow run; return its exit status and its output."""
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def traces(repository):
    path = repository.parent / "traces"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spans(repository):
    """Return when each stage began and ended."""
    times: dict[str, dict[str, float]] = {}
    for trace in traces(repository):
        times.setdefault(trace["stage"], {})[trace["event"]] = trace["time"]
    return {stage: (both["start"], both["end"]) for stage, both in times.items()}


def overlap(one, other):
    return max(one[0], other[0]) < min(one[1], other[1])


def wait_for_start(repository, stage, process):
    """Return the pids of the stage's process and of its child, once it runs."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        for trace in traces(repository):
            if trace["stage"] == stage:
                return trace["pids"]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)  # with a temporary server, which would keep the pipe open
    raise AssertionError(f"{stage} did not start:\n{process.communicate(timeout=30)[0]}")


def alive(pids):
    return [
        pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


def members(session):
    """Return the processes that the flow started in its own session: a temporary server."""
    return [pid for pid in alive(psutil.pids()) if os.getsid(pid) == session and pid != session]


def test_the_graph_is_run_side_by_side_and_the_second_run_is_cached(server, repository):
    status, output = run_flow(repository, server, "--gpus", "1")
    assert status == 0, output
    first = server.last_run()
    assert server.tasks(first) == dict.fromkeys(ADDRESSES, "Completed")

    times = spans(repository)
    for key in "ab":
        for earlier, later in (("prepare", "finetune"), ("finetune", "evaluate")):
            assert times[f"{earlier}@{key}"][1] <= times[f"{later}@{key}"][0]
        assert times[f"evaluate@{key}"][1] <= times["report"][0]
    assert overlap(times["prepare@a"], times["prepare@b"])
    assert not overlap(times["finetune@a"], times["finetune@b"])
    with server.client() as client:
        (limit,) = client.read_global_concurrency_limits(limit=10, offset=0)
        artifacts = {each.key: each.data for each in client.read_artifacts(flow_run_filter=only(first))}
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[first.id])), limit=200)
    assert (limit.name, limit.limit, limit.active_slots) == ("gpu", 1, 0)
    assert artifacts["adapt-progress"] == 100.0
    assert "| a | 12.5 | 0.25 |" in artifacts["adapt-summary"]
    assert "| finetune@b | run |" in artifacts["adapt-summary"]
    said = {line.message for line in logs}
    assert {"working on finetune@a", "working on report"} <= said
    second, first_key = sorted("ab", key=lambda key: -times[f"finetune@{key}"][0])
    assert f"finetune@{second} waits for a GPU, held by finetune@{first_key} of {first.name}" in said
    waited = timedelta(seconds=times[f"finetune@{first_key}"][1] - times[f"finetune@{first_key}"][0])
    with server.client() as client:
        tasks = {task.name: task for task in client.read_task_runs(flow_run_filter=only(first))}
    task = tasks[f"finetune@{second}"]
    assert task.end_time - task.start_time - task.total_run_time > waited / 2

    before = traces(repository)
    status, output = run_flow(repository, server)
    assert status == 0, output
    assert "7 cached" in output
    assert server.tasks(server.last_run()) == dict.fromkeys(ADDRESSES, "Cached")
    assert traces(repository) == before

    status, output = run_flow(repository, None)
    assert (status, output) == (0, "7 cached: nothing to run, so Prefect was not started\n")
    assert not (repository.parent / "home").exists()


def test_the_first_run_sets_the_servers_limit_and_later_ones_keep_it(server, monkeypatch):
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

    settings = {each: server.variables[each.name] for each in (PREFECT_API_URL, PREFECT_API_AUTH_STRING)}
    with temporary_settings(settings), server.client() as client:
        assert most(None) == 6  # there is no limit, and none is made
        assert most(3) == 3
        assert client.read_global_concurrency_limit_by_name("gpu-a100").limit == 3
        assert most(None) == 3
        assert (most(2), most(5)) == (2, 3)
        assert client.read_global_concurrency_limit_by_name("gpu-a100").limit == 3
        client.update_global_concurrency_limit("gpu-a100", GlobalConcurrencyLimitUpdate(active=False))
        assert most(None) == 6
        client.delete_global_concurrency_limit_by_name("gpu-a100")


def test_a_failure_stops_its_branch_only(server, repository):
    # finetune@a refuses its settings, which no retry mends; finetune@b fails once and then works.
    failing = json.dumps({"finetune@a": [2, 2], "finetune@b": [1]})
    arguments = ("--retries", "1", "--retry-delay", "0.5")
    status, output = run_flow(repository, server, *arguments, FAIL=failing, SLEEP="0")
    assert status == 1
    assert "finetune@a failed with exit status 2" in output
    assert "finetune@a failed (4 run, 1 failed, 2 not run)" in output
    assert "Traceback" not in output
    tasks = server.tasks(server.last_run())
    assert server.last_run().state.is_failed()
    assert tasks["finetune@a"] == "Failed"
    assert tasks["evaluate@a"] == tasks["report"] == "NotRun"
    assert tasks["finetune@b"] == tasks["evaluate@b"] == "Completed"
    starts = [trace["stage"] for trace in traces(repository) if trace["event"] == "start"]
    assert (starts.count("finetune@a"), starts.count("finetune@b")) == (1, 2)
    assert not {"evaluate@a", "report"} & set(starts)


def test_sigterm_leaves_no_process(server, repository):
    process = start(repository, server, "a", SLEEP="100")
    pids = wait_for_start(repository, "prepare@a", process)
    assert alive(pids) == pids
    process.terminate()
    status, output = finish(process)
    assert status == 128 + signal.SIGTERM, output
    assert alive(pids) == []
    run = server.last_run()
    assert run.state.is_crashed()
    assert set(server.tasks(run)) == {"prepare@a", "finetune@a", "evaluate@a"}


def test_interrupt_without_a_server_leaves_no_process(repository):
    process = start(repository, None, "a", SLEEP="100")
    pids = wait_for_start(repository, "prepare@a", process)
    assert members(process.pid), "the temporary server should be running"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the temporary server too
    status, output = finish(process)
    assert status == 128 + signal.SIGINT, output
    assert alive(pids) == members(process.pid) == []


def test_cancelling_at_the_server_leaves_no_process(server, repository):
    process = start(repository, server, "a", SLEEP="100")
    pids = wait_for_start(repository, "prepare@a", process)
    run = server.last_run()
    with server.client() as client:
        client.set_flow_run_state(run.id, Cancelling(), force=True)
    status, output = finish(process)
    assert status == 1, output
    assert alive(pids) == []
    assert server.last_run().state.is_cancelled()
    assert server.tasks(run)["prepare@a"] == "Cancelled"


def test_a_lock_is_waited_for(repository, monkeypatch):
    monkeypatch.setenv("TRACES", str(repository.parent / "traces"))
    monkeypatch.setenv("SLEEP", "0")
    monkeypatch.setattr("flows.run.commands.DELAYS", (0.2, 0.2))
    rwlock = repository / ".dvc" / "tmp" / "rwlock"
    rwlock.parent.mkdir(exist_ok=True)
    blocker = {"pid": os.getpid(), "cmd": "another dvc"}
    held = {"read": {}, "write": {str(repository / "data" / "a"): blocker}}
    rwlock.write_text(json.dumps(held))
    lines: list[str] = []

    def log(line):
        lines.append(line)
        if "another DVC process" in line:
            rwlock.unlink()

    outcome = Commands(repository).repro("prepare@a", log)
    assert not outcome.cached
    assert sum("another DVC process" in line for line in lines) == 1
    assert (repository / "data" / "a").exists()


def test_a_stage_that_ignores_sigterm_is_killed(repository, monkeypatch):
    script = """
import os, signal, time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = b"x" * 400_000_000  # after the kill the kernel frees it, and only then has the process ended
print(os.getpid())
time.sleep(100)
"""
    (repository / "stubborn.py").write_text(script)
    (repository / "dvc.yaml").write_text("stages: {stubborn: {cmd: python stubborn.py, deps: [stubborn.py]}}")
    commands = Commands(repository, grace=1.0)
    pids: SimpleQueue[int] = SimpleQueue()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(
            commands.repro, "stubborn", lambda line: pids.put(int(line)) if line.isdigit() else None
        )
        pid = pids.get(timeout=100)
        commands.stop()
        assert alive([pid]) == []
        with pytest.raises(StoppedError):
            running.result()
    with pytest.raises(StoppedError, match="not run"):
        commands.repro("stubborn", print)


def test_the_graph_is_dvcs_own(repository, monkeypatch):
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
    (repository / "dvc.yaml").write_text("stages:\n\tprepare: {}\n")
    with pytest.raises(ConfigError, match=r"'dvc\.yaml'.*, line 2: found character that cannot start"):
        graph.read()
    monkeypatch.chdir(repository.parent)
    with pytest.raises(ConfigError, match="DVC cannot read"):
        graph.read()


def test_a_misspelt_adaptation_is_told_before_anything_starts(repository):
    status, output = run_flow(repository, None, "c")
    assert status == 2
    assert output.startswith("error: no stage of dvc.yaml is called or ends with 'c'")
    assert "temporary server" not in output
