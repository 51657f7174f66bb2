"""Read, check and pack images: `python -m stages.prepare source <name>` or `... target <name>`.

`source <name>` writes data/sources/<name>. `target <name>` writes data/targets/<name>/shots, the few training
images, and data/targets/<name>/domain, the whole domain they were drawn from.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from domainstudio import config
from domainstudio.data import ImageSet
from domainstudio.data.packing import prepare
from domainstudio.errors import ConfigError
from domainstudio.project import SOURCE_IMAGES, TARGETS
from domainstudio.storage.files import output_folder, write_text
from stages.cli import run
from stages.origins import LISTERS


def main() -> None:
    """Parse the command line and prepare what it names."""
    parser = argparse.ArgumentParser(prog="python -m stages.prepare", description=__doc__)
    parser.add_argument("what", choices=("source", "target"))
    parser.add_argument("name", help="key of `source_images` or of `targets` in params.yaml")
    parser.add_argument("--params", nargs="+", default=["params.yaml"], help="settings; later files win")
    arguments = parser.parse_args()
    settings = config.load(*arguments.params)
    prepare_one = _prepare_source if arguments.what == "source" else _prepare_target
    prepare_one(settings, arguments.name)


def _prepare_source(settings: config.Settings, name: str) -> None:
    if name not in settings.source_images:
        raise ConfigError(f"source_images has no {name!r}; there are {sorted(settings.source_images)}")
    source = settings.source_images[name]
    if not source.given:
        with output_folder(SOURCE_IMAGES / name) as partial:
            write_text(partial / "none.txt", f"source_images.{name} of params.yaml names no images\n")
        return
    images = prepare(source.images, settings.prepare, LISTERS, number=source.number, seed=source.seed)
    _write(SOURCE_IMAGES / name, {".": images})


def _prepare_target(settings: config.Settings, name: str) -> None:
    if name not in settings.targets:
        raise ConfigError(f"targets has no {name!r}; there are {sorted(settings.targets)}")
    target = settings.targets[name]
    number, seed, buckets = target.domain_number, target.seed, settings.prepare.aspect_buckets
    domain = prepare(target.domain, settings.prepare, LISTERS, number=number, seed=seed)
    same = target.shots == target.domain and not buckets
    shots = domain if same else prepare(target.shots, settings.prepare, LISTERS, buckets)
    shots = shots.draw(target.number, target.seed)
    _write(TARGETS / name, {"shots": shots, "domain": domain})


def _write(folder: Path, image_sets: dict[str, ImageSet]) -> None:
    with output_folder(folder) as partial:
        for name, images in image_sets.items():
            images.save(partial / name)
            left_out = f", {len(images.refused)} refused" if images.refused else ""
            shapes = ", ".join(
                f"{len(each)} of {each.images.shape[3]}×{each.images.shape[2]}" for each in images.buckets()
            )
            shapes = f", in buckets: {shapes}" if images.bucketed else ""
            print(f"{folder / name}: {len(images)} images from {images.origin}{left_out}{shapes}")


if __name__ == "__main__":
    run(main)
