"""Commands of a flow run, such as `dvc repro` of one stage: none outlives the flow."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TypeVar

from domainstudio import telemetry
from domainstudio.errors import (
    DISK_STATUS,
    UNAVAILABLE_STATUS,
    USER_ERROR_STATUS,
    DomainStudioError,
    UnavailableError,
)

Log = Callable[[str], None]
T = TypeVar("T")

GRACE_SECONDS = 10.0
"""Time between SIGTERM and SIGKILL, for a stage to end by itself."""
KILL_SECONDS = 5.0
"""Longest wait after SIGKILL, until the kernel has ended a process and freed its memory."""
PROGRESS_SECONDS = 10.0
"""A progress bar redraws many times a second; it is logged once in this time."""
DELAYS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0)
"""Seconds between attempts while another DVC process holds a lock, or a server is away."""

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PASSING = {
    "Unable to acquire lock": "another DVC process holds a lock",
    "is busy, it is being blocked by": "another DVC process holds a lock",
    "endpoint URL": "the DVC remote does not answer",
}
"""Parts of DVC's error messages about passing problems, and a plain name for each."""
_UNCHANGED = re.compile(r"^Stage '.*' (didn't change, skipping|is cached - skipping run)")
_HINTS = re.compile(
    r"To track the changes with git|\s+git add |To enable auto staging|\s+dvc config core.autostage"
    r"|Use `dvc push`|Data and pipelines are up to date|(Generating|Updating) lock file"
    r"|WARNING: (Some of the cache files do not|No file hash info found|stage: '.*' is frozen)|md5: \w{32}"
)
"""What DVC prints for a person at a terminal: hints, what nobody has pushed yet, and what it never runs."""
_EXITED = re.compile(r"exited with (-?\d+)$")
_LAUNCHED = re.compile(r"^\s*exitcode\s*: (\d+) ")
"""How the launcher of several processes reports one that failed; it exits with 1 itself."""
_LINE_LIMIT = 2000


class StageFailedError(DomainStudioError):
    """A stage's command failed; the message names the stage and quotes its last lines."""

    def __init__(self, address: str, status: int, tail: Sequence[str], seconds: float) -> None:
        self.status, self.seconds = status, seconds
        quoted = "\n".join(f"  {line}" for line in tail)
        super().__init__(f"{address} failed with exit status {status}; its last lines:\n{quoted}")

    @property
    def retryable(self) -> bool:
        """Whether another attempt may succeed."""
        return self.status not in (USER_ERROR_STATUS, DISK_STATUS)


class StoppedError(DomainStudioError):
    """The flow is being stopped: the command was ended, or not started."""


@dataclass(frozen=True)
class Outcome:
    """What became of one stage."""

    cached: bool
    """DVC found its outputs up to date, or took them from its run cache."""
    seconds: float
    """Wall time, waiting for locks included."""


