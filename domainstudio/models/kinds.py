"""What kind of model a folder holds, from its small files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

from domainstudio import models
from domainstudio.errors import CheckpointError

Kind: TypeAlias = Literal["unconditional", "class-conditional", "text-to-image"]


def has_adapters(folder: Path) -> bool:
    """Return whether a folder holds adapters in place of a whole model."""
    from domainstudio.models import adapter_folder

    return (folder / adapter_folder.RECORD).is_file()


def kind_of(folder: Path) -> Kind:
    """Return the kind of the model in a folder; adapters are of their source model's kind.

    Raises:
        CheckpointError: there is no model, its index is damaged, or the source model of adapters is gone.
    """
    from domainstudio.models import adapter_folder, class_conditional, text_to_image

    if has_adapters(folder):
        base = str(_read(folder / adapter_folder.RECORD).get("base"))
        try:
            folder = models.local_folder(base)
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder} holds adapters, and their source model is not there: {error}. Run from the "
                f"project's root, or bring {base} back"
            ) from error
    if _read(folder / "model_index.json").get("_class_name") in text_to_image.PIPELINES:
        return "text-to-image"
    return "class-conditional" if class_conditional.has_classes(folder) else "unconditional"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it must hold a mapping")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return content
