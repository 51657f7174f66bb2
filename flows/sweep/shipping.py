"""What a trial reads: hashed, and packed for nodes that do not see the project's folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from domainstudio.data.image_set import MANIFEST
from domainstudio.errors import DataError
from domainstudio.project import SOURCE_IMAGES, SOURCE_MODELS, TARGETS
from domainstudio.storage.files import output_folder, sha256_of
from flows.run.workspace import WORKSPACES_VARIABLE

if TYPE_CHECKING:
    from ray import ObjectRef

    from domainstudio.config import Adaptation, Settings
    from flows.sweep.order import Order


def paths(settings: Settings, adaptation: Adaptation) -> dict[str, Path]:
    """Return all that training, sampling and measuring of an adaptation read, by name.

    Raises:
        DataError: the stages that make it were not run.
    """
    target, source = TARGETS / adaptation.target, adaptation.source
    found = {
        "source": SOURCE_MODELS / source,
        "subjects": Path(settings.sources[source].subjects),
        "shots": target / "shots",
        "domain": target / "domain",
    }
    images = SOURCE_IMAGES / source
    if (
        adaptation.takes_source_images or (images / MANIFEST).is_file()
    ):  # metrics use them where there are some
        found["source images"] = images
    for name, place in (("tiny_vae", adaptation.weights.tiny_vae), ("clip", settings.evaluate.clip)):
        if place is not None and Path(place).is_dir():  # else it is an id of the hub
            found[name] = Path(place)
    if missing := [str(path) for path in found.values() if not path.exists()]:
        raise DataError(
            f"{', '.join(missing)}: missing. `dvc repro prepare_target@{adaptation.target}` prepares the "
            f"target, `dvc repro prepare_source@{source}` its source's images, and `python -m "
            "stages.import_source` gets a model"
        )
    return found


def digest(path: Path) -> str:
    """Return the content hash of an image set, a model folder or a file.

    Raises:
        DataError: an image set's manifest is damaged.
    """
    from domainstudio import models

    if path.is_file():
        return sha256_of(path)
    if not (manifest := path / "manifest.json").is_file():
        return models.digest(path)
    try:
        return str(json.loads(manifest.read_text(encoding="utf-8"))["digest"])
    except (ValueError, KeyError) as error:
        raise DataError(f"{manifest} is damaged: prepare the images again") from error


def send(orders: Sequence[Order]) -> dict[str, dict[str, ObjectRef]]:
    """Hand what trials read to Ray, everything once, and return it by trial's key and by content."""
    import ray

    content, sent = cache(digest), cache(lambda path: ray.put(_packed(path)))
    return {
        order.key: {
            f"{path} {content(path)}": sent(path) for path in paths(order.settings, order.adaptation).values()
        }
        for order in orders
    }


def _packed(path: Path) -> bytes:
    """Return a file or folder as a zip archive, which Python unpacks nowhere but below a folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", strict_timestamps=False) as archive:
        for file in [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file()):
            archive.write(file, file.as_posix())
    return buffer.getvalue()


def unpack(archives: Mapping[str, ObjectRef]) -> Path:
    """Unpack archives on this node, unless they are there, and return the folder that is the project's then.

    Args:
        archives: of a trial, as `send` returned them.
    """
    import ray
    from filelock import FileLock

    base = Path(os.environ.get(WORKSPACES_VARIABLE) or tempfile.gettempdir())
    name = hashlib.sha256("".join(sorted(archives)).encode()).hexdigest()[:16]
    root = base / f"domainstudio-sweep-{name}"
    base.mkdir(parents=True, exist_ok=True)
    with FileLock(base / f".{root.name}.lock"):
        if not root.is_dir():
            with output_folder(root) as partial:
                for reference in archives.values():
                    with zipfile.ZipFile(io.BytesIO(ray.get(reference))) as archive:
                        archive.extractall(partial)
    return root
