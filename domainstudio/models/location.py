"""What a saved folder must not say: where its parts were loaded from."""

from __future__ import annotations

import json
from pathlib import Path


def forget_location(folder: Path) -> None:
    """Remove the paths that diffusers notes in a saved pipeline, so that the same model is the same files."""
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
