"""The stage `tradeoff`: what it draws and measures, how it goes on, and how the report shows it."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from domainstudio import config, report
from domainstudio.config import SampleSettings, SwitchSettings
from domainstudio.config.tradeoff import TradeoffSettings
from domainstudio.errors import ConfigError, DataError
from domainstudio.sampling import draw
from domainstudio.sampling import folder as samples_folder
from stages import tradeoff
from tests.models import image_set, tiny_denoiser, tiny_images
from tests.project import changed_params, params

VALUES = {"number": 12, "steps": 4, "switch_above": [0.9, 0.5], "guide": [1.5], "interpolate": [0.5]}
NAMES = ("first", "second")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two adapted models, in which nothing is measured yet."""
    values = params()
    values["sources"] = {"noto": {"subjects": "subjects.txt"}}
    values["source_images"] = {"noto": {"images": "demo/none.yaml"}}
    values["targets"] = {"ink": {"shots": "images", "number": 4, "domain": "images"}}
    item = {"source": "noto", "target": "ink", "method": "finetune"}
    values["adaptations"], values["registry"]["models"] = dict.fromkeys(NAMES, item), {}
    values["sweeps"], values["tradeoff"] = {}, VALUES
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "subjects.txt").write_text("a house\n")
    tiny_denoiser().save(tmp_path / "models/sources/noto")
    for seed, name in enumerate(NAMES, 1):
        tiny_denoiser(seed).save(tmp_path / "models/adapted" / name)
    image_set(tiny_images(4)).save(tmp_path / "data/targets/ink/shots")
    image_set(tiny_images(16)).save(tmp_path / "data/targets/ink/domain")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_stage(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["tradeoff", name])
    tradeoff.main()
    return json.loads((Path("tradeoff") / name / "tradeoff.json").read_text())


def test_every_combination_is_measured_beside_the_model_alone(project, monkeypatch, capsys):
    """A further value draws its own samples alone, and the report shows all."""
    for name in NAMES:
        found = run_stage(monkeypatch, name)
    points, folder = found["points"], project / "tradeoff/second"
    combinations = [point.get("combine") for point in points]
    assert combinations == [
        None,
        {"mode": "switch", "at": 0.9, "source": "above"},
        {"mode": "switch", "at": 0.5, "source": "above"},
        {"mode": "guide", "weight": 1.5},
        {"mode": "interpolate", "weight": 0.5},
    ]
    assert "second, source model above noise level 0.5: kid" in capsys.readouterr().out
    assert len({point["scores"]["kid"] for point in points}) == 5
    assert all(point["scores"]["number"] == 12 for point in points)
    assert len({(folder / point["images"]).read_bytes() for point in points}) == 5
    assert set(found["references"]) >= {"source", "domain"}

    drawn = []

    def counted(*given):
        drawn.append(given)
        return draw(*given)

    monkeypatch.setattr(samples_folder, "draw", counted)
    assert run_stage(monkeypatch, "second") == found
    assert not drawn
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["tradeoff"]["guide"] = [1.5, 2.0]
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    again = run_stage(monkeypatch, "second")["points"]
    assert sum(len(seeds) for _, seeds, *_ in drawn) == 12
    assert again.pop(4)["combine"] == {"mode": "guide", "weight": 2.0}
    assert [point["scores"] for point in again] == [point["scores"] for point in points]

    settings = config.load()
    metrics = {key: found[key] for key in tradeoff.SHARED} | {"samples": points[0]["scores"]}
    for name in NAMES:
        path = project / "evaluation" / name / "metrics.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(metrics))
    page = report.render(project, settings)
    for words in (
        "The source model draws first",
        "Guided away",
        "Weights between both",
        "and without the source",
    ):
        assert words in page
    assert "The source model draws last" not in page
    assert page.count("<b>source model above noise level 0.5</b>") == len(NAMES)

    (folder / "tradeoff.json").write_text('{"points": [{"combine": {"mode": "mix"}}]}')
    with pytest.raises(DataError, match=r"tradeoff\.json cannot be understood.*mix"):
        report.render(project, settings)


def test_without_values_nothing_is_drawn(project, monkeypatch):
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["tradeoff"] = {}
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    assert run_stage(monkeypatch, "first") == {"format": 1, "points": []}
    assert not (project / ".checkpoints").exists()
    assert "without the source" not in report.render(project, config.load())


def test_steps_and_number_are_its_own():
    usual = SampleSettings(number=1000, steps=30, seed=5)
    assert TradeoffSettings(number=50).sampling(usual) == usual.model_copy(update={"number": 50})
    assert TradeoffSettings(steps=10).sampling(usual).steps == 10
    assert TradeoffSettings(switch_below=(0.2,)).combinations == (
        SwitchSettings(mode="switch", at=0.2, source="below"),
    )


@pytest.mark.parametrize(("key", "value"), [("switch_above", 1.5), ("guide", -1), ("interpolate", 2)])
def test_values_out_of_range_are_refused(tmp_path, key, value):
    path = changed_params(tmp_path, lambda v: v["tradeoff"].update({key: [value]}))
    with pytest.raises(ConfigError, match=rf"tradeoff\.{key}\.0"):
        config.load(path)
