"""A sweep laid out: the order of each trial, checked before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import domainstudio
from domainstudio.config import Adaptation, Settings, SweepSettings
from domainstudio.errors import ConfigError
from domainstudio.storage import checkpoint
from domainstudio.sweep import search
from domainstudio.tracking.server import is_served
from domainstudio.tracking.sweep_runs import trial_plan
from flows.sweep import shipping, worker

_OBSERVING: Any = {"name": True, "training": {"checkpoint_every", "preview_every"}}
"""Settings that change no figure."""


@dataclass(frozen=True)
class Planned:
    """A trial and its order."""

    trial: search.Trial
    order: worker.Order


@dataclass(frozen=True)
class SweepPlan:
    """All that a sweep needs."""

    name: str
    key: str
    """Hash of the trials and the objective; the same again is the same run in MLflow."""
    sweep: SweepSettings
    trials: tuple[Planned, ...]
    root: Path

    @property
    def folder(self) -> Path:
        """Where its tables are written."""
        return worker.FOLDER / f"{self.name}-{self.key[:8]}"

    @property
    def tables(self) -> tuple[Path, Path]:
        """Every trial as CSV, and the ranked settings as Markdown."""
        return self.folder / "sweep.csv", self.folder / "sweep.md"


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
    search.check(sweep.objective, f"sweeps.{name}.objective")
    digest = cache(shipping.digest)
    found: list[tuple[search.Trial, Adaptation, dict[str, str], str]] = []
    for trial in search.trials(sweep):
        adaptation = settings.overridden(sweep.adaptation, trial.overrides)
        digests = {part: digest(path) for part, path in shipping.paths(settings, adaptation).items()}
        found.append((trial, adaptation, digests, _key(settings, adaptation, digests)))
    keys = {str(trial.number): key for trial, _, _, key in found}
    sweep_key = checkpoint.run_key({"name": name, "objective": sweep.objective.model_dump()}, keys)
    live, planned = is_served(root) or not sweep.send_inputs, []
    for trial, adaptation, digests, key in found:
        run = trial_plan(
            f"{name}-{trial.number:03d}",
            checkpoint.run_key({"sweep": sweep_key}, {"trial": key}),
            adaptation,
            trial.overrides,
            digests,
            settings.registry.experiment,
            root,
        )
        planned.append(Planned(trial, worker.Order(str(root), key, settings, adaptation, run, live)))
    return SweepPlan(name, sweep_key, sweep, tuple(planned), root)


def _key(settings: Settings, adaptation: Adaptation, digests: dict[str, str]) -> str:
    """Return the hash of all that decides what is measured of a trial."""
    params = {
        "adaptation": adaptation.model_dump(mode="json", exclude=_OBSERVING),
        "sample": settings.sample.model_dump(mode="json"),
        "evaluate": settings.evaluate.model_dump(mode="json"),
        "version": domainstudio.__version__,
    }
    return checkpoint.run_key(params, digests)
