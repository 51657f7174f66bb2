"""The graph of stages, read from DVC's own index. Only `dvc.yaml` defines it."""

from __future__ import annotations

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
            return {
                stage.addressing: Stage(
                    address=stage.addressing,
                    upstream=tuple(sorted(upstream.addressing for upstream in graph.successors(stage))),
                    gpus=_gpus(stage.addressing, stage.meta),
                    frozen=bool(stage.frozen),
                    description=stage.desc,
                )
                for stage in graph
            }
    except DvcException as error:
        raise ConfigError(f"{Path.cwd()}: DVC cannot read the pipeline: {error}") from error


def unchanged(stages: Mapping[str, Stage]) -> frozenset[str]:
    """Return the stages that `dvc repro` would skip as they and all that they need are up to date.

    One look at everything, where starting DVC for each stage takes a second or two. Empty while another
    process holds DVC's lock: each stage is then asked one by one.
    """
    from dvc.lock import LockError
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            return settled(stages, set(repo.status()))
    except LockError:
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
    stands for every `...@ink`, and for stages without a key that read one of them, such as the report. All
    that these stages need is added, with two exceptions. As in `dvc repro`, the inputs of a frozen stage
    are not made. And a stage without a key adds no other members of a group: adapting one model must not
    train all, and the report shows what is there.

    Raises:
        ConfigError: a name fits no stage.
    """
    names = set(names)
    wanted = _closure(stages, _seeds(stages, names), names) if names else set(stages)
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


def _seeds(stages: Mapping[str, Stage], names: Collection[str]) -> set[str]:
    known = set(stages) | {stage.key for stage in stages.values() if stage.key}
    if unknown := sorted(set(names) - known):
        keys = sorted({stage.key for stage in stages.values() if stage.key})
        raise ConfigError(
            f"no stage of dvc.yaml is called or ends with {', '.join(map(repr, unknown))}. Known are the "
            f"keys {', '.join(keys) or '(none)'}, and every name that `dvc stage list` shows"
        )
    keyed = {address for address, stage in stages.items() if stage.key in names}
    gathering = {a for a, stage in stages.items() if stage.key is None and keyed.intersection(stage.upstream)}
    return keyed | gathering | set(names).intersection(stages)


def _closure(stages: Mapping[str, Stage], seeds: set[str], names: Collection[str]) -> set[str]:
    groups = {stages[seed].group for seed in seeds if stages[seed].key}
    found: set[str] = set()
    queue = list(seeds)
    while queue:
        stage = stages[queue.pop()]
        if stage.address in found:
            continue
        found.add(stage.address)
        if stage.frozen:
            continue
        gathers = stage.key is None and stage.address not in names
        queue += [
            name
            for name in stage.upstream
            if not (gathers and stages[name].group in groups and name not in seeds)
        ]
    return found


def _gpus(address: str, meta: Any) -> int:
    count = meta.get("gpu", 0) if isinstance(meta, Mapping) else 0
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"dvc.yaml: meta.gpu of {address} must be a count of GPUs, got {count!r}")
    return count
