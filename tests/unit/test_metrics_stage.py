"""The stage `evaluate`, on folders as the other stages write them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from domainstudio.data import save_png
from domainstudio.metrics.networks import load_network, register_network
from domainstudio.storage.files import write_json
from stages import evaluate
from stages.cli import run
from tests.models import Averages, image_set, tiny_images
from tests.modules import ROOT


def write_samples(folder: Path, images: np.ndarray, first_seed: int = 1000) -> None:
    files = [f"images/{index:06d}.png" for index in range(len(images))]
    save_png(images, [folder / file for file in files])
    entries = [{"file": file, "seed": first_seed + index} for index, file in enumerate(files)]
    write_json(folder / "manifest.json", {"format": 1, "images": entries})


@pytest.fixture
def project(tmp_path, monkeypatch):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["evaluate"]["features"] = "averages"
    name, adaptation = next(iter(params["adaptations"].items()))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    domain = tiny_images(40)
    copies = np.concatenate([domain[[3]], domain[[3]][..., ::-1], tiny_images(10, 1)])
    for folder, images in ("domain", domain), ("shots", domain[:5]):
        image_set(images).save(tmp_path / "data/targets" / adaptation["target"] / folder)
    write_samples(tmp_path / "samples/adapted" / name, copies)
    write_samples(tmp_path / "samples/sources" / adaptation["source"], tiny_images(12, 2))
    register_network("averages", Averages)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", name])
    return tmp_path / "evaluation" / name


def test_the_stage_writes_metrics_and_nearest_pairs(project, capsys):
    evaluate.main()
    main = json.loads((project / "main.json").read_text())
    metrics = json.loads((project / "metrics.json").read_text())
    nearest = json.loads((project / "nearest.json").read_text())
    assert (metrics["features"], metrics["number"], metrics["domain_is_shots"]) == ("averages", 12, False)
    assert metrics["domain_number"] == 35, "the reference must not contain the training images"
    assert metrics["samples"]["memorized_share"] == pytest.approx(2 / 12)
    assert metrics["references"]["source"]["memorized_share"] == 0
    assert main["memorized"] == metrics["samples"]["memorized_share"]
    first, second = nearest["pairs"][:2]
    assert first == {"sample": 0, "seed": 1000, "training": 3, "mirrored": False, "distance": 0.0}
    assert second == {"sample": 1, "seed": 1001, "training": 3, "mirrored": True, "distance": 0.0}
    assert sorted(path.name for path in project.iterdir()) == ["main.json", "metrics.json", "nearest.json"]
    assert "12 samples by averages" in capsys.readouterr().out


def test_a_second_run_encodes_nothing_and_writes_the_same(project):
    evaluate.main()
    network, before = load_network("averages"), (project / "metrics.json").read_bytes()
    assert isinstance(network, Averages)
    seen = network.seen
    evaluate.main()
    assert network.seen == seen == 12 + 12 + 40 + 5 + 5 + 300, "the whole domain, shots included"
    assert (project / "metrics.json").read_bytes() == before


def test_an_unknown_adaptation_is_one_clean_line(project, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "nothing"])
    with pytest.raises(SystemExit) as stop:
        run(evaluate.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: adaptations has no 'nothing'")
