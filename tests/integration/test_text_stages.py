"""The stages on a text-to-image model: captions in, prompts out, adapters registered."""

import json
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from domainstudio import models
from domainstudio.metrics.networks import register_network
from stages import evaluate, finetune, import_source, prepare, register, report, sample
from tests.any_size import FAMILIES
from tests.integration.mlflow_parts import decode, served, use_local_store
from tests.models import Averages, tiny_text_denoiser
from tests.project import params as project_params
from tests.project import write_images

NAMES = ("text-lora", "text-domainstudio")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a tiny Stable Diffusion pipeline and nine captioned images."""
    write_images(tmp_path / "images", 9)
    for index in range(9):
        (tmp_path / f"images/{index:02d}.txt").write_text(f"house {index}")
    (tmp_path / "subjects.txt").write_text("house 7\nhouse 8\n")
    tiny_text_denoiser("sd1").save(tmp_path / "models/sources/tiny")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params()))
    use_local_store(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    register_network("averages", Averages)
    return tmp_path


def params():
    values = project_params()
    values["prepare"]["resolution"] = 16
    values["sources"] = {"tiny": {"subjects": "subjects.txt"}}
    values["source_images"] = {"tiny": {"images": "demo/none.yaml"}}
    values["methods"] |= {
        "lora": {"simple": 1.0, "prior": 1.0, "lora": {"rank": 2}},
        "text": {"simple": 1.0, "image": 0.5, "high_frequency": 0.5, "high_frequency_mse": 0.05},
    }
    values["adaptations"] = {
        "text-lora": {"source": "tiny", "target": "ink", "method": "lora", "prior": {"number": 5}},
        "text-domainstudio": {"source": "tiny", "target": "ink", "method": "text"},
    }
    values["registry"]["models"] = {name: name for name in values["adaptations"]}
    values["finetune"] |= {"steps": 4, "preview_every": 2}
    values["evaluate"]["features"] = "averages"
    return values


def run(monkeypatch, stage, *arguments):
    monkeypatch.setattr(sys, "argv", [stage.__name__, *arguments])
    stage.main()


def test_from_captions_to_a_report(project, monkeypatch):
    run(monkeypatch, prepare, "target", "ink")
    run(monkeypatch, sample, "source", "tiny")
    for name in NAMES:
        run(monkeypatch, finetune, name)
        run(monkeypatch, sample, "adapted", name)
        run(monkeypatch, evaluate, name)
    drawn = {
        place: json.loads((project / "samples" / place / "manifest.json").read_text())["images"]
        for place in ("sources/tiny", "adapted/text-lora", "adapted/text-domainstudio")
    }
    for place, images in drawn.items():
        assert [image["subject"] for image in images] == ["house 7", "house 8"] * 3
        style = "" if place.startswith("sources") else " in [V] style"
        assert [image["prompt"] for image in images] == [f"house 7{style}", f"house 8{style}"] * 3
        assert [image["seed"] for image in images] == [1000, 1001, 1002, 1003, 1004, 1005]

    metrics = json.loads((project / "evaluation/text-lora/metrics.json").read_text())
    assert metrics["paired"]["samples"]["number"] + metrics["paired"]["samples"]["trained"] == 6
    history = (project / "training/text-lora/history.jsonl").read_text().splitlines()
    assert all(json.loads(line)["prior"] > 0 for line in history)
    folder = project / "models/adapted/text-lora"
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    assert not (folder / "model_index.json").exists(), "adapters are small: no copy of the pipeline"
    assert models.load(folder).conditional

    run(monkeypatch, report)
    page = (project / "report.html").read_text()
    assert "house 7 in [V] style" in page
    assert "Real drawings of the subjects below" in page


def test_the_same_prior_images_serve_a_second_training(project, monkeypatch, capsys):
    run(monkeypatch, prepare, "target", "ink")
    run(monkeypatch, finetune, "text-lora")
    key = json.loads((project / "models/adapted/text-lora/provenance.json").read_text())["key"]
    before = {path: path.stat().st_mtime_ns for path in (project / ".cache/prior").glob("*/images/*.png")}
    assert len(before) == 5
    run(monkeypatch, finetune, "text-lora")
    assert json.loads((project / "models/adapted/text-lora/provenance.json").read_text())["key"] == key
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("family", ["sd3", "pixart", "z-image", "flux-1", "flux-2", "qwen-image"])
def test_a_family_goes_from_import_to_serving(project, tmp_path, monkeypatch, family):
    """With adapters and pairwise terms, from a folder to a picture that `mlflow models serve` answers."""
    pipeline, size = tiny_text_denoiser(family).pipeline, []
    if family in FAMILIES:
        pipeline.vae.register_to_config(sample_size=1024)
        size = ["--resolution", "16"]
    pipeline.save_pretrained(project / "there")
    values = params()
    values["sources"]["theirs"] = {"subjects": "subjects.txt"}
    values["source_images"]["theirs"] = {"images": "demo/none.yaml"}
    values["registry"]["models"] = {"ours": "domainstudio-ours"}
    values["methods"]["lora"] |= {"image": 0.5, "high_frequency": 0.5, "high_frequency_mse": 0.05}
    values["adaptations"] = {
        "ours": {"source": "theirs", "target": "ink", "method": "lora", "prior": {"number": 3}}
    }
    values["finetune"] |= {"steps": 2, "preview_every": 0}
    negative = "" if family == "flux-1" else "a house"  # a distilled model takes none
    values["sample"] |= {"scheduler": "dpm-solver++", "guidance_scale": 3.0, "negative": negative}
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    run(monkeypatch, import_source, "theirs", "there", *size)
    run(monkeypatch, prepare, "target", "ink")
    run(monkeypatch, sample, "source", "theirs")
    run(monkeypatch, finetune, "ours")
    run(monkeypatch, sample, "adapted", "ours")
    run(monkeypatch, evaluate, "ours")
    run(monkeypatch, register, "ours")

    with served("models:/domainstudio-ours/1", project / "mlflow.db", tmp_path / "serve.txt") as ask:
        request = {"prompt": "house 7 in [V] style", "negative_prompt": negative}
        status, drawn = ask(request, {"seed": 1000, "scheduler": "dpm-solver++"})
        assert status == 200, drawn
        if family == "flux-1":
            status, said = ask({**request, "negative_prompt": "a house"}, {})
            assert status == 400 and "is distilled for guidance: leave the column negative_prompt" in said
    expected = project / "samples/adapted/ours/images/000000.png"
    found = np.asarray(decode(drawn[0]["png"])).astype(int)
    assert found.std() > 10
    np.testing.assert_allclose(found, np.asarray(Image.open(expected)).astype(int), atol=2)
