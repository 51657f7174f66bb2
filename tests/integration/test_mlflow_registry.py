"""The stage `register`, the registered model, and what people get out of it."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from domainstudio.registry import versions
from domainstudio.registry.presence import has_version
from domainstudio.registry.tags import find_version
from domainstudio.tracking.server import TrackingUnavailableError, connect
from tests.integration.conftest import free_port
from tests.integration.mlflow_parts import (
    KEY,
    METRICS,
    MODEL,
    NAME,
    aliases_of,
    decode,
    history,
    make_project,
    rows,
    run_stage,
    served,
    use_local_store,
    version_tags,
    versions_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def database(tmp_path, monkeypatch):
    make_project(tmp_path)
    return use_local_store(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """The database of a project whose model is registered, for tests that only read it."""
    root = make_project(tmp_path_factory.mktemp("registered"))
    with pytest.MonkeyPatch.context() as patch:
        database = use_local_store(root, patch)
        run_stage(patch, NAME)
        yield database


def draw(pipeline: Any, seeds: list[int], steps: int) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline(batch_size=len(seeds), generator=generators, num_inference_steps=steps).images
    return [np.asarray(image) for image in images]


def test_the_same_result_twice_is_one_version_and_one_run(database, monkeypatch, capfd):
    run_stage(monkeypatch, NAME)
    tables = ("metrics", "inputs", "tags", "registered_model_tags", "model_version_tags", "logged_models")
    first = {name: rows(database, f"select count(*) from {name}") for name in tables}
    gate = next(Path("mlartifacts").glob("*/artifacts/gate.json")).read_bytes()
    entry = Path("registry", f"{NAME}.json").read_bytes()
    run_stage(monkeypatch, NAME)

    assert versions_of(database) == [1]
    assert aliases_of(database) == {"champion": 1}
    assert {name: rows(database, f"select count(*) from {name}") for name in first} == first
    assert Path("registry", f"{NAME}.json").read_bytes() == entry
    assert next(Path("mlartifacts").glob("*/artifacts/gate.json")).read_bytes() == gate
    assert json.loads(entry)["key"] == KEY
    out, err = capfd.readouterr()
    reason = (
        "there is no champion to compare with: Fréchet distance ∞ 12.5; intra distance in the domain 0.5; "
        "memorised 0% (allowed 5%)"
    )
    assert out.splitlines() == [
        f"{MODEL}: version 1 registered",
        f"{MODEL}@champion is version 1: {reason}",
        f"{MODEL}: version 1 is this result already",
        f"{MODEL}@champion is version 1: {reason}",
    ]
    assert err == ""


def test_a_registration_that_was_killed_halfway_leaves_nothing_behind(database, monkeypatch):
    from mlflow.tracking import MlflowClient

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(MlflowClient, "create_model_version", Mock(side_effect=SystemExit))
        run_stage(monkeypatch, NAME)
    assert versions_of(database) == []
    run_stage(monkeypatch, NAME)
    assert versions_of(database) == [1]
    assert aliases_of(database) == {"champion": 1}
    assert rows(database, "select count(*) from logged_models") == [(1,)]


def test_the_run_is_replayed_from_the_files(registered):
    assert rows(registered, "select name, status, start_time, end_time from runs") == [
        (NAME, "FINISHED", 1_700_000_000_001, 1_700_000_000_040)
    ]
    replayed = rows(
        registered, "select step, timestamp, value from metrics where key = 'total' order by step"
    )
    assert replayed == [(r["step"], r["timestamp"], r["total"]) for r in history(1, 40)]
    measured = dict(rows(registered, "select key, value from latest_metrics where key like '%.%'"))
    assert measured == {
        "samples.frechet_distance_infinity": 12.5,
        "samples.kid": 0.25,
        "samples.intra_distance_in_domain": 0.5,
        "samples.memorized_share": 0.0,
        "references.shots.frechet_distance_infinity": 20.0,
    }
    inputs = rows(registered, "select name, digest, dataset_source from datasets order by name")
    assert inputs == [
        ("ink-domain", f"{1:032x}.dir", '{"uri": "data/targets/ink/domain"}'),
        ("ink-shots", f"{1:032x}.dir", '{"uri": "data/targets/ink/shots"}'),
        ("noto-images", f"{2:032x}.dir", '{"uri": "data/sources/noto"}'),
        ("noto-model", f"{0:032x}.dir", '{"uri": "models/sources/noto"}'),
        ("noto-training", f"{4:032x}", '{"uri": "demo/noto.yaml"}'),
    ]
    (artifacts,) = Path("mlartifacts").glob("*/artifacts/samples")
    found = {p.relative_to(artifacts.parent).as_posix() for p in artifacts.parent.rglob("*") if p.is_file()}
    assert {
        "samples/grid.png",
        "previews/step-000040.png",
        "evaluation/metrics.json",
        "data/shots/contact_sheet.png",
        "pipeline/dvc.lock",
        "pipeline/params.yaml",
        "model_card.md",
        "gate.json",
    } <= found
    lineage = json.loads((artifacts.parent / "lineage.json").read_text())
    assert list(lineage["dvc"]) == [f"evaluate@{NAME}", f"finetune@{NAME}", "prepare_target@ink", "pretrain"]
    assert lineage["dvc"][f"finetune@{NAME}"]["deps"] == {
        "models/sources/noto": f"{0:032x}.dir",
        "data/targets/ink": f"{1:032x}.dir",
    }
    assert lineage["dvc"][f"evaluate@{NAME}"]["params"] == {"params.yaml": {"evaluate": {}}}
    assert lineage["adaptation"]["name"] == NAME
    assert lineage["metrics"] == METRICS["samples"]
    assert lineage["conditions"]["target domain"] == "d" * 12


def test_both_ways_of_loading_draw_the_same_images(registered, tmp_path):
    import mlflow
    from diffusers import DiffusionPipeline

    with connect():
        model = mlflow.pyfunc.load_model(f"models:/{MODEL}@champion")
        folder = mlflow.artifacts.download_artifacts(f"models:/{MODEL}@champion", dst_path=tmp_path / "down")
    pipeline = DiffusionPipeline.from_pretrained(f"{folder}/artifacts/{NAME}")
    pipeline.set_progress_bar_config(disable=True)

    four = model.predict([{}], params={"number": 4, "seed": 7, "steps": 3})
    assert list(four["seed"]) == [7, 8, 9, 10]
    for png, expected in zip(four["png"], draw(pipeline, [7, 8, 9, 10], 3), strict=True):
        np.testing.assert_array_equal(decode(png), expected)
    default = model.predict([{}])
    assert list(default["seed"]) == [1000], "without parameters: the first image of `samples/`"
    np.testing.assert_array_equal(decode(default["png"][0]), draw(pipeline, [1000], 4)[0])
    rows_of_seeds = model.predict([{"seed": 9}, {"seed": 3}], params={"steps": 3})
    assert list(rows_of_seeds["seed"]) == [9, 3]
    np.testing.assert_array_equal(decode(rows_of_seeds["png"][0]), draw(pipeline, [9], 3)[0])
    many = model.predict([{}], params={"number": 18, "seed": 0, "steps": 1})
    assert list(many["seed"]) == list(range(18))
    assert not list(Path(folder).rglob("*.pkl"))


def test_other_samplers_and_refused_parameters(registered, monkeypatch):
    import mlflow

    (path,) = Path("mlartifacts").glob("models/*/artifacts")
    # Serving must work where DomainStudio is not installed.
    for name in [name for name in sys.modules if name.partition(".")[0] == "domainstudio"]:
        monkeypatch.setitem(sys.modules, name, None)
    model = mlflow.pyfunc.load_model(str(path))
    pictures = {}
    for scheduler in ("saved", "ddim", "ddpm", "dpm-solver++"):
        drawn = model.predict([{}], params={"number": 2, "seed": 1, "steps": 4, "scheduler": scheduler})
        pictures[scheduler] = list(drawn["png"])
    assert pictures["saved"] == pictures["ddim"]
    assert len({tuple(p) for p in pictures.values()}) == 3
    for name, value in ("number", 0), ("number", 10**6), ("steps", 0), ("scheduler", "euler"):
        with pytest.raises(ValueError, match=name):
            model.predict([{}], params={name: value})


def test_what_people_read(registered):
    ((card,),) = rows(registered, "select description from model_versions")
    ((run_id,),) = rows(registered, "select run_uuid from runs")
    network = "(efficientnet-lite0)"
    assert card.startswith(f"{NAME}: frechet distance infinity 12.5 {network}, kid 0.25 {network}, ")
    assert "library_name" not in card
    assert f"get-artifact?path=samples/grid.png&run_uuid={run_id}" in card
    assert "| frechet distance infinity | 12.5 | 20 |" in card
    assert "| licence | Apache-2.0 |" in card
    assert f"models:/{MODEL}@champion" in card
    tags = version_tags(registered, 1)
    assert tags["frechet_distance_infinity"] == "12.5 (efficientnet-lite0)"
    assert "**Gate**: promoted: there is no champion to compare with: Fréchet distance ∞ 12.5;" in card
    assert (tags["source"], tags["target"], tags["method"]) == ("noto", "ink", "domainstudio")
    assert (tags["input.source"], tags["input.shots"], tags["input.domain"]) == ("a" * 64, "b" * 64, "d" * 64)
    assert (tags["licence"], tags["attribution"]) == ("CC-BY-4.0", "somebody")
    assert (tags["features"], tags["features.digest"]) == ("efficientnet-lite0", "f" * 64)
    assert tags["sampling"] == (
        "number of samples 8, seeds 1000-1000, scheduler ddim, denoising steps 4, guidance 1"
    )


@pytest.mark.timeout(600)
def test_mlflow_serves_the_model_over_http(registered, tmp_path):
    from diffusers import DiffusionPipeline

    with served(f"models:/{MODEL}@champion", registered, tmp_path / "serve.txt") as ask:
        status, predictions = ask({}, {"number": 2, "seed": 5, "steps": 3})
        assert status == 200
        for params, sentence in (
            ({"number": 0}, "number must be between 1 and 1000, got 0"),
            ({"steps": -1}, "steps must be between 1 and 1000, got -1"),
        ):
            status, said = ask({}, params)
            assert status == 400 and sentence in said and "Traceback" not in said

    pipeline = DiffusionPipeline.from_pretrained(f"models/adapted/{NAME}")
    pipeline.set_progress_bar_config(disable=True)
    assert [p["seed"] for p in predictions] == [5, 6]
    for prediction, expected in zip(predictions, draw(pipeline, [5, 6], 3), strict=True):
        np.testing.assert_array_equal(decode(prediction["png"]), expected)


def test_whether_a_server_has_a_version_is_asked_of_its_tables(registered, tmp_path, monkeypatch):
    entry = json.loads(Path("registry", f"{NAME}.json").read_text())
    asked = entry["model"], entry["key"], entry["digest"]
    assert has_version(*asked)
    assert not has_version(entry["model"], entry["key"], "another")
    with connect() as client:
        assert find_version(client, *asked) is not None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new.db")
    assert not has_version(*asked)


def test_a_copied_projects_artifacts_stay_in_the_copy(database, monkeypatch, tmp_path_factory):
    run_stage(monkeypatch, NAME)
    original, copy = Path.cwd(), tmp_path_factory.mktemp("copies") / "copy"
    shutil.copytree(original, copy)
    monkeypatch.chdir(copy)
    run_stage(monkeypatch, NAME)
    with closing(sqlite3.connect(copy / "mlflow.db")) as connection:
        text = "\n".join(connection.iterdump())
    assert str(original / "mlartifacts") not in text
    assert str(copy / "mlartifacts") in text
    with connect() as client:
        assert client.get_model_version(MODEL, "1").source


def test_a_server_that_is_down_is_one_clear_error(database, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingUnavailableError, match="MLFLOW_TRACKING_URI") as caught:
        run_stage(monkeypatch, NAME)
    assert "secret" not in str(caught.value)
    assert not Path("registry").exists()


def test_long_cards_fit_the_description():
    card = versions.shorten("x" * 6000)
    assert len(card) == 5000
    assert card.endswith("`model_card.md` of the run.\n")
    assert versions.shorten("short") == "short"
