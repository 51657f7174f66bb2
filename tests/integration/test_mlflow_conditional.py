"""Registered models with a condition or trained as adapters: what they draw, refuse and hold."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from domainstudio import config, models
from domainstudio.config import LoraSettings
from domainstudio.data.image_set import ImageRecord, ImageSet
from domainstudio.errors import CheckpointError
from domainstudio.models import lora
from domainstudio.models.class_conditional import ClassConditionalDenoiser
from domainstudio.models.stored import StoredModel
from domainstudio.registry import reevaluation, versions
from domainstudio.registry.results import Result
from domainstudio.sampling import draw, sample
from domainstudio.tracking.provenance import Provenance
from domainstudio.tracking.server import connect
from domainstudio.training.cards import adapted_card
from tests.integration.mlflow_parts import (
    KEY,
    METRICS,
    decode,
    rows,
    run_stage,
    use_local_store,
    write_result,
)
from tests.models import (
    CLASSES,
    PROMPTS,
    tiny_class_denoiser,
    tiny_denoiser,
    tiny_text_denoiser,
    tiny_text_pipeline,
)
from tests.project import params

CONDITIONS = {
    "ink-text": "a red house in [V] style",
    "ink-class": "face",
    "ink-lora": "a blue cup in [V] style",
}
GUIDANCE = 2.5
MEASURED = {
    **METRICS,
    "paired": {"samples": {"number": 8, "top_1": 0.75}, "references": {"source": {"top_1": 0.5}}},
    "clip": {"model": "tiny-clip", "digest": "0", "samples": {"clip_score": 0.3125}, "references": {}},
}
"""`metrics.json` of models whose samples have subjects, with CLIP."""


@dataclass(frozen=True)
class Project:
    """A project with its own store, in which every adaptation of `CONDITIONS` is registered."""

    root: Path
    database: Path

    def version(self, name: str) -> str:
        return f"models:/domainstudio-{name}@champion"

    @cache  # noqa: B019 - the project lives as long as the module's tests
    def load(self, name: str) -> Any:
        import mlflow

        with connect():
            return mlflow.pyfunc.load_model(self.version(name))

    def artifacts(self, name: str) -> Path:
        """Return where the store keeps a version's files."""
        return Path(self._column(name, "storage_location").removeprefix("file://")) / "artifacts"

    def description(self, name: str) -> str:
        return self._column(name, "description")

    def _column(self, name: str, column: str) -> str:
        query = f"select {column} from model_versions where name = 'domainstudio-{name}'"
        return str(rows(self.database, query)[0][0])


