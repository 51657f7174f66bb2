"""Versions whose source model takes part in drawing: what they hold, draw, and are loaded as."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from domainstudio import models
from domainstudio.config import GuideSettings, PromptSettings, SwitchSettings, combination_of
from domainstudio.errors import CheckpointError
from domainstudio.models.stored import StoredModel, Together
from domainstudio.models.wording import Wording
from domainstudio.registry.importing import import_model
from domainstudio.registry.loading import load
from domainstudio.sampling import sample
from domainstudio.tracking.server import connect
from stages import export
from tests.any_size import FAMILIES
from tests.integration.mlflow_parts import ROOT, rows, run_stage, use_local_store, version_tags, write_result
from tests.integration.test_mlflow_conditional import adapted, pictures, served
from tests.models import (
    PROMPTS,
    tiny_class_denoiser,
    tiny_denoiser,
    tiny_latent_denoiser,
    tiny_text_denoiser,
)

NAME = "ink-finetune"
MODEL = f"domainstudio-{NAME}"
COMBINATIONS: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "switch": {"mode": "switch", "at": 0.5, "source": "above"},
    "interpolate": {"mode": "interpolate", "weight": 0.6},
}
EPSILON: dict[str, Any] = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
CASES: dict[str, tuple[Any, dict[str, str]]] = {
    "unconditional": (tiny_denoiser, {}),
    "latent": (tiny_latent_denoiser, {}),
    "class": (
        lambda seed: tiny_class_denoiser(seed=seed, learned_variance=True, **EPSILON),
        {"label": "face"},
    ),
    "sd2": (
        lambda seed: tiny_text_denoiser("sd2", seed),
        {"prompt": PROMPTS[0], "negative_prompt": "the moon"},
    ),
    "sdxl": (lambda seed: tiny_text_denoiser("sdxl", seed), {"prompt": PROMPTS[0]}),
    "pixart": (lambda seed: tiny_text_denoiser("pixart", seed), {"prompt": PROMPTS[0]}),
    **{
        family: (
            lambda seed, family=family: tiny_text_denoiser(family, seed),
            {"prompt": PROMPTS[0], **({} if family == "flux-1" else {"negative_prompt": "the moon house"})},
        )
        for family in ("sd3", *FAMILIES)
    },
}
WORDING = Wording.of(PromptSettings(source="{caption}", target="{caption} house"))
"""What fits no template, such as the name of a class, both models are told."""


@pytest.fixture(scope="module")
def project(one_thread, tmp_path_factory):
    """A project in which one adaptation is registered in three ways of drawing, one after the other."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        database = use_local_store(root, patch)
        tiny_denoiser().save(root / "models/sources/noto")
        tiny_denoiser(seed=1).save(root / "models/adapted" / NAME)
        for combination in COMBINATIONS.values():
            write_params(root, combination)
            write_result(root, NAME)
            if combination is not None:
                path = root / "samples/adapted" / NAME / "manifest.json"
                path.write_text(json.dumps({**json.loads(path.read_text()), "combine": combination}))
            run_stage(patch, NAME)
        yield database


def write_params(root: Path, combination: dict[str, Any] | None) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["sources"] = {"noto": {"subjects": "demo/subjects.txt"}}
    values["source_images"] = {"noto": {"images": "demo/none.yaml"}}
    values["targets"] = {"ink": {"shots": "images", "number": 10, "domain": "images"}}
    values["sweeps"] = {}
    item = {"source": "noto", "target": "ink", "method": "finetune", "combine": combination}
    values["adaptations"] = {NAME: item}
    values["registry"]["models"] = {NAME: f"domainstudio-{NAME}"}
    (root / "params.yaml").write_text(yaml.safe_dump(values))


def expected(denoiser: Any, **options: Any) -> np.ndarray:
    return sample(denoiser, [7, 8], steps=4, **options).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("mode", ["guide", "switch"])
def test_a_served_combination_draws_what_is_drawn_here(tmp_path, kind, mode):
    make, request = CASES[kind]
    combination = (
        GuideSettings(mode="guide", weight=1.4)
        if mode == "guide"
        else SwitchSettings(mode="switch", at=0.7, source="below")
    )
    make(0).save(tmp_path / "base")
    make(1).save(tmp_path / "adapted")
    stored = StoredModel(tmp_path / "adapted", Together(combination, tmp_path / "base", WORDING))
    stored.store(tmp_path / "both")
    options: dict[str, Any] = {}
    texts = request.get("prompt") or request.get("label")
    if texts:
        options = {"conditions": [texts] * 2, "guidance_scale": 2.5}
        options |= {"negative": request["negative_prompt"]} if "negative_prompt" in request else {}
    scale = {"guidance_scale": 2.5} if texts else {}
    predict = served(tmp_path / "both")
    for scheduler in ("ddim", "ddpm") if kind == "class" else ("ddim",):
        drawn = predict({**request, "seed": 7}, number=2, steps=4, scheduler=scheduler, **scale)
        wanted = expected(stored.load(), scheduler=scheduler, **options)
        np.testing.assert_allclose(drawn, wanted, atol=1)
        alone = expected(models.load(tmp_path / "adapted"), scheduler=scheduler, **options)
        assert np.abs(drawn - alone).max() > 2


