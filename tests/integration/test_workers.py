"""Nodes of a team, each with its worker: one is lost while it trains; many runs share two GPUs."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import yaml
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.sorting import LogSort

from flows.run.gpus import LEASE_SECONDS
from services.layout import POOL
from tests.integration.s3_parts import wait_until
from tests.integration.team_parts import NAME, PATIENCE, Company, manifests, step_of, wait_for
from tests.project import run

pytestmark = [pytest.mark.slow, pytest.mark.team, pytest.mark.timeout(7200)]
STAGE, CHOOSER, MODEL = f"finetune@{NAME}", f"chooser@{NAME}", f"models/adapted/{NAME}"
STEPS, EVERY = 240, 40
LOST_AFTER = 60
"""Seconds; Prefect sends no more than one heartbeat in 30."""
RUNS = 8
LOCKED = re.compile(r"acquire lock|is busy|holds a lock")
TRACE = '''

def _trace():
    """Note when this stage's process began and ended, by the machine's clock, and its devices."""
    import atexit, json, os, time

    if path := os.environ.get("TRACES"):
        began = time.monotonic()

        def note():
            span = {"stage": os.environ["DVC_STAGE"], "began": began, "ended": time.monotonic()}
            with open(path, "a") as file:
                print(json.dumps({**span, "device": os.environ["CUDA_VISIBLE_DEVICES"]}), file=file)

        atexit.register(note)


_trace()
'''


class Node:
    """A machine with a worker: its processes, and a folder that no other node sees."""

    def __init__(self, company: Company, folder: Path, **variables: str) -> None:
        folder.mkdir()
        self.log = folder / "worker.log"
        own = {
            "DOMAINSTUDIO_CHECKPOINTS": f"s3://checkpoints/{company.name}",
            "DOMAINSTUDIO_WORKSPACES": str(folder / "workspaces"),
            "OMP_NUM_THREADS": "1",
            "PREFECT_HOME": str(folder / "prefect"),
        }
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--name", folder.name]
        with self.log.open("wb") as log:
            self._worker = psutil.Popen(
                command, env={**company.environment, **own, **variables}, stdout=log, stderr=log
            )

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.lose()

    def lose(self) -> None:
        """End all its processes at once, as when the power fails."""
        found: list[psutil.Process] = []
        while new := [each for each in self._processes() if each not in found]:
            for process in new:
                process.suspend()  # what stands still starts no other
            found += new
        for process in found:
            process.kill()
        psutil.wait_procs(found)

    def _processes(self) -> list[psutil.Process]:
        return [self._worker, *self._worker.children(recursive=True)] if self._worker.is_running() else []


@pytest.fixture(scope="module", autouse=True)
def prepared(company: Company) -> Iterator[None]:
    """Prepare the images, make the training longer, and leave the work to the tests' own workers."""
    source = company.source
    with (source / "stages/__init__.py").open("a") as file:
        file.write(TRACE)
    run(source, "dvc", "repro", "prepare_source@noto", "prepare_target@ink")
    run(source, "dvc", "push")
    settings = {"steps": STEPS, "checkpoint_every": EVERY, "preview_every": 0}
    company.change("a longer training of prepared images", **settings)
    company.team.stop("worker")
    yield
    company.team.start("worker", timeout=PATIENCE)


def start(company: Company, revision: str, name: str | None = None) -> Any:
    return company.start("adapt-revision/adapt", None, name, adaptations=[STAGE], revision=revision)


def completed(company: Company, flow_run: Any, seconds: float = PATIENCE) -> Any:
    """Wait until a flow run has ended, and well; return it as it is then."""
    with company.client() as client:

        def ended() -> Any:
            found = client.read_flow_run(flow_run.id)
            return found if found.state.is_final() else None

        found = wait_for(ended, f"the end of {flow_run.name}", seconds)
    assert found.state.is_completed(), found.state.message
    return found


def with_inner(company: Company, flow_run: Any) -> list[Any]:
    """Return the ids of a flow run and of the flows inside it."""
    inner = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run.id]))
    with company.client() as client:
        return [flow_run.id, *(each.id for each in client.read_flow_runs(flow_run_filter=inner))]


def logs(company: Company, flow_run: Any) -> list[Any]:
    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=with_inner(company, flow_run)))
    found: list[Any] = []
    with company.client() as client:
        while more := client.read_logs(chosen, limit=200, offset=len(found), sort=LogSort.TIMESTAMP_ASC):
            found += more
    return found


def tasks(company: Company, flow_run: Any) -> Counter[tuple[str, str]]:
    """Return how often there is a task of a name in a state."""
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=with_inner(company, flow_run)))
    with company.client() as client:
        return Counter((task.name, task.state.name) for task in client.read_task_runs(flow_run_filter=chosen))


def states(company: Company) -> list[Path]:
    """Return the nodes' training states in S3, older ones first."""
    return [path.parent for path in manifests(f"{company.name}/")]


def steps(company: Company, training: Any, metric: str = "total") -> list[int]:
    """Return the steps of which MLflow has a value, each as often as it has one."""
    return [value.step for value in company.history(training, metric)]


def half_way(company: Company) -> bool:
    """Tell whether there are two states, and MLflow has the steps up to the newest one."""
    found = states(company)
    return len(found) > 1 and step_of(found[-1]) in steps(company, company.runs("finetune")[0])


