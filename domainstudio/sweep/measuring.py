"""An adaptation outside of DVC, in one process: what benchmarks and sweeps make of it once it is trained.

Training is `adaptation.load_inputs` and `adaptation.make_trainer`, as in the stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from domainstudio.config import Adaptation, Settings
from domainstudio.data import prompts
from domainstudio.metrics.measure import measure_folders
from domainstudio.models.denoiser import Denoiser
from domainstudio.sampling import default_device, sample_stored, sample_to_folder


def draw_source(settings: Settings, source: str, work: Path) -> Path:
    """Draw the source model's samples, where they are missing; return their folder.

    Args:
        settings: what to draw, and how.
        source: a key of `sources`.
        work: folder that keeps them.
    """
    subjects = _subjects(settings, source)
    model = Path("models/sources") / source
    return sample_stored(model, work, "source", settings.sample, subjects, subjects, model=source)


def draw_adapted(denoiser: Denoiser, adaptation: Adaptation, settings: Settings, folder: Path) -> None:
    """Draw an adapted model's samples, where they are missing: what the source model drew, as it is now told.

    Args:
        denoiser: the adapted model.
        adaptation: what it is told.
        settings: what to draw, and how.
        folder: where to write.
    """
    if not (folder / "manifest.json").is_file():
        subjects = _subjects(settings, adaptation.source)
        told = prompts.sample_prompts(adaptation, subjects)
        sample_to_folder(
            denoiser.to(default_device()), folder, settings.sample, told, subjects, model=adaptation.name
        )


def measure(samples: Path, source: Path, adaptation: Adaptation, settings: Settings) -> dict[str, Any]:
    """Return the content of metrics.json.

    Args:
        samples: folder of the adapted model's samples.
        source: folder of the source model's.
        adaptation: names the target.
        settings: how to measure.
    """
    target = Path("data/targets") / adaptation.target
    return measure_folders(samples, source, target, settings.evaluate)[0]


def _subjects(settings: Settings, source: str) -> list[str]:
    return prompts.read_subjects(settings.sources[source].subjects)
