"""The deployments that are no pipeline, each run by a real server and its worker: choose, promote, sweep."""

from __future__ import annotations

from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from domainstudio import models
from domainstudio.config import LoraSettings
from domainstudio.models import lora
from domainstudio.models.adapter_folder import KOHYA
from domainstudio.selection.record import Selection
from tests.integration.team_parts import NAME, Company
from tests.integration.test_sweep import ray_cluster
from tests.project import run

__all__ = ["ray_cluster"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.team, pytest.mark.timeout(7200)]


def upload(company: Company, prefix: str, folder: Path) -> str:
    for path in sorted(folder.iterdir()):
        boto3.client("s3").upload_file(str(path), company.bucket, f"{prefix}/{path.name}")
    return f"s3://{company.bucket}/{prefix}"


def lora_files(source: Path, folder: Path) -> Path:
    """Write two LoRA files of a training, of which the second changes the model more."""
    for step, scale in ((100, 0.1), (200, 0.5)):
        denoiser = models.load(source)
        lora.attach(denoiser, LoraSettings(rank=2, alpha=4), seed=0)
        torch.manual_seed(step)
        with torch.no_grad():
            for name, parameter in denoiser.network.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=scale)
        denoiser.save(folder / "whole")
        (folder / "files").mkdir(exist_ok=True)
        (folder / "whole" / KOHYA).rename(folder / f"files/ink-{step:06d}.safetensors")
    return folder / "files"


def pictures(folder: Path, number: int) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(number):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_a_lora_file_of_another_trainer_is_chosen(company, tmp_path):
    source = company.source / "models/sources/noto-text"
    files = upload(company, "loras", lora_files(source, tmp_path))
    shots = upload(company, "shots", pictures(tmp_path / "shots", 5))
    out = f"s3://{company.bucket}/chosen"
    given = {"adapters": files, "shots": shots, "source": str(source), "prompts": ["ink"]}
    company.start("choose/choose", **given, out=out, options={"number": 8, "steps": 2})
    told = company.finished("choose", 1).state.message
    s3 = boto3.client("s3")
    keys = [each["Key"] for each in s3.list_objects_v2(Bucket=company.bucket, Prefix="chosen/")["Contents"]]
    for key in keys:
        s3.download_file(company.bucket, key, str(tmp_path / Path(key).name))
    selection = Selection.read(tmp_path)
    assert selection is not None
    chosen = selection.best.name
    assert told.startswith(f"{out}/{chosen}.safetensors: ") and chosen in ("ink-000100", "ink-000200")
    assert {"chosen/report.html", "chosen/selection.json", f"chosen/{chosen}.safetensors"} <= {*keys}
    original = (tmp_path / "files" / f"{chosen}.safetensors").read_bytes()
    assert (tmp_path / f"{chosen}.safetensors").read_bytes() == original


def test_a_version_is_promoted_and_rolled_back_by_the_settings_of_a_revision(company):
    client = company.mlflow()
    client.create_registered_model(company.model)
    for _ in range(2):
        client.create_model_version(company.model, "s3://mlflow/none")
    (company.source / "params.yaml").rename(company.source / "elsewhere.yaml")  # the worker's folder has none
    try:
        for version in ("1", "2"):
            company.start("promote/promote", adaptation=NAME, version=version, revision="main")
            company.finished("promote", int(version))
            assert company.aliases()["champion"] == version
        company.start("rollback/rollback", adaptation=NAME, revision="main")
        company.finished("rollback", 1)
        assert company.aliases()["champion"] == "1"
    finally:
        (company.source / "elsewhere.yaml").rename(company.source / "params.yaml")


def test_a_sweep_names_the_best_setting(company, ray_cluster):
    path = company.source / "params.yaml"
    objective = {"metric": "frechet_distance", "direction": "minimize"}
    values = yaml.safe_load(path.read_text())
    values["sweeps"] = {
        "small": {"adaptation": NAME, "grid": {"finetune.steps": [2, 3]}, "objective": objective}
    }
    path.write_text(yaml.safe_dump(values))
    run(company.source, "dvc", "repro", "prepare_source@noto", "prepare_target@ink")
    nodes = {name: value for name, value in ray_cluster.items() if name.startswith("RAY_")}
    company.start("sweep/sweep", {"OMP_NUM_THREADS": "1", **nodes}, name="small")
    assert company.finished("sweep", 1).state.message.startswith("small: 2 trained")
