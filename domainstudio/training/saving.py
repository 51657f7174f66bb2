"""Training states that are written beside the training: a step waits for a copy of them, not for the disk."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from domainstudio.storage import checkpoint


class StateWriter:
    """Writes the states of one training, one at a time, in a thread of its own.

    Args:
        folder: the run's states.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "states")
        self._pending: tuple[int, Future[Path]] | None = None
        self._durable = 0

    def write(self, step: int, state: Mapping[str, Any]) -> None:
        """Copy a state to the CPU and begin to write it; what is in `state` may change from then on.

        Raises:
            OSError: the state before it could not be written.
        """
        self.durable(wait=True)
        packed = checkpoint.pack(step, state)
        self._pending = step, self._thread.submit(checkpoint.write, self._folder, packed)

    def durable(self, *, wait: bool) -> int:
        """Return the last step whose state is on the disk whole, or 0 before the first one.

        Args:
            wait: for the state that is being written.

        Raises:
            OSError: it could not be written.
        """
        if self._pending is not None and (wait or self._pending[1].done()):
            (step, written), self._pending = self._pending, None
            written.result()
            self._durable = step
        return self._durable