class Commands:
    """Runs stages, from any number of threads, and can end all of them at once and for good."""

    def __init__(self, root: str | Path = ".", *, grace: float = GRACE_SECONDS) -> None:
        self._root = Path(root)
        self._grace = grace
        self._running: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._stopping = threading.Event()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """End every running command with its children; later ones are not started. May be called again."""
        self._stopping.set()
        with self._guard:
            running = tuple(self._running)
        for process in running:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + self._grace
        for process in running:
            _end_group(process, max(0.0, deadline - time.monotonic()))

    def run(
        self, command: Sequence[str], log: Log, name: str, variables: Mapping[str, str] | None = None
    ) -> Sequence[str]:
        """Run a command that is no stage, such as `dvc pull`. It waits for locks and servers like `repro`.

        Args:
            command: The program and its arguments.
            log: Gets each line of output as it comes, from another thread.
            name: What it does, for messages.
            variables: Further environment variables.

        Returns:
            The last lines of its output.

        Raises:
            StageFailedError: It failed.
            StoppedError: `stop` was called, before or meanwhile.
        """
        return self._patiently(command, log, name, variables or {})

    def repro(
        self,
        address: str,
        log: Log,
        *,
        force: bool = False,
        pull: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Bring one stage up to date: `dvc repro --single-item`.

        It is tried again, after `DELAYS`, if another DVC process holds a lock or a server does not answer.

        Args:
            address: The stage.
            log: Gets each line of output as it comes, from another thread.
            force: Run it even if nothing changed.
            pull: Take from the DVC remote what was made before, here or elsewhere, instead of making it.
            variables: Further environment variables, such as those that name its GPUs.

        Raises:
            StageFailedError: DVC or the stage's command failed, the lock stayed taken, or the server away.
            StoppedError: `stop` was called, before or meanwhile.
        """
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", address]
        for wanted, option in ((force, "--force"), (pull, "--pull")):
            if wanted:
                command.insert(-1, option)
        start = time.monotonic()
        tail = self._patiently(command, log, address, variables or {})
        return Outcome(any(_UNCHANGED.match(line) for line in tail), time.monotonic() - start)

    def _patiently(
        self, command: Sequence[str], log: Log, name: str, variables: Mapping[str, str]
    ) -> Sequence[str]:
        start = time.monotonic()
        for delay in (*DELAYS, None):
            status, tail = self._run(command, log, variables)
            if status == 0:
                return tail
            status = _stage_status(status, tail)
            reason = _passing(status, tail)
            if delay is None or reason is None:
                raise StageFailedError(name, status, _telling(tail), time.monotonic() - start)
            log(_waiting(name, reason, delay))
            if self._stopping.wait(delay):
                raise StoppedError(f"{name} was not run: the flow is being stopped")
        raise AssertionError("unreachable")

    def _run(
        self, command: Sequence[str], log: Log, variables: Mapping[str, str]
    ) -> tuple[int, Sequence[str]]:
        process = self._start(command, variables)
        tail: deque[str] = deque(maxlen=40)
        reader = threading.Thread(target=_stream, args=(process.stdout, log, tail), daemon=True)
        reader.start()
        try:
            status = process.wait()
        finally:
            # Also after a good end: a leftover child would keep the pipe open, and perhaps a GPU busy.
            _end_group(process, self._grace)
            reader.join(self._grace)
            with self._guard:
                self._running.discard(process)
        if self.stopping:
            raise StoppedError(f"{command[-1]} was ended: the flow is being stopped")
        return status, tuple(tail)

    def _start(self, command: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self._guard:
            # Under the guard, so that `stop` sees either the process or no start at all.
            if self.stopping:
                raise StoppedError(f"{command[-1]} was not run: the flow is being stopped")
            process = subprocess.Popen(
                command,
                cwd=self._root,
                env={**environment(os.environ), **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # A group of its own: SIGTERM to `dvc repro` alone would orphan the stage's command.
                start_new_session=True,
            )
            self._running.add(process)
            return process


def patiently(action: Callable[[], T], log: Log, name: str, delays: Sequence[float] = DELAYS) -> T:
    """Call something, and again later while a server does not answer.

    Args:
        action: What to call; it must be safe to call twice.
        log: Gets a line for each wait.
        name: What it does, for messages.
        delays: Seconds between attempts.

    Raises:
        UnavailableError: The server stayed away.
    """
    for delay in delays:
        try:
            return action()
        except UnavailableError as error:
            log(_waiting(name, str(error), delay))
        time.sleep(delay)
    return action()


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return a stage's environment: this Python first on the path, unbuffered lines, no statistics sent."""
    folders = [str(Path(sys.executable).parent), *filter(None, base.get("PATH", "").split(os.pathsep))]
    return {
        **telemetry.OFF,
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        **base,
        "PATH": os.pathsep.join(dict.fromkeys(folders)),
    }


def _stream(pipe: IO[bytes], log: Log, tail: deque[str]) -> None:
    logged = float("-inf")
    # newline="" keeps the terminators, which tell a redrawn progress bar (\r) from a line (\n).
    with TextIOWrapper(pipe, encoding="utf-8", errors="replace", newline="") as lines:
        for raw in lines:
            line = _ESCAPES.sub("", raw).rstrip()[:_LINE_LIMIT]
            if not line or _HINTS.match(line):
                continue
            if raw.endswith("\r"):
                if time.monotonic() - logged < PROGRESS_SECONDS:
                    continue
                logged = time.monotonic()
            else:
                tail.append(line)
            log(line)


def _stage_status(status: int, tail: Sequence[str]) -> int:
    if found := [int(match[1]) for line in tail if (match := _EXITED.search(line))]:
        status = found[-1]
    launched = [int(match[1]) for line in tail if (match := _LAUNCHED.search(line))]
    return launched[-1] if launched and status == 1 else status


def _passing(status: int, tail: Sequence[str]) -> str | None:
    """Return why a command failed if the problem passes by itself, else None."""
    if status == UNAVAILABLE_STATUS:
        return "a server does not answer"
    errors = [line for line in tail if line.startswith("ERROR")]
    return next((reason for sign, reason in _PASSING.items() if any(sign in line for line in errors)), None)


def _waiting(name: str, reason: str, delay: float) -> str:
    return f"{name} waits: {reason}; next attempt in {delay:g} s"


def _telling(tail: Sequence[str]) -> Sequence[str]:
    return [line for line in tail if not line.startswith(("> ", "Running stage"))][-6:]


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    try:
        # start_new_session made the process the leader, so its pid is the group's.
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, KILL_SECONDS)):
        if not _signal_group(process, number):
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            process.poll()
            if not _signal_group(process, 0):
                return
            time.sleep(0.05)