@pytest.fixture(scope="module")
def project(one_thread, tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        database = use_local_store(root, patch)
        write_project(root)
        for name in [*CONDITIONS, "ink-lora", "ink-text"]:
            run_stage(patch, name)
        yield Project(root, database)


def write_project(root: Path) -> None:
    values = params()
    values["methods"]["adapters"] = {"simple": 1.0, "prior": 1.0, "lora": {"rank": 2}}
    for name in CONDITIONS:
        method = "adapters" if name == "ink-lora" else "finetune"
        prompts = {"source": "{label}", "target": "{label}"} if name == "ink-class" else {}
        item = {"source": "noto", "target": "ink", "method": method, "prompts": prompts}
        values["adaptations"][name] = item
        values["registry"]["models"][name] = f"domainstudio-{name}"
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    tiny_text_denoiser().save(root / "models/sources/noto")
    adapted("models/sources/noto").save(root / "models/adapted/ink-lora")
    tiny_text_denoiser(seed=1).save(root / "models/adapted/ink-text")
    tiny_class_denoiser().save(root / "models/adapted/ink-class")
    for name, condition in CONDITIONS.items():
        write_result(root, name, metrics=MEASURED, condition=condition, guidance_scale=GUIDANCE)


def adapted(base: str | Path) -> Any:
    """Return the model in a folder with random adapters."""
    denoiser = models.load(base)
    lora.attach(denoiser, LoraSettings(rank=2, alpha=6), seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return denoiser


def pictures(predicted: pd.DataFrame) -> np.ndarray:
    return np.stack([decode(png) for png in predicted["png"]])


def plain(pipeline: Any, prompt: str, seeds: list[int], **options: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline(prompt=[prompt] * len(seeds), generator=generators, **options).images
    return np.stack([np.asarray(image).astype(int) for image in images])


def pipeline_of(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def served(folder: Path) -> Any:
    """Return a function that predicts as a registered version of a pipeline folder does."""
    with connect():
        from mlflow.pyfunc.model import PythonModelContext

        from domainstudio.registry import serving
    model = serving.ImageModel()
    model.load_context(PythonModelContext({"pipeline": str(folder)}, None))
    return lambda request, **params: pictures(model.predict(None, pd.DataFrame([request]), params))


def test_a_model_of_text_draws_what_plain_diffusers_draws(project):
    model = project.load("ink-text")
    requests = [{"prompt": PROMPTS[0], "seed": 7}, {"prompt": PROMPTS[1], "negative_prompt": PROMPTS[2]}]
    drawn = model.predict(requests[:1], params={"number": 2, "steps": 3, "guidance_scale": 4.0})
    other = model.predict(requests[1:], params={"steps": 3})

    pipeline = pipeline_of(project.root / "models/adapted/ink-text")
    expected = plain(pipeline, PROMPTS[0], [7, 8], guidance_scale=4.0, num_inference_steps=3)
    assert list(drawn["seed"]) == [7, 8]
    np.testing.assert_array_equal(pictures(drawn), expected)
    options = {"guidance_scale": GUIDANCE, "num_inference_steps": 3}
    negative = plain(pipeline, PROMPTS[1], [1000], negative_prompt=[PROMPTS[2]], **options)
    np.testing.assert_array_equal(pictures(other), negative)
    assert not np.array_equal(negative, plain(pipeline, PROMPTS[1], [1000], **options))


def test_each_row_of_a_table_has_its_own_prompts(project):
    model = project.load("ink-text")
    table = pd.DataFrame({"prompt": PROMPTS[:2], "negative_prompt": [None, PROMPTS[2]]})
    both = pictures(model.predict(table, params={"steps": 2}))
    for index, request in enumerate(table.to_dict("records")):
        alone = {name: value for name, value in request.items() if isinstance(value, str)}
        np.testing.assert_array_equal(both[[index]], pictures(model.predict([alone], params={"steps": 2})))


@pytest.mark.parametrize("request_", [{}, {"seed": 3}, {"prompt": None}, {"prompt": ""}])
def test_a_missing_prompt_is_asked_for_with_an_example(project, request_):
    wanted = (
        r"give a column `prompt`, such as 'a red house in \[V\] style'\. "
        r"It was trained on prompts '\{caption\} in \[V\] style'$"
    )
    with pytest.raises(ValueError, match=wanted):
        project.load("ink-text").predict(pd.DataFrame([request_]))


def test_signatures_name_the_columns_and_the_sampled_guidance(project):
    expected = {
        "ink-text": ["prompt", "negative_prompt", "seed"],
        "ink-lora": ["prompt", "negative_prompt", "seed"],
        "ink-class": ["label", "seed"],
    }
    defaults = {"number": 1, "seed": 1000, "steps": 4, "scheduler": "saved", "guidance_scale": GUIDANCE}
    for name, columns in expected.items():
        metadata = project.load(name).metadata
        assert metadata.get_input_schema().input_names() == columns
        assert {param.name: param.default for param in metadata.get_params_schema()} == defaults


def test_the_class_of_a_row_is_drawn(project):
    model, denoiser = project.load("ink-class"), tiny_class_denoiser()
    drawn = model.predict([{"label": "person"}], params={"number": 2, "seed": 3, "steps": 4})
    one = model.predict([{"label": "person"}], params={"seed": 3, "steps": 4, "guidance_scale": 1})
    other = model.predict([{"label": "face"}], params={"seed": 3, "steps": 4, "guidance_scale": 1})

    expected = sample(denoiser, [3, 4], ["person"] * 2, guidance_scale=GUIDANCE, steps=4)
    np.testing.assert_allclose(pictures(drawn), expected.transpose(0, 2, 3, 1), atol=1)
    unguided = sample(denoiser, [3], ["person"], steps=4).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(pictures(one), unguided, atol=1)
    assert np.abs(pictures(one) - pictures(drawn)[:1]).max() > 10
    assert np.abs(pictures(one) - pictures(other)).max() > 10


def test_classes_are_asked_for_by_name(project):
    model = project.load("ink-class")
    with pytest.raises(ValueError, match="no class 'dog'; there are animal, face, person"):
        model.predict([{"label": "dog"}])
    with pytest.raises(ValueError, match="give a column `label`, one of animal, face, person"):
        model.predict([{}])
    with pytest.raises(ValueError, match="guidance_scale must be at least 0, got -1"):
        model.predict([{"label": "face"}], params={"guidance_scale": -1.0})


@pytest.mark.parametrize(("scheduler", "guidance_scale"), [("ddpm", 1), ("ddim", 3), ("dpm-solver++", 3)])
@pytest.mark.parametrize("learned_variance", [False, True])
def test_every_sampler_draws_classes(tmp_path, scheduler, guidance_scale, learned_variance):
    epsilon: Any = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    denoiser = tiny_class_denoiser(learned_variance=learned_variance, **epsilon)
    denoiser.save(tmp_path)
    options: dict[str, Any] = {"steps": 4, "scheduler": scheduler, "guidance_scale": guidance_scale}
    drawn = served(tmp_path)({"label": "animal"}, number=2, **options)
    expected = sample(denoiser, [0, 1], ["animal"] * 2, **options)
    np.testing.assert_allclose(drawn, expected.transpose(0, 2, 3, 1), atol=1)


def test_without_a_null_class_there_is_no_guidance(tmp_path):
    denoiser = tiny_class_denoiser(CLASSES[:-1])
    ClassConditionalDenoiser(denoiser.network, denoiser.scheduler, classes=CLASSES).save(tmp_path)
    predict = served(tmp_path)
    assert predict({"label": "person"}, steps=1).shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match="guidance_scale must be 1, got 2"):
        predict({"label": "person"}, steps=1, guidance_scale=2.0)
    (tmp_path / "classes.json").unlink()
    assert served(tmp_path)({"label": "2"}, steps=1).shape == (1, 8, 8, 3)


def test_requests_at_once_are_answered_one_after_the_other(tmp_path):
    tiny_text_denoiser("sd3").save(tmp_path)
    predict = served(tmp_path)
    asked = [{"prompt": PROMPTS[0], "seed": seed} for seed in range(4)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda request: predict(request, steps=8), asked))
    for request, drawn in zip(asked, found, strict=True):
        np.testing.assert_allclose(drawn, predict(request, steps=8), atol=1)


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_another_sampler_keeps_the_other_parts(tmp_path, kind):
    import diffusers

    tiny_text_pipeline(kind).save_pretrained(tmp_path)
    predict = served(tmp_path)
    saved = predict({"prompt": PROMPTS[0]}, steps=3, guidance_scale=3.0)
    drawn = predict({"prompt": PROMPTS[0]}, steps=3, guidance_scale=3.0, scheduler="dpm-solver++")
    again = predict({"prompt": PROMPTS[0]}, steps=3, guidance_scale=3.0)
    options = {"guidance_scale": 3.0, "num_inference_steps": 3}
    pipeline = pipeline_of(tmp_path)
    np.testing.assert_array_equal(saved, plain(pipeline, PROMPTS[0], [0], **options))
    np.testing.assert_array_equal(again, saved)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    np.testing.assert_array_equal(drawn, plain(pipeline, PROMPTS[0], [0], **options))
    assert not np.array_equal(drawn, saved)


def test_adapters_are_registered_as_a_whole_pipeline_and_beside_it(project, tmp_path):
    import mlflow

    drawn = pictures(project.load("ink-lora").predict([{"prompt": PROMPTS[3]}], params={"steps": 3}))
    with connect():
        uri = f"{project.version('ink-lora')}/artifacts/lora"
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path)))
    entry = json.loads((project.root / "registry/ink-lora.json").read_text())
    assert models.digest(folder) == entry["digest"]
    assert {path.name for path in folder.iterdir()} == {
        *("adapter.json", "pytorch_lora_weights.safetensors", "kohya.safetensors"),
        *("README.md", "provenance.json"),
    }

    options = {"guidance_scale": GUIDANCE, "num_inference_steps": 3}
    whole = pipeline_of(project.artifacts("ink-lora") / "pipeline")
    np.testing.assert_array_equal(drawn, plain(whole, PROMPTS[3], [1000], **options))
    base = pipeline_of(project.root / "models/sources/noto")
    without = plain(base, PROMPTS[3], [1000], **options)
    base.load_lora_weights(folder)
    np.testing.assert_allclose(drawn, plain(base, PROMPTS[3], [1000], **options), atol=1)
    assert np.abs(drawn - without).max() > 10
    needed = (project.artifacts("ink-lora").parent / "requirements.txt").read_text()
    assert "transformers==" in needed and "peft" not in needed


