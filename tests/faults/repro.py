"""`dvc repro` that is killed with all its processes: started again, it makes what it makes undisturbed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.cases import WrongError
from tests.faults.stages import _content
from tests.project import environment, make_project

TARGET = "evaluate@ink-domainstudio"
OUTPUTS = ("data/targets/ink", "models/adapted", "samples", "training/ink-domainstudio", "evaluation")


class KilledRepro:
    """Kills at any moment of `dvc repro`."""

    name, weight = "repro", 20.0

    def __init__(self, folder: Path) -> None:
        self.root, self.before = folder / "project", folder / "before"
        make_project(self.root)
        shutil.copytree(self.root, self.before, symlinks=True)
        started = time.monotonic()
        status, said = self._repro(None)
        if status:
            raise RuntimeError(said[-3000:])
        self.seconds, self.expected = time.monotonic() - started, self._found()

    def case(self, rng: random.Random) -> str:
        shutil.rmtree(self.root)
        shutil.copytree(self.before, self.root, symlinks=True)
        kills = [rng.uniform(0, self.seconds) for _ in range(rng.choice((1, 1, 2)))]
        for after in kills:
            self._repro(after)
        status, said = self._repro(None)
        if status or "Traceback" in said:
            raise WrongError(f"after kills at {kills}: {said[-2000:]}")
        if (found := self._found()) != self.expected:
            differing = [
                name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name)
            ]
            raise WrongError(f"after kills at {kills}: {differing} differ")
        return "the same"

    def _repro(self, kill_after: float | None) -> tuple[int, str]:
        """Run `dvc repro`; kill its whole group after some seconds, as a node that is lost does."""
        command = [sys.executable, "-m", "dvc", "repro", TARGET]
        with (self.root.parent / "output").open("w+") as output:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=environment(warmed=False),  # all of its processes are killed at once
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                process.wait(kill_after)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return process.returncode, output.read()

    def _found(self) -> dict[str, object]:
        """Return what the stages have made, without times."""
        places = [self.root / output for output in OUTPUTS]
        files = [path for place in places for path in sorted(place.rglob("*")) if path.is_file()]
        return {
            path.relative_to(self.root).as_posix(): _content(path)
            for path in files
            if not path.name.endswith(".partial")  # of a process that was killed
        }
