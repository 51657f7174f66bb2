"""The graph of stages, read from DVC's own index. Only `dvc.yaml` defines it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from domainstudio.errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """One stage of `dvc.yaml`."""

    address: str
    """DVC's name of it: `report`, `finetune@ink`; with its folder's `dvc.yaml` in front if not the root's."""
    upstream: tuple[str, ...] = ()
    """Addresses of the stages whose outputs it reads, sorted."""
    gpus: int = 0
    """GPUs that it occupies: `meta: {gpu: n}`."""
    frozen: bool = False
    """DVC never runs it: its outputs are given."""
    description: str | None = None
    """`desc` of the stage."""
    inputs: tuple[str, ...] = ()
    """What it reads and no command of the graph makes: paths and URLs."""

    @property
    def group(self) -> str:
        """The name without its key: `finetune` of `finetune@ink`."""
        return self.address.partition("@")[0]

    @property
    def key(self) -> str | None:
        """The foreach or matrix key: `ink` of `finetune@ink`, none of `report`."""
        return self.address.partition("@")[2] or None


def read() -> dict[str, Stage]:
    """Return every stage of the current folder's DVC repository by its address.

    DVC writes addresses relative to the current folder: nothing else can be read rightly.

    Raises:
        ConfigError: there is no DVC repository, `dvc.yaml` is not usable, or a `meta.gpu` is no count.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            graph = repo.index.graph
            made = [out.fs_path for stage in graph if stage.cmd and not stage.frozen for out in stage.outs]
            return {
                stage.addressing: Stage(
                    address=stage.addressing,
                    upstream=tuple(sorted(upstream.addressing for upstream in graph.successors(stage))),
                    gpus=_gpus(stage.addressing, stage.meta),
                    frozen=bool(stage.frozen),
                    description=stage.desc,
                    inputs=tuple(dep.def_path for dep in stage.deps if not _is_made(dep.fs_path, made)),
                )
                for stage in graph
            }
    except DvcException as error:
        raise ConfigError(f"{Path.cwd()}: DVC cannot read the pipeline: {error}{_place(error)}") from error


def _place(error: Exception) -> str:
    """Return the line of a YAML file that DVC could not read, and why, as far as its error knows."""
    cause: Any = error.__cause__
    mark = getattr(cause, "problem_mark", None)
    return f", line {mark.line + 1}: {cause.problem}" if mark is not None else ""


def _is_made(path: str, made: Iterable[str]) -> bool:
    """Return whether a path is an output, is in one, or holds one."""
    return any(path == out or path.startswith(f"{out}/") or out.startswith(f"{path}/") for out in made)


def unchanged(stages: Mapping[str, Stage], wanted: Collection[str]) -> frozenset[str]:
    """Return the stages that `dvc repro` would skip as they and all that they need are up to date.

    One look at everything, where starting DVC for each stage takes a second or two. Stages that always run,
    as they look at what DVC does not see, run first. Empty while another process holds DVC's lock, or if one
    of those fails: each stage is then asked one by one.

    Args:
        stages: All.
        wanted: Addresses of those that are to run.
    """
    from dvc.exceptions import ReproductionError
    from dvc.lock import LockError
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)  # it would warn of each stage that a user has frozen
    try:
        with Repo() as repo:
            looks = {stage.addressing for stage in repo.index.stages if stage.always_changed} & set(wanted)
            for address in sorted(looks):
                repo.reproduce(address, single_item=True)
            return settled(stages, set(repo.status()) - looks)
    except (LockError, ReproductionError):
        return frozenset()


def settled(stages: Mapping[str, Stage], changed: Collection[str]) -> frozenset[str]:
    """Return the stages that are not `changed` and need none that is; a frozen one needs nothing."""
    order = TopologicalSorter({address: stage.upstream for address, stage in stages.items()})
    found: set[str] = set()
    for address in order.static_order():
        needed = () if stages[address].frozen else stages[address].upstream
        if address not in changed and found.issuperset(needed):
            found.add(address)
    return frozenset(found)


def select(stages: Mapping[str, Stage], names: Iterable[str] = ()) -> dict[str, Stage]:
    """Return the stages to run, in an order in which each comes after all that it needs.

    Without `names` these are all stages but the frozen ones. A name is a stage's address or a key: `ink`
    stands for every `...@ink`. All that these stages need is added; as in `dvc repro`, the inputs of a frozen
    stage are not made.

    Raises:
        ConfigError: a name fits no stage.
    """
    names = set(names)
    wanted = _closure(stages, _seeds(stages, names)) if names else set(stages)
    wanted = {address for address in wanted if not stages[address].frozen}
    order = TopologicalSorter(
        {address: [name for name in stages[address].upstream if name in wanted] for address in sorted(wanted)}
    )
    return {
        address: replace(
            stages[address], upstream=tuple(name for name in stages[address].upstream if name in wanted)
        )
        for address in order.static_order()
    }


def _seeds(stages: Mapping[str, Stage], names: set[str]) -> set[str]:
    known = set(stages) | {stage.key for stage in stages.values() if stage.key}
    if unknown := sorted(names - known):
        keys = sorted({stage.key for stage in stages.values() if stage.key})
        raise ConfigError(
            f"no stage of dvc.yaml is called or ends with {', '.join(map(repr, unknown))}. Known are the "
            f"keys {', '.join(keys) or '(none)'}, and every name that `dvc stage list` shows"
        )
    return {address for address, stage in stages.items() if names & {address, stage.key}}


def _closure(stages: Mapping[str, Stage], seeds: Iterable[str]) -> set[str]:
    found: set[str] = set()
    queue = list(seeds)
    while queue:
        stage = stages[queue.pop()]
        if stage.address not in found:
            found.add(stage.address)
            queue += () if stage.frozen else stage.upstream
    return found


def _gpus(address: str, meta: Any) -> int:
    count = meta.get("gpu", 0) if isinstance(meta, Mapping) else 0
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"dvc.yaml: meta.gpu of {address} must be a count of GPUs, got {count!r}")
    return count
