"""Import a pretrained model into models/sources, check it, and print what to write into params.yaml.

python -m stages.import_source sd15 stable-diffusion-v1-5/stable-diffusion-v1-5
python -m stages.import_source ours s3://bucket/models/ours
python -m stages.import_source zimage Tongyi-MAI/Z-Image --resolution 1024
python -m stages.import_source best models:/domainstudio-sunglasses-domainstudio@champion
"""

from __future__ import annotations

import argparse

from stages.cli import run


def main() -> None:
    """Copy a pipeline from a folder, the hub, S3 or MLflow's registry, and load it once to check it."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.import_source",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="its name: the key of sources in params.yaml")
    parser.add_argument("location", help="folder, hub id, s3://bucket/prefix or models:/name@alias")
    parser.add_argument("--replace", action="store_true", help="overwrite a source of this name")
    parser.add_argument(
        "--resolution", type=int, help="height and width of its images, for a model that takes any size"
    )
    arguments = parser.parse_args()

    from domainstudio import git
    from domainstudio.config import NO_IMAGES
    from domainstudio.registry.importing import import_source

    name = arguments.name
    folder, denoiser = import_source(
        name, arguments.location, replace=arguments.replace, resolution=arguments.resolution
    )
    height, width = denoiser.resolution
    added = f"dvc add {folder} && git add {folder}.dvc {folder.parent}/.gitignore && dvc push"
    print(
        f"{folder}: a model of {height}x{width} pixels, {denoiser.kind}\n"
        f"version it with: {f'git add {folder}' if git.tracks('.', folder) else added}\n"
        f"then name it in params.yaml: sources: {name}: {{subjects: <file>}}, source_images: {name}: "
        f"{{images: {NO_IMAGES}}}, and set prepare.resolution: {height}"
    )


if __name__ == "__main__":
    run(main)
