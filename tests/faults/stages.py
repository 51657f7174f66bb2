"""Stages that are killed, or whose disk refuses, at any file-system event or moment: then they go on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import yaml

from domainstudio.errors import DISK_STATUS
from domainstudio.metrics.networks import register_network
from tests.faults.cases import WrongError
from tests.faults.events import Events, Interruption
from tests.models import Averages, tiny_denoiser
from tests.project import params, write_images

ADAPTATION = "ink-domainstudio"
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)


@dataclass(frozen=True)
class Stage:
    """A stage, what it makes, and where runs are kept while it works."""

    module: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    tracked: bool = False


STAGES = {
    "prepare": Stage("prepare", ("target", "ink"), ("data/targets/ink",)),
    "finetune": Stage("finetune", (ADAPTATION,), (f"models/adapted/{ADAPTATION}", f"training/{ADAPTATION}")),
    "sample": Stage("sample", ("adapted", ADAPTATION), (f"samples/adapted/{ADAPTATION}",)),
    "evaluate": Stage("evaluate", (ADAPTATION,), (f"evaluation/{ADAPTATION}",)),
    "register": Stage("register", (ADAPTATION,), (f"registry/{ADAPTATION}.json",), tracked=True),
}


@dataclass(frozen=True)
class Ended:
    """How a forked stage ended."""

    status: int
    said: str
    events: int
    seconds: float


class Project:
    """A small project, the state before each stage, and what an undisturbed stage makes."""

    def __init__(self, folder: Path, names: tuple[str, ...] = tuple(STAGES)) -> None:
        register_network(Averages.name, Averages)  # the files are what is tried, not the figures
        self.root, self.before = folder / "project", folder / "before"
        _write_project(self.root)
        if "register" in names:
            _make_database(self.root)
        self.expected: dict[str, Any] = {}
        self.whole: dict[str, Ended] = {}
        for name, stage in STAGES.items():
            if name == "sample":
                _undisturbed(self.root, Stage("sample", ("source", "noto"), ()))
            shutil.copytree(self.root, self.before / name)
            self.whole[name] = _undisturbed(self.root, stage)
            self.expected[name] = self.found(name)
            if name == names[-1]:
                break

    def reset(self, name: str) -> None:
        """Make the project what it was before a stage."""
        shutil.rmtree(self.root)
        shutil.copytree(self.before / name, self.root)

    def found(self, name: str) -> Any:
        """Return what a stage has made, without times."""
        files = {}
        for output in STAGES[name].outputs:
            place = self.root / output
            for path in [place] if place.is_file() else sorted(place.rglob("*")):
                if path.is_file() and not path.name.endswith(".partial"):  # of a process that was killed
                    files[path.relative_to(self.root).as_posix()] = _content(path)
        return [files, _runs(self.root)] if STAGES[name].tracked else files


class KilledStages:
    """A stage that was killed makes, started again, what it makes undisturbed, bit by bit."""

    name, weight = "kills", 40.0

    def __init__(self, project: Project) -> None:
        self.project = project

    def case(self, rng: random.Random) -> str:
        name = rng.choice(list(self.project.expected))
        whole, stage = self.project.whole[name], STAGES[name]
        self.project.reset(name)
        at_event = rng.random() < 0.7
        interruption = Interruption(at=rng.randint(1, whole.events) if at_event else 0)
        after = None if at_event else rng.uniform(0, whole.seconds)
        ended = fork(self.project.root, stage, interruption, after)
        if ended.status not in (0, -signal.SIGKILL):
            raise WrongError(f"{name} ended with {ended.status}: {ended.said[-800:]}")
        _goes_on(self.project, name, f"after a kill at {interruption.at or after}")
        return f"{name}: the same"


class RefusedWrites:
    """A stage whose disk refuses says so in a line, and makes the same once the disk is well again."""

    name, weight = "disks", 25.0

    def __init__(self, project: Project) -> None:
        self.project = project

    def case(self, rng: random.Random) -> str:
        name = rng.choice(list(self.project.expected))
        self.project.reset(name)
        at, refusal = rng.randint(1, self.project.whole[name].events), rng.choice(REFUSALS)
        interruption = Interruption(at, refusal)
        if rng.random() < 0.3:  # the disk is full in the midst of a file
            interruption = Interruption(largest=rng.choice((1, 1000, 20_000, 100_000)))
        ended = fork(self.project.root, STAGES[name], interruption)
        told = re.search(r"^error: .*", ended.said, re.MULTILINE)
        if ended.status not in (0, DISK_STATUS) or "Traceback" in ended.said:
            raise WrongError(f"{name}, {interruption}: ended with {ended.status}: {ended.said[-1500:]}")
        if ended.status and (told is None or not re.search(r"\(\d[^)]* free of \d", told[0])):
            raise WrongError(f"{name}, {interruption}: said {told and told[0]}")
        _goes_on(self.project, name, f"after {interruption}")
        return f"{name}: {'told' if ended.status else 'done without'}, then the same"


def warm_up() -> None:
    """Import what stages import, so that forked ones need not."""
    import importlib

    for name in ("mlflow", "domainstudio.registry.registration", "domainstudio.selection.training"):
        importlib.import_module(name)
    for stage in STAGES.values():
        importlib.import_module(f"stages.{stage.module}")


def _goes_on(project: Project, name: str, when: str) -> None:
    again = fork(project.root, STAGES[name], Interruption())
    if again.status:
        raise WrongError(f"{name} {when} does not go on: {again.said[-800:]}")
    found, expected = project.found(name), project.expected[name]
    if found != expected:
        raise WrongError(f"{name} {when} makes something else: {_difference(found, expected)}")


def _difference(found: Any, expected: Any) -> str:
    if isinstance(found, list):
        pairs = zip(found, expected, strict=True)
        return "; ".join(_difference(one, other) for one, other in pairs if one != other)
    return ", ".join(f"{key}" for key in sorted({*found, *expected}) if found.get(key) != expected.get(key))


def _undisturbed(root: Path, stage: Stage) -> Ended:
    ended = fork(root, stage, Interruption())
    if ended.status:
        raise RuntimeError(f"{stage.module} failed: {ended.said[-2000:]}")
    return ended


def fork(root: Path, stage: Stage, interruption: Interruption, kill_after: float | None = None) -> Ended:
    """Run a stage in a forked process, whose imports are those of this one."""
    started = time.monotonic()
    reading, writing = os.pipe()  # a limit of files' sizes does not hold for it
    child = os.fork()
    if child == 0:
        _be(root, stage, interruption, writing)
    os.close(writing)
    with open(reading, "rb", buffering=0) as output:  # noqa: PTH123 - a descriptor
        os.set_blocking(reading, False)
        ended, told = _wait(child, output, None if kill_after is None else started + kill_after)
    said = told.decode("utf-8", "replace")
    counted = re.search(r"\nEVENTS (\d+)\n", said)
    status = os.waitstatus_to_exitcode(ended)
    return Ended(status, said, int(counted[1]) if counted else 0, time.monotonic() - started)


def _wait(child: int, output: RawIOBase, deadline: float | None) -> tuple[int, bytes]:
    """Return how a process ended and what it said; it is killed at a time, or when waiting is interrupted."""
    said = b""
    try:
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            said += output.read() or b""
            if deadline is not None and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return ended[1], said + (output.read() or b"")


def _be(root: Path, stage: Stage, interruption: Interruption, output: int) -> None:
    """Be the stage's process, and end."""
    import importlib

    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(root)
        if stage.tracked:
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{root}/mlflow.db"
        else:
            sys.modules["mlflow"] = None  # type: ignore[assignment]  # a training goes on without it
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        sys.argv = [stage.module, *stage.arguments]
        module = importlib.import_module(f"stages.{stage.module}")
        events = Events(root, interruption)
        events.start()
        try:
            module.run(module.main)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        print(f"\nEVENTS {events.count}")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _write_project(root: Path) -> None:
    root.mkdir(parents=True)
    write_images(root / "images", 12)
    (root / "subjects.txt").write_text("a house\n")
    tiny_denoiser().save(root / "models/sources/noto", half=True)
    values = params()
    values["evaluate"]["features"] = Averages.name
    values["finetune"] |= {"candidate_every": 3, "preview_every": 3}
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    (root / "dvc.lock").write_text("schema: '2.0'\n")


