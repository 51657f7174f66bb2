"""Peak memory of a stretch of code: of the accelerator where there is one, else of the process."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

CLEAR = Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Begin to measure anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")  # resets VmHWM, proc(5)


def peak_memory() -> int:
    """Return the peak since `reset_peak_memory` in MiB; where the system cannot reset it, of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if CLEAR.exists():
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
