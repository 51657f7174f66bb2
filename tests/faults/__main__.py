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
from pathlib import Path
from tempfile import TemporaryDirectory

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


def _images(folder: Path) -> Kind:
    from tests.faults.images import DamagedImages

    return DamagedImages(folder)


def _settings(folder: Path) -> Kind:
    from tests.faults.settings import MistakenSettings

    return MistakenSettings(folder)


def _states(folder: Path) -> Kind:
    from tests.faults.states import DamagedStates

    return DamagedStates(folder)


def _caches(folder: Path) -> Kind:
    from tests.faults.states import DamagedCaches

    return DamagedCaches(folder)


def _sets(folder: Path) -> Kind:
    from tests.faults.states import DamagedImageSets

    return DamagedImageSets(folder)


def _models(folder: Path) -> Kind:
    from tests.faults.models import DamagedModels

    return DamagedModels(folder)


CHEAP: dict[str, Callable[[Path], Kind]] = {
    "images": _images,
    "settings": _settings,
    "states": _states,
    "caches": _caches,
    "sets": _sets,
    "models": _models,
}
"""Kinds whose cases need no process of their own."""


def _repro(folder: Path) -> Kind:
    from tests.faults.repro import KilledRepro

    return KilledRepro(folder)


def _disks(project: object) -> Kind:
    from tests.faults.stages import RefusedWrites

    return RefusedWrites(project)  # type: ignore[arg-type]


def _kills(project: object) -> Kind:
    from tests.faults.stages import KilledStages

    return KilledStages(project)  # type: ignore[arg-type]


PIPELINES: dict[str, Callable[[Path], Kind]] = {"repro": _repro}
"""Kinds that run the whole pipeline: minutes for each case."""

FORKED: dict[str, Callable[[object], Kind]] = {"disks": _disks, "kills": _kills}
"""Kinds whose cases run stages in forked processes."""


KINDS = [*CHEAP, *FORKED, *PIPELINES]


if __name__ == "__main__":
    sys.exit(main())