def md5_of_model(lock: str) -> str:
    (found,) = [out["md5"] for out in yaml.safe_load(lock)["stages"][STAGE]["outs"] if out["path"] == MODEL]
    return str(found)


def active_slots(company: Company) -> int:
    with company.client() as client:
        return int(client.read_global_concurrency_limit_by_name("gpu").active_slots)


def undisturbed(company: Company, folder: Path) -> str:
    """Train the same commit at one go, by DVC alone; return its `dvc.lock`."""
    company.clone("main", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DOMAINSTUDIO_CHECKPOINTS")
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")  # nobody listens there
        run(folder, "dvc", "pull", "prepare_source@noto", "prepare_target@ink")
        run(folder, "dvc", "repro", "--single-item", CHOOSER, STAGE)
    return (folder / "dvc.lock").read_text()


def test_another_worker_finishes_what_a_lost_one_began(company: Company, tmp_path: Path) -> None:
    company.command("flows.setup", "--gpus", "2", "--lost-after", str(LOST_AFTER))
    wait_for(lambda: active_slots(company) == 0, "the slots that others held")
    flow_run = start(company, "main")
    with Node(company, tmp_path / "here") as here:
        wait_until(lambda: half_way(company), PATIENCE)
        here.lose()
    (training,) = company.runs("finetune")
    last = steps(company, training)[-1]
    # As if the last copy had not been finished: MLflow knows more steps than the states.
    for newer in [state for state in states(company) if step_of(state) >= last]:
        boto3.client("s3").delete_object(Bucket="checkpoints", Key=f"{newer}/MANIFEST.json")
    step = step_of(states(company)[-1])
    assert training.info.status == "RUNNING"
    assert 0 < step < last < STEPS
    assert active_slots(company) == 1

    wait_for(lambda: active_slots(company) == 0, "the slot of the lost node", LEASE_SECONDS + 30)
    with Node(company, tmp_path / "there"):
        wanted = md5_of_model(undisturbed(company, tmp_path / "undisturbed"))
        ended = completed(company, flow_run)
    assert ended.run_count == 2
    found = tasks(company, flow_run)
    assert found[(STAGE, "Crashed")] == found[(STAGE, "Completed")] == 1
    assert not any(state in ("Running", "Pending", "NotReady") for _, state in found), found
    said = [line.message for line in logs(company, flow_run)]
    assert any("fetched from s3://checkpoints" in line and f"step-{step:07d}" in line for line in said)
    (training,) = company.runs("finetune")
    assert training.info.status == "FINISHED"
    for name in training.data.metrics:
        assert steps(company, training, name) == list(range(1, STEPS + 1)), name
    assert md5_of_model(company.lock(f"runs/{flow_run.name}")) == wanted


def beside(span: dict[str, Any], spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the other spans in which a span begins."""
    return [each for each in spans if each is not span and each["began"] <= span["began"] < each["ended"]]


def test_eight_runs_share_two_gpus(company: Company, tmp_path: Path) -> None:
    company.command("flows.setup", "--gpus", "2")
    for seed in range(RUNS):
        company.change(f"seed {seed}", f"seed-{seed}", seed=seed, steps=30)
    flow_runs = [start(company, f"seed-{seed}", "warm start" if seed < 2 else None) for seed in range(RUNS)]
    machine = {
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",  # twice as many as the team has slots
        "DOMAINSTUDIO_DVC_CACHE": str(tmp_path / "cache"),
        "TRACES": str(tmp_path / "traces"),
    }
    with Node(company, tmp_path / "node", **machine) as found:
        ended = [completed(company, flow_run, 2.5 * PATIENCE) for flow_run in flow_runs]

    # What Prefect promises: runs are given to workers by the time for which they were scheduled.
    given = re.findall(r"submitting flow run '([0-9a-f-]{36})'", found.log.read_text())
    assert given == [str(flow_run.id) for flow_run in flow_runs]
    traces = [json.loads(line) for line in (tmp_path / "traces").read_text().splitlines()]
    assert Counter(trace["stage"] for trace in traces) == {CHOOSER: RUNS, STAGE: RUNS}
    spans = [trace for trace in traces if trace["stage"] == STAGE]  # the other takes no GPU
    assert max(len(beside(span, spans)) for span in spans) == 1
    assert not [span for span in spans for other in beside(span, spans) if other["device"] == span["device"]]
    for line in (line for flow_run in flow_runs for line in logs(company, flow_run)):
        assert line.level < logging.WARNING, line.message
        assert not LOCKED.search(line.message), line.message

    branches = [each.state.message.rpartition("results are on branch ")[2] for each in ended]
    assert len({*branches}) == RUNS
    for seed, branch in enumerate(branches):
        locked = yaml.safe_load(company.lock(branch))["stages"][STAGE]["params"]["params.yaml"]
        assert locked["finetune"]["seed"] == seed
    for branch in (branches[0], branches[-1]):
        clone = company.clone(branch, tmp_path / branch.replace("/", "-"))
        run(clone, "dvc", "pull", STAGE, CHOOSER, "prepare_source@noto", "prepare_target@ink")
        said = run(clone, "dvc", "repro", "--dry", STAGE)
        assert f"Stage '{STAGE}' didn't change" in said and "Running stage" not in said, said
