"""Where the stages keep their files, below the project's root. `dvc.yaml` names the same folders."""

from pathlib import Path

SOURCE_IMAGES = Path("data/sources")
"""A folder per source of which `params.yaml` names real images."""

TARGETS = Path("data/targets")
"""A folder per target, with the image sets `shots` (the few training images) and `domain` (all images)."""

SOURCE_MODELS, ADAPTED_MODELS = Path("models/sources"), Path("models/adapted")
SOURCE_SAMPLES, ADAPTED_SAMPLES = Path("samples/sources"), Path("samples/adapted")

TRAINING = Path("training")
"""A folder per adaptation: `history.jsonl`, `losses.csv` and `previews`."""

EVALUATION = Path("evaluation")
"""A folder per adaptation: `metrics.json` and `nearest.json`."""

REGISTRY = Path("registry")
"""A file per adaptation, which names its registered model."""

REPORT, REPORTS = Path("report.html"), Path("reports")
"""Every adaptation side by side, and a folder with a page per adaptation."""

CHECKPOINTS = Path(".checkpoints")
"""Unfinished trainings and samples, by the hash of all that decides their result."""
