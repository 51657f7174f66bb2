"""A sweep laid out: the order of each trial, checked before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import domainstudio
from domainstudio.config import Adaptation, Settings, SweepSettings
from domainstudio.errors import ConfigError
from domainstudio.storage.checkpoint import run_key
from domainstudio.tracking.runs import RunPlan, flatten, plan_for
from domainstudio.tracking.server import is_served
from flows.sweep import ranking, search, shipping
from flows.sweep.order import FOLDER, Order

_OBSERVING: Any = {"name": True, "training": {"checkpoint_every", "preview_every"}}
"""Settings that change no figure."""


@dataclass(frozen=True)
class SweepPlan:
    """All that a sweep needs."""

    name: str
    key: str
    """Hash of the trials and the objective; the same again is the same run in MLflow."""
    sweep: SweepSettings
    orders: tuple[Order, ...]
    root: Path

    @property
    def folder(self) -> Path:
        """Where its tables are written."""
        return FOLDER / f"{self.name}-{self.key[:8]}"

    @property
    def tables(self) -> tuple[Path, Path]:
        """The files of all trials, and of the settings in their order."""
        return self.folder / "sweep.csv", self.folder / "sweep.md"

    @property
    def run(self) -> RunPlan:
        """The sweep's run in MLflow."""
        objective = self.sweep.objective
        bounds = [f"{name} <= {bound:g}" for name, bound in objective.at_most.items()]
        bounds += [f"{name} >= {bound:g}" for name, bound in objective.at_least.items()]
        tags = {
            "sweep": self.name,
            "adaptation": self.sweep.adaptation,
            "objective": f"{objective.direction} {objective.metric}",
            "bounds": ", ".join(bounds),
        }
        return RunPlan(self.name, self.key, self.orders[0].run.experiment, tags=tags, kind="sweep")


def lay_out(name: str, settings: Settings, root: Path) -> SweepPlan:
    """Return the plan of a sweep.

    Args:
        name: a key of `sweeps`.
        settings: all settings.
        root: the project's folder, which is the working directory.

    Raises:
        ConfigError: there is no such sweep, or the settings of a trial are not possible.
        DataError: images or a source model are missing.
    """
    if name not in settings.sweeps:
        raise ConfigError(f"sweeps has no {name!r}; there are {sorted(settings.sweeps)}")
    sweep = settings.sweeps[name]
    ranking.check(sweep.objective, f"sweeps.{name}.objective")
    trials, digest = search.trials(sweep), cache(shipping.digest)
    adaptations = [settings.overridden(sweep.adaptation, trial.overrides) for trial in trials]
    inputs = [
        {part: digest(path) for part, path in shipping.paths(settings, adaptation).items()}
        for adaptation in adaptations
    ]
    keys = [_key(settings, *pair) for pair in zip(adaptations, inputs, strict=True)]
    numbered = {str(trial.number): key for trial, key in zip(trials, keys, strict=True)}
    sweep_key = run_key({"name": name, "objective": sweep.objective.model_dump()}, numbered)
    live, orders = is_served(root) or not sweep.send_inputs, []
    for trial, adaptation, digests, key in zip(trials, adaptations, inputs, keys, strict=True):
        title, trial_key = f"{name}-{trial.number:03d}", run_key({"sweep": sweep_key}, {"trial": key})
        experiment = settings.registry.experiment
        run = plan_for(title, trial_key, adaptation, experiment, inputs=digests, root=root)
        run = replace(run, kind="trial", params={**flatten(trial.overrides), **run.params})
        orders.append(Order(trial, str(root), key, settings, adaptation, run, live))
    return SweepPlan(name, sweep_key, sweep, tuple(orders), root)


def _key(settings: Settings, adaptation: Adaptation, digests: dict[str, str]) -> str:
    """Return the hash of all that decides what is measured of a trial."""
    params = {
        "adaptation": adaptation.model_dump(mode="json", exclude=_OBSERVING),
        **({"combine": adaptation.combine.model_dump(mode="json")} if adaptation.combine else {}),
        "sample": settings.sample.model_dump(mode="json"),
        "evaluate": settings.evaluate.model_dump(mode="json"),
        "version": domainstudio.__version__,
    }
    return run_key(params, digests)