def test_adapters_are_stored_with_their_source_model(tmp_path):
    tiny_text_denoiser().save(tmp_path / "base")
    adapted(tmp_path / "base").save(tmp_path / "adapted")
    combination = SwitchSettings(mode="switch", at=0.5)
    stored = StoredModel(tmp_path / "adapted", Together(combination, tmp_path / "base", WORDING))
    stored.store(tmp_path / "both")
    (tmp_path / "base").rename(tmp_path / "gone")
    drawn = served(tmp_path / "both")(
        {"prompt": "a red house"}, steps=4, scheduler="ddim", guidance_scale=2.0
    )
    both = models.load(tmp_path / "both")
    wanted = sample(both, [0], ["a red house"], steps=4, guidance_scale=2.0).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(drawn, wanted, atol=1)
    assert not (tmp_path / "both/adapted/adapter.json").exists()


def test_another_way_of_drawing_is_another_version_of_the_same_run(project):
    tags = [version_tags(project, number) for number in (1, 2, 3)]
    assert [each.get("combine") for each in tags] == [
        None,
        "source model above noise level 0.5",
        "weights interpolated to 0.6",
    ]
    assert len({each["domainstudio.key"] for each in tags}) == 1
    assert len({each["domainstudio.digest"] for each in tags}) == 3
    assert rows(project, "select count(*) from model_versions") == [(3,)]


@pytest.mark.parametrize(("version", "combination"), list(enumerate(COMBINATIONS.values(), 1)))
def test_a_version_is_loaded_and_served_whole(project, version, combination):
    import mlflow

    uri = f"models:/{MODEL}/{version}"
    source, own = models.load("models/sources/noto"), models.load(f"models/adapted/{NAME}")
    folder = StoredModel(Path("models/adapted", NAME))
    if combination is not None:
        folder = StoredModel(
            folder.folder, Together(combination_of(combination), Path("models/sources/noto"), Wording())
        )
    wanted = expected(folder.load())
    np.testing.assert_allclose(expected(load(uri)).astype(int), wanted, atol=1)
    with connect():
        drawn = mlflow.pyfunc.load_model(uri).predict([{}], params={"number": 2, "seed": 7, "steps": 4})
    np.testing.assert_allclose(pictures(drawn), wanted, atol=1)
    for other in (source, own):
        assert (np.abs(pictures(drawn) - expected(other)).max() > 2) == (
            combination is not None or other is source
        )


def test_cards_and_the_history_say_how_a_version_is_drawn(project, capsys, monkeypatch):
    cards = dict(rows(project, "select version, description from model_versions"))
    assert "Drawn with" not in cards[1] and "DiffusionPipeline" in cards[1]
    assert "**Drawn with** source model above noise level 0.5" in cards[2]
    assert f'denoiser = load("models:/{MODEL}' in cards[2] and "DiffusionPipeline" not in cards[2]
    assert "**Drawn with** weights interpolated to 0.6" in cards[3] and "artifacts/pipeline" in cards[3]
    run_stage(monkeypatch, "--history", NAME)
    assert (
        "a result of ink-finetune, source model above noise level 0.5, not judged yet"
        in capsys.readouterr().out
    )
    namespace: dict[str, Any] = {}
    for version in (2, 3):
        block = cards[version].split("```python")[1].partition("```")[0].replace("30", "2")
        with connect():
            exec(block, namespace)
        assert len(namespace["images"]) == 4


def test_two_models_are_not_adapted_as_one(project, tmp_path):
    with pytest.raises(CheckpointError, match=r"two models at work together.*artifacts/pipeline/adapted"):
        import_model(f"models:/{MODEL}/2", tmp_path)
    import_model(f"models:/{MODEL}/3", tmp_path)
    assert models.kind_of(tmp_path) == "unconditional"
    with pytest.raises(CheckpointError, match=r"registry\.loading\.load"):
        models.load(f"models:/{MODEL}/2")


@pytest.mark.parametrize("mode", COMBINATIONS)
def test_models_are_exported_as_they_are_drawn(project, tmp_path, monkeypatch, capsys, mode):
    root, folder = Path(), tmp_path / "exported"
    write_params(root, COMBINATIONS[mode])
    arguments = [NAME, str(folder), *(["--both"] if mode == "switch" else [])]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    export.main()
    assert ("two models" in capsys.readouterr().out) == (mode == "switch")
    drawn, wanted = (
        expected(each).astype(int)
        for each in (models.load(folder), load(f"models:/{MODEL}/{1 + list(COMBINATIONS).index(mode)}"))
    )
    np.testing.assert_allclose(drawn, wanted, atol=1)
    record = json.loads((folder / "provenance.json").read_text())
    assert record.get("combine") == COMBINATIONS[mode]
    with pytest.raises(Exception, match="there already"):
        export.main()
    if mode == "switch":
        monkeypatch.setattr(sys, "argv", ["export", NAME, str(tmp_path / "plain")])
        with pytest.raises(Exception, match=r"takes two models.*--both"):
            export.main()
        assert not (tmp_path / "plain").exists()