def test_registering_twice_is_one_version(project):
    found = rows(project.database, "select name, version from model_versions order by name")
    assert found == [(f"domainstudio-{name}", 1) for name in sorted(CONDITIONS)]


@pytest.mark.parametrize("name", CONDITIONS)
def test_measuring_again_uses_the_prompts_of_the_version(project, name, monkeypatch):
    drawn: list[Path] = []
    monkeypatch.setattr(reevaluation, "_measure", lambda samples, *_: drawn.append(samples))
    monkeypatch.chdir(project.root)
    settings = config.load()
    subject = "face" if name == "ink-class" else "a red house"
    images = [{"seed": 7, "subject": subject}]
    result = replace(Result.load(name), samples={"images": images})
    sampling = settings.sample.model_copy(
        update={"number": 1, "seed": 7, "steps": 3, "mixed_precision": "no"}
    )
    reevaluation.reevaluate(f"domainstudio-{name}", "1", result, sampling, settings.evaluate)
    (folder,) = drawn
    (entry,) = json.loads((folder / "manifest.json").read_text())["images"]
    prompt = "face" if name == "ink-class" else "a red house in [V] style"
    assert (entry["seed"], entry["prompt"], entry["subject"]) == (7, prompt, subject)
    denoiser = models.load(project.root / "models/adapted" / name)
    (own,) = draw(denoiser, [7], [prompt], sampling)
    picture = np.asarray(Image.open(folder / entry["file"])).transpose(2, 0, 1).astype(int)
    assert np.abs(picture - own).max() <= 2  # adapters are fused there