def _make_database(root: Path) -> None:
    """Make MLflow's tables once: it takes some seconds."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{root}/mlflow.db", str(root / "mlartifacts"))
    store.engine.dispose()


def _content(path: Path) -> Any:
    """Return what a file says, without times."""
    if path.suffix not in (".csv", ".jsonl"):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".csv":
        header, *rows = (line.split(",") for line in path.read_text().splitlines())
        return [[value for name, value in zip(header, row, strict=True) if name != "seconds"] for row in rows]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "timestamp")} for record in records]


def _runs(root: Path) -> dict[str, Any]:
    """Return what MLflow's tables hold of runs and versions, and their files, without ids and times."""
    with sqlite3.connect(root / "mlflow.db") as database:
        queries: dict[str, str] = {
            "runs": "select name, status from runs",
            "versions": "select name, version from model_versions",
            "aliases": "select name, alias, version from registered_model_aliases",
            "metrics": "select key, step, count(*) from metrics where key = 'total' group by 1, 2",
        }
        found: dict[str, Any] = {name: sorted(database.execute(query)) for name, query in queries.items()}
        source = database.execute("select storage_location from model_versions").fetchall()
    for (place,) in source:
        folder = Path(str(place).removeprefix("file://"))
        found["files"] = {
            path.relative_to(folder).as_posix(): path.stat().st_size * (path.suffix == ".safetensors")
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    return found
