"""What happens to a process at a file-system event: it is killed, or its disk refuses."""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = {"os.rename": 0, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.link": 0, "os.truncate": 0}
"""Events of Python's audit that change a file system, and which of their arguments is the path."""


@dataclass(frozen=True)
class Interruption:
    """What happens, and when.

    Attributes:
        at: Number of the event, from 1; 0 lets all pass.
        refusal: Number of the operating system's error; 0 kills the process instead.
        largest: Bytes of a file beyond which nothing is written; 0 for no limit.
    """

    at: int = 0
    refusal: int = 0
    largest: int = 0


class Events:
    """Counts this process's changes below a folder, and interrupts one of them.

    A hook of `sys.addaudithook` cannot be taken away again: use it in a forked process.
    """

    def __init__(self, folder: Path, interruption: Interruption) -> None:
        self.folder, self.interruption, self.count = str(folder.resolve()), interruption, 0

    def start(self) -> None:
        if self.interruption.largest:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.interruption.largest, hard))
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, flags = arguments[0], arguments[2]
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            path = arguments[CHANGES[event]]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = str(Path(os.fsdecode(path)).absolute())
        if not name.startswith(self.folder) or "__pycache__" in name:
            return
        self.count += 1
        if self.count != self.interruption.at:
            return
        if not self.interruption.refusal:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.interruption.refusal, os.strerror(self.interruption.refusal), name)
