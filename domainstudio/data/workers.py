"""Processes that work through a list side by side, and end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from domainstudio.errors import ConfigError, DataError

WORKERS_VARIABLE = "DOMAINSTUDIO_WORKERS"
"""How many processes read images; by default one for each core that this process may use."""

T = TypeVar("T")
R = TypeVar("R")


def number_of_workers() -> int:
    """Return how many processes may work side by side.

    Raises:
        ConfigError: the environment variable is no count.
    """
    if text := os.environ.get(WORKERS_VARIABLE):
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"{WORKERS_VARIABLE} must be a number of processes from 1, got {text!r}")
        return int(text)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return len(cores)


def each(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Yield what `work` makes of each item, in their order; in this process where nothing is gained.

    Args:
        work: A function that can be pickled.
        items: What to work on; where they cannot be pickled, this process works alone.

    Raises:
        ConfigError: as `number_of_workers`.
        DataError: a worker was killed.
    """
    workers = min(number_of_workers(), len(items))
    if workers < 2 or not _can_be_sent(items[0]):
        yield from map(work, items)
        return
    # A clean process makes the workers: threads and devices of this one are not theirs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.func.__module__ if hasattr(work, "func") else work.__module__])
    try:
        with ProcessPoolExecutor(workers, context, _follow_parent) as pool:
            yield from pool.map(work, items)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that reads images was killed, perhaps for want of memory: set "
            f"{WORKERS_VARIABLE} to less than {workers}, and start again. What was read is kept"
        ) from error


def _can_be_sent(item: object) -> bool:
    try:
        pickle.dumps(item)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it does: after a kill a worker would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
