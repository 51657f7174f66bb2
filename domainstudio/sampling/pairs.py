"""Samples of a source model, and of a model just adapted from it: the same subjects from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainstudio.data import prompts
from domainstudio.distributed import this_process
from domainstudio.models.stored import StoredModel, Together
from domainstudio.project import SOURCE_MODELS
from domainstudio.sampling.folder import sample_stored, sample_to_folder

if TYPE_CHECKING:
    from domainstudio.config import Adaptation, Settings
    from domainstudio.models.denoiser import Denoiser


def sample_source(settings: Settings, source: str, work: Path) -> Path:
    """Draw the samples of a source model below `work`, unless they are there, and return their folder.

    Args:
        settings: all settings.
        source: a key of `sources`.
        work: the folder to write into.
    """
    subjects = prompts.read_subjects(settings.sources[source].subjects)
    model = SOURCE_MODELS / source
    return sample_stored(
        StoredModel(model), work, "source", settings.sample, subjects, subjects, model=source
    )


def sample_adapted(denoiser: Denoiser, adaptation: Adaptation, settings: Settings, folder: Path) -> None:
    """Draw the samples of a model that was just adapted: the subjects of its source, by its own prompts.

    Args:
        denoiser: the adapted model. Where the adaptation interpolates weights, they are changed in place.
        adaptation: the adaptation, which has the prompts.
        settings: all settings.
        folder: where to write.
    """
    subjects, adapted = _texts(adaptation, settings)
    manifest: dict[str, Any] = {"model": adaptation.name}
    if (together := Together.of(adaptation)) is not None:
        denoiser = together.join(denoiser)
        manifest |= together.facts
    denoiser = denoiser.to(this_process().device)
    sample_to_folder(denoiser, folder, settings.sample, adapted, subjects, **manifest)


def sample_adapted_stored(
    stored: StoredModel, adaptation: Adaptation, settings: Settings, work: Path
) -> Path:
    """Draw the samples of a stored adapted model below `work`, unless they are there; return their folder.

    Args:
        stored: the model, alone or together with its source model.
        adaptation: the adaptation, which has the prompts.
        settings: all settings.
        work: the folder to write into.
    """
    subjects, adapted = _texts(adaptation, settings)
    return sample_stored(stored, work, "samples", settings.sample, adapted, subjects, model=adaptation.name)


def _texts(adaptation: Adaptation, settings: Settings) -> tuple[list[str], list[str]]:
    """Return the subjects of an adaptation's source, and the adapted model's prompt of each."""
    subjects = prompts.read_subjects(settings.sources[adaptation.source].subjects)
    return subjects, prompts.sample_prompts(adaptation, subjects)
