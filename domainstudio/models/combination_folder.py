"""Folders of two models that draw together: `source/`, `adapted/` and `combination.json`.

Both parts are whole pipelines in diffusers' format, so that programs without DomainStudio can read them.
Reading the record needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from domainstudio.config import Combination, combination_of
from domainstudio.errors import CheckpointError
from domainstudio.models.folders import COMBINATION
from domainstudio.models.wording import Wording

SOURCE, ADAPTED = "source", "adapted"
"""The folders of the two models."""


def write_record(folder: Path, combination: Combination, wording: Wording) -> None:
    """Write `combination.json`: how the models work together, and what the source model is told."""
    content = {"format": 1, "combine": combination.model_dump(mode="json"), "wording": wording.pairs}
    (folder / COMBINATION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> tuple[Combination, Wording]:
    """Read `combination.json`.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / COMBINATION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != 1:
            raise ValueError(f"format {content['format']} is unknown to this version of DomainStudio")
        pairs = tuple((str(pattern), str(template)) for pattern, template in content["wording"])
        return combination_of(content["combine"]), Wording(pairs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Export the model again") from error
