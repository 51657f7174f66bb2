"""Sweeps on a real Ray cluster of two nodes, with real servers of MLflow and Prefect."""

from __future__ import annotations

import csv
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from domainstudio import config
from domainstudio.data import ImageRecord, ImageSet
from services import Team
from tests.integration.conftest import prefect_client
from tests.models import tiny_denoiser, tiny_images
from tests.project import params

pytest.importorskip("ray")

pytestmark = [pytest.mark.team, pytest.mark.timeout(900)]
PATIENCE = 300
"""Seconds after which something that should have happened counts as hanging."""
ROOT, NAME = Path(__file__).parents[2], "ink-domainstudio"
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 10**8}
for attempt in range(5):
    cluster = Cluster()
    try:
        cluster.add_node(**node, include_dashboard=False)
        cluster.add_node(**node)
        break
    except Exception as error:  # Ray gives a node 30 s, which is little on a busy machine
        print(error, file=sys.stderr)
        cluster.shutdown()
print(cluster.address or "", flush=True)
sys.stdin.read()
cluster.shutdown()
"""

SWEEPS = {
    "grid": {
        "adaptation": NAME,
        "grid": {"weights.image": [0.5, 50.0, 500.0], "finetune.steps": [2, 4]},
        "send_inputs": True,
        "objective": {"metric": "frechet_distance", "at_most": {"memorized_share": 1.0}},
    },
    "failing": {"adaptation": NAME, "grid": {"weights.image": [0.5, 1e38], "finetune.steps": [4]}},
    "long": {"adaptation": NAME, "grid": {"finetune.steps": [100_000, 100_001]}, "gpus": 0.5},
}


@dataclass
class Project:
    """A project, and the variables by which its sweeps find their servers."""

    root: Path
    environment: dict[str, str]

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        own = {"PYTHONPATH": str(ROOT), **QUIET}
        return subprocess.Popen(
            [sys.executable, "-m", "flows.sweep", *arguments],
            cwd=self.root,
            env={**self.environment, **own, **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        return finish(self.start(*arguments, **variables))

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in self.root.glob(".cache/sweeps/*/record.json")]

    def artifacts(self) -> dict[str, Any]:
        """Return Prefect's newest artifact of each key."""
        with prefect_client(self.environment) as client:
            return {item.key: item.data for item in client.read_latest_artifacts()}


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"hangs:\n{process.communicate()[0]}") from None
    return process.returncode, output


def wait_for(find: Callable[[], Any], what: str, process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := find()):
        assert process.poll() is None, f"no {what}:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, f"no {what} after {PATIENCE} s"
        time.sleep(0.2)
    return found


