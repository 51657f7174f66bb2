"""Try faults until the time is over: `python -m tests.faults --seed 0 --minutes 5`, or `make test-faults`."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.faults.cases import Kind, Tally, try_case

MEMORY = 16 * 2**30
"""Bytes of address space: a file that claims more memory than this fails its case."""


def main() -> int:
    """Parse the command line, try the cases, and print what became of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="what all cases are drawn from")
    parser.add_argument("--minutes", type=float, default=5.0, help="time after which no further case begins")
    parser.add_argument("--cases", type=int, help="number of cases of each kind, in place of a time")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--case", type=int, help="only the case of this number")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported
    numbers = [arguments.case] if arguments.case is not None else range(arguments.cases or sys.maxsize)
    with TemporaryDirectory() as place:
        tallies = try_all(Path(place), arguments.kinds, arguments.seed, numbers, 60 * arguments.minutes)
    failed = show(tallies, arguments.seed)
    return 1 if failed else 0


def try_all(
    folder: Path, names: Sequence[str], seed: int, numbers: Sequence[int], seconds: float
) -> dict[str, Tally]:
    """Try cases of kinds until the time is over: each kind has its share of it."""
    tallies: dict[str, Tally] = {}
    groups = ([name for name in names if name in group] for group in (CHEAP, FORKED, PIPELINES))
    cheap, forked, pipelines = groups
    kinds = [*_made(cheap, folder), *_forked(forked, folder), *_made(pipelines, folder)]
    end = time.monotonic() + seconds  # what the cases start from is made, which takes a while
    for index, kind in enumerate(kinds):
        tally = tallies[kind.name] = Tally()
        left = sum(each.weight for each in kinds[index:])
        until = time.monotonic() + (end - time.monotonic()) * kind.weight / left
        for number in numbers:
            if time.monotonic() > until:
                break
            with _silence():
                try_case(kind, seed, number, tally)
    return tallies


def show(tallies: dict[str, Tally], seed: int) -> int:
    """Print figures and failures; return how many cases failed."""
    print(f"seed {seed}\n{'kind':<10}{'tried':>8}{'failed':>8}{'seconds':>9}  what became of them")
    for name, tally in tallies.items():
        became = ", ".join(f"{outcome} {number}" for outcome, number in sorted(tally.outcomes.items()))
        print(f"{name:<10}{tally.tried:>8}{len(tally.failures):>8}{tally.seconds:>9.0f}  {became}")
    tried = sum(tally.tried for tally in tallies.values())
    failures = list(itertools.chain.from_iterable(tally.failures for tally in tallies.values()))
    print(f"{'all':<10}{tried:>8}{len(failures):>8}")
    for failure in failures[:20]:
        print(f"\n{failure}")
    return len(failures)


def _made(names: Sequence[str], folder: Path) -> Iterator[Kind]:
    for name in names:
        (folder / name).mkdir()
        with _silence():
            kind = {**CHEAP, **PIPELINES}[name](folder / name)
        yield kind


def _forked(names: Sequence[str], folder: Path) -> Iterator[Kind]:
    if not names:
        return
    import torch

    from tests.faults.stages import Project, warm_up

    torch.set_num_threads(1)  # a forked process has no other threads
    warm_up()
    with _silence():
        project = Project(folder / "stages")
    for name in names:
        yield FORKED[name](project)


class _silence:  # noqa: N801 - a context, which libraries of C write past Python's streams in
    """Send what is printed to nowhere, also what libraries print themselves."""

    def __enter__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.kept = [os.dup(number) for number in (1, 2)]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nowhere, number)
        os.close(nowhere)

    def __exit__(self, *error: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in zip((1, 2), self.kept, strict=True):
            os.dup2(kept, number)
            os.close(kept)


def _later(module: str, name: str) -> Callable[[Any], Kind]:
    """Return what makes a kind of what it starts from; its module, and so torch, is imported only then."""

    def make(start: Any) -> Kind:
        kind: Kind = getattr(import_module(f"tests.faults.{module}"), name)(start)
        return kind

    return make


CHEAP: dict[str, Callable[[Path], Kind]] = {
    "images": _later("images", "DamagedImages"),
    "settings": _later("settings", "MistakenSettings"),
    "states": _later("states", "DamagedStates"),
    "caches": _later("states", "DamagedCaches"),
    "sets": _later("states", "DamagedImageSets"),
    "models": _later("models", "DamagedModels"),
}
"""Kinds whose cases need no process of their own."""

FORKED: dict[str, Callable[[Any], Kind]] = {
    "disks": _later("stages", "RefusedWrites"),
    "kills": _later("stages", "KilledStages"),
}
"""Kinds whose cases run stages in forked processes. They start from a `Project`."""

PIPELINES: dict[str, Callable[[Path], Kind]] = {"repro": _later("repro", "KilledRepro")}
"""Kinds that run the whole pipeline: minutes for each case."""

KINDS = [*CHEAP, *FORKED, *PIPELINES]


if __name__ == "__main__":
    sys.exit(main())
