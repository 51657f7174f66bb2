"""The candidates of a training: found in its folder of states, drawn as the adaptation is drawn."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from domainstudio.distributed import this_process
from domainstudio.errors import CheckpointError
from domainstudio.models.stored import Together
from domainstudio.selection.chooser import SOURCE, Candidate, Chooser
from domainstudio.storage import candidates
from domainstudio.storage.checkpoint import run_key
from domainstudio.training.examples import texts_of

if TYPE_CHECKING:
    from domainstudio.config import Adaptation, Settings
    from domainstudio.models.denoiser import Denoiser
    from domainstudio.selection.record import Selection
    from domainstudio.training.recipe import Recipe

SAMPLES = "choice"
"""Folder of the candidates' samples, below the run's folder of states."""


@dataclass(frozen=True)
class TrainingChoice:
    """Chooses among the candidates of one training.

    Attributes:
        recipe: What is trained.
        settings: All settings.
        states: The run's folder of states.
        source: Folder of the source model's samples.
    """

    recipe: Recipe
    settings: Settings
    states: Path
    source: Path

    @classmethod
    def of(cls, recipe: Recipe, settings: Settings, states: Path) -> Self | None:
        """Prepare a choice before the training, while the recipe's model is still the source model.

        Its samples are drawn, unless they are there. All processes take part.

        Returns:
            The choice, or None for an adaptation without candidates.
        """
        adaptation, denoiser = recipe.adaptation, recipe.denoiser
        if not adaptation.training.candidate_every:
            return None
        chooser = _chooser(recipe, settings, states)
        source = Candidate(0, SOURCE, recipe.digests["source"], lambda: denoiser)
        drawn = chooser.draw(source, texts_of(denoiser, adaptation, "source", recipe.shots))
        return cls(recipe, settings, states, drawn)

    def choose(self, trained: Denoiser, output: Path) -> Selection:
        """Choose a candidate, give the model its weights, and write the record. All processes take part.

        Args:
            trained: The trained model.
            output: Folder for the record and the pictures.

        Raises:
            CheckpointError: a candidate is missing or damaged.
        """
        started, process = time.monotonic(), this_process()
        texts = texts_of(trained, self.recipe.adaptation, "target", self.recipe.shots)
        trained.to(process.device)
        chooser, files = _chooser(self.recipe, self.settings, self.states), self._files()
        drawn = []
        for step, path in files.items():
            loaded = _Loaded(trained, path, self._adaptation)
            candidate = Candidate(step, path.stem, self._digest(path), loaded)
            drawn.append((candidate, chooser.draw(candidate, texts)))
        found = chooser.choose(self.source, drawn)
        _load(trained, files[found.chosen])
        if process.is_main_process:
            found.write(output, self.source, {candidate.name: folder for candidate, folder in drawn})
            self._tell(found, files, time.monotonic() - started)
        process.wait_for_everyone()
        return found

    @property
    def _adaptation(self) -> Adaptation:
        return self.recipe.adaptation

    def _files(self) -> dict[int, Path]:
        """Return the candidates' files by step.

        Raises:
            CheckpointError: one was never here.
        """
        training, found = self._adaptation.training, candidates.listed(self.states)
        every = training.candidate_every
        wanted = sorted({*range(every, training.steps + 1, every), training.steps})
        missing = [step for step in wanted if step not in found]
        if missing:
            raise CheckpointError(
                f"{self.states / candidates.FOLDER} lacks the candidates of the steps {missing}: they were "
                "deleted, or made on another machine. Bring them back, or delete "
                f"{self.states} and train again"
            )
        return {step: found[step] for step in wanted}

    def _digest(self, path: Path) -> str:
        facts: dict[str, Any] = {"combine": None}
        if (together := Together.of(self._adaptation)) is not None:
            facts = {**together.facts, "wording": together.wording.pairs}
        return run_key(facts, {"weights": candidates.digest(path)})

    def _tell(self, found: Selection, files: dict[int, Path], seconds: float) -> None:
        print(f"chosen in {seconds:.0f} s: {found.summary}", flush=True)
        if not self.settings.choose.keep:
            for step, path in files.items():
                if step != found.chosen:
                    candidates.delete(path)
            return
        sizes = [path.stat().st_size for path in files.values() if path.is_file()]
        print(
            f"{len(sizes)} candidates stay in {self.states / candidates.FOLDER} ({sum(sizes) / 1e6:.0f} MB), "
            "so that another rule needs no training; choose.keep: false deletes them",
            flush=True,
        )


def _chooser(recipe: Recipe, settings: Settings, states: Path) -> Chooser:
    return Chooser(
        recipe.shots.images,
        settings.choose,
        settings.sample,
        settings.evaluate.features,
        states / SAMPLES,
        recipe.adaptation.training.horizontal_flip,
    )


@dataclass(frozen=True)
class _Loaded:
    """Gives a model a candidate's weights, and its source model if it is drawn with that."""

    trained: Denoiser
    path: Path
    adaptation: Adaptation

    def __call__(self) -> Denoiser:
        _load(self.trained, self.path)
        together = Together.of(self.adaptation)
        if together is None:
            return self.trained
        return together.join(self.trained).to(this_process().device)


def _load(denoiser: Denoiser, path: Path) -> None:
    """Give a model a candidate's weights, in place.

    Raises:
        CheckpointError: they are not this model's.
    """
    weights = candidates.read(path)
    try:
        unknown = denoiser.network.load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{len(unknown)} weights are unknown, such as {unknown[0]}")
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"the candidate {path} does not fit the model: {error}. Train again") from error