def test_runs_and_versions_say_what_kind_of_model_it_is(project):
    expected = {
        "ink-text": ("text-to-image", "false"),
        "ink-class": ("class-conditional", "false"),
        "ink-lora": ("text-to-image", "true"),
    }
    for name, (kind, adapters) in expected.items():
        version = f"from model_version_tags where name = 'domainstudio-{name}'"
        run = f"from tags join runs on tags.run_uuid = runs.run_uuid where runs.name = '{name}'"
        for table in (version, run):
            tags = dict(rows(project.database, f"select key, value {table}"))
            assert (tags["kind"], tags["lora"], tags["source"]) == (kind, adapters, "noto")


def test_paired_and_clip_figures_are_logged(project):
    query = (
        "select key, value from latest_metrics m join runs r on m.run_uuid = r.run_uuid "
        "where r.name = 'ink-text' and (key like 'paired.%' or key like 'clip.%')"
    )
    assert dict(rows(project.database, query)) == {
        "paired.samples.number": 8,
        "paired.samples.top_1": 0.75,
        "paired.references.source.top_1": 0.5,
        "clip.samples.clip_score": 0.3125,
    }
    card = project.description("ink-text")
    assert "| | this model | shots | source |" in card
    assert "| top 1 | 0.75 | – | 0.5 |" in card
    assert "CLIP's with `tiny-clip`" in card


def test_cards_say_how_each_kind_is_asked(project):
    text, classes, adapters = (project.description(name) for name in CONDITIONS)
    assert 'model.predict([{"prompt": "a red house in [V] style"}], params={"number": 4' in text
    assert f'pipeline("a red house in [V] style", guidance_scale={GUIDANCE}' in text
    assert "artifacts/ink-text" in text
    assert 'model.predict([{"label": "face"}]' in classes
    assert "class_labels" in classes
    assert "artifacts/pipeline" in adapters
    assert "base.load_lora_weights(folder)" in adapters
    assert "lora" not in text.lower() and "lora" not in classes.lower()


def test_the_code_on_a_card_runs(project, monkeypatch):
    source = str(project.root / "models/sources/noto")
    for name in CONDITIONS:
        code = project.description(name).split("```python")
        namespace: dict[str, Any] = {}
        for block in code[1:]:
            block = block.partition("```")[0].replace("30", "2").replace("path/to/the/source/model", source)
            with connect():
                exec(block, namespace)
        assert len(namespace["images"]) == 4
        assert ("base" in namespace) == (name == "ink-lora")


def test_adapters_of_a_source_that_is_gone_are_not_registered(project, tmp_path):
    folder = tmp_path / "alone"
    tiny_denoiser().save(tmp_path / "base")
    adapted(tmp_path / "base").save(folder)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    run_id = rows(project.database, "select run_uuid from runs")[0][0]
    entry = versions.Entry("orphan", folder, "0" * 64, run_id, "", {})
    with pytest.raises(CheckpointError, match="source model is not there"):
        models.kind_of(folder)
    with pytest.raises(CheckpointError, match="source model is not there"):
        versions.register(entry)
    assert rows(project.database, "select name from registered_models where name = 'orphan'") == []
    (folder / "adapter.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither model_index\.json nor adapter\.json"):
        versions.register(entry)


