"""One training run: its key, and a training whose states and progress others keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from domainstudio.project import CHECKPOINTS
from domainstudio.storage import checkpoint
from domainstudio.storage.mirror import mirrored

if TYPE_CHECKING:
    from domainstudio.config import Section
    from domainstudio.training.trainer import Tracker, Trainer

    MakeTrainer: TypeAlias = Callable[[Path, Tracker | None], Trainer]
    """Makes a trainer, given the folder of its states and its tracker."""


@dataclass(frozen=True)
class TrainingRun:
    """All that decides the result of a training.

    Attributes:
        name: of the adaptation, or of the stage; it decides nothing.
        settings: the resolved adaptation, or a section of params.yaml.
        inputs: content hashes of what it is trained from, by name.
        processes: how many share it. The global batch is so many times larger.
    """

    name: str
    settings: Section
    inputs: Mapping[str, str]
    processes: int = 1

    @cached_property
    def params(self) -> dict[str, Any]:
        """The settings as JSON values, with the number of processes where it is above 1."""
        processes = {"processes": self.processes} if self.processes > 1 else {}
        return self.settings.model_dump(mode="json") | processes

    @cached_property
    def key(self) -> str:
        """Hash of settings and inputs: the name of the run's folder of states."""
        return checkpoint.run_key(self.params, self.inputs)

    def train(
        self,
        make_trainer: MakeTrainer,
        tracker: AbstractContextManager[Tracker | None],
        checkpoints: Path = CHECKPOINTS,
    ) -> Trainer:
        """Train to the last step, from the last state if there is one, here or on S3.

        Args:
            make_trainer: makes the trainer once the newest state is there.
            tracker: entered for the time of the training.
            checkpoints: folder of all runs' states.

        Returns:
            The trainer, with the history and the trained model.
        """
        folder = checkpoints / self.key
        with mirrored(folder), tracker as tracking:
            trainer = make_trainer(folder, tracking)
            trainer.train()
        return trainer
