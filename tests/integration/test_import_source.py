"""Pretrained models brought into the project: from a folder, a real S3 server and MLflow's registry."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from domainstudio import models
from domainstudio.config import LoraSettings
from domainstudio.errors import CheckpointError, ConfigError, DataError, DomainStudioError
from domainstudio.models import lora
from domainstudio.registry.aliases import Alias, promote
from domainstudio.registry.versions import Entry, register
from domainstudio.tracking.server import TrackingError, connect, experiment_id
from stages import import_source
from tests.integration.mlflow_parts import save_pipeline, use_local_store
from tests.models import tiny_class_denoiser, tiny_text_denoiser

SOURCES = Path("models/sources")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_stage(monkeypatch):
    def run(name: str, location: str, *options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["import_source", name, location, *options])
        import_source.main()

    return run


def weights(folder: Path) -> dict[str, Any]:
    """Return a folder's tensors by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{p.relative_to(folder)}:{k}": v for p in files for k, v in load_file(p).items()}


def assert_same(imported: Path, original: Path) -> None:
    found, expected = weights(imported), weights(original)
    assert found.keys() == expected.keys() and expected
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def refused(run_stage: Any, location: str, message: str, kind: type[DomainStudioError]) -> None:
    """Refuse a location in the place of a model that is there, and where there is none."""
    save_pipeline(SOURCES / "kept", seed=9)
    before = models.digest(SOURCES / "kept")
    for name, *options in (("kept", "--replace"), ("new",)):
        with pytest.raises(kind, match=message):
            run_stage(name, location, *options)
    assert models.digest(SOURCES / "kept") == before
    assert [path.name for path in SOURCES.iterdir()] == ["kept"]


def test_a_folder_is_copied_without_what_is_no_pipeline(run_stage, root, capsys):
    tiny_class_denoiser().save(root / "there")
    (root / "there/unet/diffusion_pytorch_model.bin").write_bytes(b"pickled")
    (root / "there/whole-model.safetensors").write_bytes(b"for other programs")
    save_pipeline(SOURCES / "ours")
    with pytest.raises(ConfigError, match=r"ours: it is there already.*another name, or give --replace"):
        run_stage("ours", "there")
    run_stage("ours", "there", "--replace")
    assert_same(SOURCES / "ours/unet", root / "there/unet")
    files = {path.relative_to(SOURCES / "ours").as_posix() for path in (SOURCES / "ours").rglob("*.*")}
    assert files == {
        *("model_index.json", "classes.json", "scheduler/scheduler_config.json"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
    }
    assert capsys.readouterr().out.splitlines() == [
        "models/sources/ours: a model of 8x8 pixels, class-conditional",
        "version it with: dvc add models/sources/ours && git add models/sources/ours.dvc "
        "models/sources/.gitignore && dvc push",
        "then name it in params.yaml: sources: ours: {subjects: <file>}, source_images: ours: "
        "{images: demo/none.yaml}, and set prepare.resolution: 8",
    ]


def test_a_model_on_s3_is_the_same_model(s3, run_stage, root):
    tiny_text_denoiser().save(root / "there")
    url = s3.upload("models/ours", root / "there")
    run_stage("ours", f"{url}/")
    assert_same(SOURCES / "ours", root / "there")
    names = [{p.relative_to(top) for p in top.rglob("*")} for top in (SOURCES / "ours", root / "there")]
    assert names[0] == names[1]


def test_unusable_locations_on_s3_are_refused(s3, run_stage, root):
    save_pipeline(root / "there")
    url = s3.upload("import/unsafe", root / "there")
    s3.put("import/unsafe/unet/c:x.json", b"{}")
    refused(run_stage, url, r"unet/c:x\.json is not a safe path: rename", CheckpointError)
    refused(run_stage, f"s3://{s3.bucket}/import/nothing", "holds no objects", DataError)

    (weights_file,) = (root / "there").rglob("*.safetensors")
    weights_file.rename(weights_file.with_suffix(".bin"))
    url = s3.upload("import/pickled", root / "there")
    refused(run_stage, url, r"pickled has no weights as safetensors.*safe_serialization", CheckpointError)
    (root / "there/model_index.json").unlink()
    url = s3.upload("import/parts", root / "there")
    refused(run_stage, url, r"parts holds no diffusers pipeline.*model_index\.json", CheckpointError)


def test_unusable_folders_are_refused_by_their_own_name(run_stage, root):
    refused(run_stage, "./nowhere", r"nowhere has no model_index\.json", CheckpointError)
    save_pipeline(root / "damaged")
    (root / "damaged/unet/config.json").unlink()
    refused(run_stage, "damaged", r"^damaged is not a usable pipeline", CheckpointError)
    tiny_text_denoiser().save(root / "mixed")
    encoder = root / "mixed/text_encoder/model.safetensors"
    encoder.rename(encoder.with_name("pytorch_model.bin"))
    refused(run_stage, "mixed", r"^mixed/text_encoder has no weights as safetensors", CheckpointError)
    (root / "other").mkdir()
    (root / "other/model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    (root / "other/part").mkdir()
    shutil.copy(SOURCES / "kept/unet/diffusion_pytorch_model.safetensors", root / "other/part/x.safetensors")
    refused(run_stage, "other", "^other is a SanaPipeline", CheckpointError)


@pytest.mark.parametrize("name", ["../up", "a/b", "Ours", ""])
def test_a_name_that_is_no_key_is_refused(run_stage, root, name):
    save_pipeline(root / "there")
    with pytest.raises(ConfigError, match="cannot be a key of sources"):
        run_stage(name, "there")
    assert not Path("models").exists()


def test_registered_models_become_sources(run_stage, root, monkeypatch):
    use_local_store(root, monkeypatch)
    (root / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(root / "tmp"))
    tiny_class_denoiser().save(root / "base")
    denoiser = models.load("base")
    lora.attach(denoiser, LoraSettings(rank=2), seed=0)
    denoiser.save(root / "adapted")
    lora.save_merged(denoiser, root / "merged")
    with connect() as client:
        run_id = client.create_run(experiment_id(client, "tests")).info.run_id
    for folder in ("base", "adapted"):
        registered = register(Entry(f"tests-{folder}", Path(folder), "0" * 64, run_id, "", {}))
        promote(Alias(registered.name), registered.version, "newest")

    run_stage("plain", "models:/tests-base@champion")
    assert models.digest(SOURCES / "plain") == models.digest("base")
    run_stage("fused", "models:/tests-adapted/1")
    assert models.digest(SOURCES / "fused") == models.digest("merged")
    assert not list((root / "tmp").rglob("*.safetensors"))
    shutil.rmtree(SOURCES)
    refused(run_stage, "models:/tests-base@nobody", "alias nobody not found", TrackingError)