def workers(name: str) -> list[psutil.Process]:
    """Return the processes that run a task of that name: Ray renames them."""
    return [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0] == f"ray::{name}"]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[dict[str, str]]:
    """A cluster of two nodes with a GPU each, in name only; yields the variables that lead to it."""
    folder = tempfile.mkdtemp(prefix="ray-")  # sockets lie in it, whose paths must be short
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    own = {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", **QUIET}
    with (Path(folder) / "cluster.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            cwd=folder,
            env={**os.environ, **variables, **own},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, Path(log.name).read_text()
        yield {**variables, "RAY_ADDRESS": address, "FOLDER": folder}
        process.communicate()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, team: Team) -> Project:
    root = tmp_path_factory.mktemp("sweep")
    tiny_denoiser().save(root / "models/sources/noto", half=True)
    records = tuple(ImageRecord(str(i), "0", 8, 8, f"{i}.png") for i in range(12))
    domain = ImageSet(tiny_images(12), records, origin="images")
    domain.save(root / "data/sources/noto")
    domain.save(root / "data/targets/ink/domain")
    domain.take(range(5)).save(root / "data/targets/ink/shots")
    (root / "subjects.txt").write_text("a house\n")
    values = params() | {"sweeps": SWEEPS, "registry": {"experiment": "sweeps"}}
    values["finetune"]["preview_every"] = 0
    text = yaml.safe_dump(values, sort_keys=False)
    (root / "params.yaml").write_text(text.replace(f"  {NAME}:\n", f"  {NAME}:  # mine\n", 1))
    return Project(root, {**os.environ, **team.environment})


@pytest.fixture
def mlflow(project, monkeypatch):
    """Yield a client of the team's MLflow."""
    from domainstudio.tracking.server import connect

    for name, value in project.environment.items():
        if name.startswith(("MLFLOW_", "AWS_")):
            monkeypatch.setenv(name, value)
    with connect() as client:
        yield client


def runs(mlflow: Any, start: str) -> list[Any]:
    """Return the runs with a name that begins so, in the order of their names."""
    experiment = mlflow.get_experiment_by_name("sweeps").experiment_id
    filters, order = f"attributes.run_name LIKE '{start}%'", ["attributes.run_name ASC"]
    return list(mlflow.search_runs([experiment], filters, order_by=order))


def files_of(mlflow: Any, run: Any) -> set[str]:
    return {item.path for item in mlflow.list_artifacts(run.info.run_id)}


def test_a_grid_on_two_nodes(project, ray_cluster, mlflow, tmp_path):
    before = (project.root / "params.yaml").read_text()
    nodes = {"DOMAINSTUDIO_WORKSPACES": str(tmp_path), "RAY_ADDRESS": ray_cluster["RAY_ADDRESS"]}
    access = {name: value for name, value in ray_cluster.items() if name.startswith("RAY_AUTH")}
    process = project.start("grid", "--write", **nodes, **access)
    wait_for(lambda: workers("grid-001"), "first trial", process)[0].kill()  # as if its node had died
    status, output = finish(process)
    assert status == 0, output
    assert "grid: 6 trained" in output

    # Never two trials on one GPU.
    records = project.records()
    assert len(records) == 6
    assert len({record["node_id"] for record in records}) == 2
    for place in {(record["node_id"], *record["gpus"]) for record in records}:
        assert len(place) == 2
        spans = sorted((r["started"], r["ended"]) for r in records if (r["node_id"], *r["gpus"]) == place)
        assert all(first[1] <= second[0] for first, second in pairwise(spans))
    # The inputs were sent, and nothing was read from the project's folder or written there.
    assert not (project.root / ".cache/features").exists()
    [workspace] = tmp_path.glob("domainstudio-sweep-*")
    assert not list(workspace.glob(".cache/sweeps/*/states"))

    # MLflow has it all.
    parent, *children = runs(mlflow, "grid")
    assert [child.info.run_name for child in children] == [f"grid-{number:03d}" for number in range(1, 7)]
    for run in (parent, *children):
        assert run.info.status == "FINISHED"
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        measured = {"total", "simple", "samples.frechet_distance", "samples.memorized_share"}
        assert measured <= child.data.metrics.keys()
    swept = {(c.data.params["weights.image"], c.data.params["finetune.steps"]) for c in children}
    assert swept == {(image, steps) for image in ("0.5", "50.0", "500.0") for steps in ("2", "4")}
    assert {"sweep.csv", "sweep.md"} <= files_of(mlflow, parent)
    assert {"grid.png", "record.json"} <= files_of(mlflow, children[0])

    # The best of the table is the best in MLflow, and in params.yaml.
    [folder] = project.root.glob(".cache/sweeps/grid-*")
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    best = min(children, key=lambda child: child.data.metrics["samples.frechet_distance"])
    first = min(rows, key=lambda row: float(row["frechet_distance"]))
    assert first["weights.image"] == best.data.params["weights.image"]
    assert first["finetune.steps"] == best.data.params["finetune.steps"]
    table = (folder / "sweep.md").read_text().splitlines()
    assert table[0] == "| weights.image | finetune.steps | frechet_distance | memorized_share | verdict |"
    assert table[2].startswith(f"| {first['weights.image']} | {first['finetune.steps']} | ")
    assert table[2].endswith("| best |")
    shown = project.artifacts()
    assert json.loads(shown["sweep-results"])[0]["verdict"] == "best"
    assert shown["sweep-progress"] == 100.0
    written = (project.root / "params.yaml").read_text()
    assert [line for line in written.splitlines() if line in before.splitlines()] == before.splitlines()
    assert f"  {NAME}:  # mine\n" in written
    adaptation = config.load(project.root / "params.yaml").adaptation(NAME)
    assert str(adaptation.weights.image) == first["weights.image"]
    assert str(adaptation.training.steps) == first["finetune.steps"]

    # Passwords reached the trials, and none of Ray's logs.
    password = project.environment["MLFLOW_TRACKING_PASSWORD"]
    logs = [path for path in Path(ray_cluster["FOLDER"]).rglob("*") if path.is_file()]
    assert any("grid-001" in path.read_text(errors="replace") for path in logs)
    assert not [path.name for path in logs if password in path.read_text(errors="replace")]

    # The same again needs no cluster, and is no second run.
    status, output = project.run("grid", RAY_ADDRESS="127.0.0.1:1")
    assert status == 0, output
    assert "grid: 6 kept" in output
    assert len(runs(mlflow, "grid")) == 7


def test_a_failing_trial_is_reported_and_the_others_count(project, ray_cluster, mlflow):
    variables = {name: value for name, value in ray_cluster.items() if name.startswith("RAY_")}
    status, output = project.run("failing", **variables)
    assert status == 0, output
    assert "1 failed" in output
    assert "the best: weights.image 0.5, finetune.steps 4" in output
    assert "failed weights.image 1e+38, finetune.steps 4: gradient norm is inf at step 1" in output
    parent, good, bad = runs(mlflow, "failing")
    assert [run.info.status for run in (parent, good, bad)] == ["FINISHED", "FINISHED", "FAILED"]
    assert bad.data.tags["mlflow.note.content"].startswith("gradient norm is inf")
    assert bad.data.tags["mlflow.parentRunId"] == parent.info.run_id
    [folder] = project.root.glob(".cache/sweeps/failing-*")
    assert "| 1e+38 | 4 | – | failed: gradient norm is inf" in (folder / "sweep.md").read_text()


def test_interrupting_leaves_no_process(project, mlflow):
    process = project.start("long")  # on a cluster that it starts here
    this = psutil.Process(process.pid)
    wait_for(lambda: workers("long-001") and workers("long-002"), "two trials on one GPU", process)
    wait_for(lambda: len(runs(mlflow, "long")) == 3, "runs in MLflow", process)
    started = this.children(recursive=True)
    assert {"raylet", "gcs_server"} <= {child.name() for child in started}
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    status, output = finish(process)
    assert status == 128 + signal.SIGINT, output
    assert psutil.wait_procs(started, timeout=0)[1] == []
    assert [run.info.status for run in runs(mlflow, "long")] == ["KILLED"] * 3


def test_a_misspelt_sweep_is_reported_before_a_server_starts(project):
    told = "error: sweeps has no 'none'; there are ['failing', 'grid', 'long']\n"
    assert project.run("none") == (2, told)
    status, output = project.run("long", "--dry-run")
    assert status == 0, output
    assert output.splitlines()[0].split() == ["long-001", "to", "run", "finetune.steps", "100000"]