def test_merged_adapters_of_a_class_model_keep_its_classes(tmp_path):
    tiny_class_denoiser().save(tmp_path / "base")
    denoiser = adapted(tmp_path / "base")
    denoiser.save(tmp_path / "adapted")
    assert models.kind_of(tmp_path / "adapted") == "class-conditional"
    with versions.stored_folders(StoredModel(tmp_path / "adapted")) as folders:
        drawn = served(folders["pipeline"])({"label": "face"}, steps=3, guidance_scale=2.0)
    expected = sample(denoiser, [0], ["face"], steps=3, guidance_scale=2.0)
    np.testing.assert_allclose(drawn, expected.transpose(0, 2, 3, 1), atol=1)
    assert not folders["pipeline"].exists()


# --- the model's own card, README.md ---


def record_of(project: Project, name: str, **changes: Any) -> Provenance:
    params = config.load(project.root / "params.yaml").adaptation(name).model_dump(mode="json")
    inputs = {"source": "a", "shots": "b"}
    return Provenance(adaptation=name, key=KEY, params={**params, **changes}, inputs=inputs, steps=6)


def shots(caption: str = PROMPTS[0], label: str | None = "face") -> ImageSet:
    pixels = np.zeros((1, 3, 8, 8), np.uint8)
    return ImageSet(pixels, (ImageRecord("a.png", "0", 8, 8, "a.png", caption, label),), "somewhere")


def run_card(card: str, folder: Path, source: Path | None = None) -> Any:
    """Run the code of a card, with real paths and few steps; return its images."""
    code = card.partition("```python\n")[2].partition("```")[0]
    code = (
        code.replace("30", "2")
        .replace("path/to/this/folder", str(folder))
        .replace("path/to/the/source/model", str(source))
    )
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return namespace["images"]


def test_the_code_of_a_readme_runs(project, tmp_path):
    tiny_denoiser().save(tmp_path / "plain")
    tiny_class_denoiser().save(tmp_path / "class")
    for kind in ("plain", "class"):
        adapted(tmp_path / kind).save(tmp_path / f"{kind}-lora")
    cards = {
        project.root / "models/adapted/ink-text": "ink-text",
        project.root / "models/adapted/ink-lora": "ink-lora",
        project.root / "models/adapted/ink-class": "ink-class",
        tmp_path / "plain": "ink-finetune",
        tmp_path / "plain-lora": "ink-lora",
        tmp_path / "class-lora": "ink-lora",
    }
    for folder, name in cards.items():
        prompts = {"source": "{label}", "target": "{label}", "new_tokens": {}, "by_label": {}}
        changes = {"prompts": prompts} if "class" in folder.name else {}
        card = adapted_card(record_of(project, name, **changes), shots(), models.kind_of(folder))
        assert len(run_card(card, folder, project.root / "models/sources/noto")) == 4, folder


def test_a_readme_shows_the_prompts_of_conditional_models(project):
    record = record_of(project, "ink-lora")
    record.params["prompts"]["by_label"] = {"cat": {"source": "a cat", "target": "a [S] cat | sat"}}
    record.params["prompts"]["new_tokens"] = {"[V]": "style"}
    card = adapted_card(record, shots(), "text-to-image")
    assert "tags: [domainstudio, few-shot, domain-adaptation, text-to-image, lora]" in card
    assert (
        "| prompt of a training image | `{caption} in [V] style`; for the source model `{caption}` |" in card
    )
    assert "| prompt of an image of `cat` | `a [S] cat \\| sat`; for the source model `a cat` |" in card
    assert "| trigger | `in [V] style` |" in card
    assert "| new words | `[V]`, begun as style |" in card
    assert "| prior preservation | weight 1, 200 images drawn from the source model |" in card
    assert "| adapters (LoRA) | rank 2, alpha 2, of the layers `to_q`, `to_k`, `to_v`, `to_out.0` |" in card
    assert f'prompt="{PROMPTS[0]} in [V] style"' in card


def test_the_readme_of_an_unconditional_model_says_nothing_of_prompts(project):
    card = adapted_card(record_of(project, "ink-finetune"), shots())
    assert "tags: [domainstudio, few-shot, domain-adaptation]\n" in card
    assert "|---|---|\n| loss weights | simple 1, vlb 0.001 |\n" in card
    for word in ("prompt", "trigger", "prior", "LoRA", "temperature"):
        assert word not in card
