"""The paired measure: is a sample's own drawing the nearest, counted by hand."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import retrieval as benchmark
from domainstudio import config, report
from domainstudio.config import EvaluateSettings
from domainstudio.data import ImageSet
from domainstudio.errors import ConfigError, DataError
from domainstudio.metrics import distances, pairing
from domainstudio.metrics.measure import Known, measure_folders, measure_images
from domainstudio.metrics.networks import register_network
from domainstudio.metrics.pairing import Drawings, SampleTexts, Texts, drawing_names, retrieval
from domainstudio.report.reading import read
from domainstudio.report.tables import metric_tables
from domainstudio.storage.files import write_json
from stages.evaluate import _summary
from tests.models import (
    PROMPTS,
    Averages,
    image_set,
    tiny_denoiser,
    tiny_images,
    tiny_text_denoiser,
    tiny_text_images,
)
from tests.modules import ROOT
from tests.unit.test_metrics_stage import write_samples

PARAMS = ROOT / "params.yaml"
NAMES = [f"thing {index}" for index in range(40)]
UNTOLD = SampleTexts(("",) * 12, ("",) * 12)


@pytest.fixture
def rows():
    """Return features of a drawing of each name."""
    return np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)


def line(*values):
    """Return drawings on a line: distances are then read off."""
    return np.array(values, dtype=np.float32)[:, None]


def ranked(samples, subjects, drawings, names, **options):
    return retrieval(samples, subjects, Drawings(drawings, [{name} for name in names], **options))


def test_copies_of_their_own_drawings_are_all_found(rows):
    found = ranked(rows[::-1], NAMES[::-1], rows, NAMES)
    assert (found.top_1, found.top_5, found.median_rank) == (1, 1, 1)
    assert (found.number, found.without_drawing, found.trained, found.drawings) == (40, 0, 0, 40)
    assert (found.top_1_chance, found.top_5_chance) == (pytest.approx(1 / 40), pytest.approx(5 / 40))


def test_samples_of_other_subjects_are_found_as_often_as_by_chance(rows):
    generator = np.random.default_rng(0)
    order = np.concatenate([generator.permutation(40) for _ in range(50)])
    found = ranked(rows[order], NAMES * 50, rows, NAMES)
    assert found.top_1 == pytest.approx(1 / 40, abs=0.012)
    assert found.top_5 == pytest.approx(5 / 40, abs=0.025)
    assert found.median_rank == pytest.approx(20.5, abs=2.5)


LETTERS = "abcdefghij"
TIED = (0.5, 1, 1, -1, -1, 3)
"""At distance 1 from 0 lie "b" and three others; "a" is nearer and takes the first place."""


@pytest.mark.parametrize(
    ("samples", "subjects", "drawings", "names", "top_1", "top_5", "median_rank"),
    [
        ([0.1], "a", range(10), LETTERS, 1, 1, 1),
        ([0.1], "c", range(10), LETTERS, 0, 1, 3),
        ([0.1], "f", range(10), LETTERS, 0, 0, 6),
        ([0.1] * 3, "acf", range(10), LETTERS, 1 / 3, 2 / 3, 3),
        # Ties share the places that they take: features that see no difference score what chance does.
        ([1] * 8, "abcdefgh", [1] * 8, "abcdefgh", 1 / 8, 5 / 8, 4.5),
        ([0], "b", TIED, "abcdef", 0, 1, 1 + 2.5),
        ([0], "b", [0.5] + [1] * 8, "abcdefghi", 0, 4 / 8, 5.5),
        # Of several drawings with one caption any counts, and its farther twin must not push it back.
        ([3.2, 0.9], "bb", range(4), "abcb", 1, 1, 1),
        ([0.2], "b", range(4), "abcb", 0, 1, 2),
        # Two of three places, or three of four, cannot all go to the two others.
        ([5], "b", [0] * 4, "abcb", 0.5, 1, 5 / 3),
    ],
)
def test_ranks_are_those_counted_by_hand(samples, subjects, drawings, names, top_1, top_5, median_rank):
    found = ranked(line(*samples), subjects, line(*drawings), names)
    assert (found.top_1, found.top_5, found.median_rank) == pytest.approx((top_1, top_5, median_rank))
    chances = (names.count(subjects[0]) / len(names), min(1, 5 / len(names)))
    assert (found.top_1_chance, found.top_5_chance) == pytest.approx(chances)


def test_rounding_does_not_break_ties():
    # The same coordinates in another order are as far from a constant, but for the order of the sum.
    generator = np.random.default_rng(0)
    row = generator.normal(size=7680).astype(np.float32)
    drawings = np.stack([generator.permutation(row) for _ in range(17)])
    found = ranked(np.full((1, 7680), 0.1, np.float32), ["thing 3"], drawings, NAMES[:17])
    assert found.top_1 == pytest.approx(1 / 17)


def test_samples_without_a_drawing_or_of_trained_subjects_are_left_out_and_counted():
    drawings, names = line(0, 1, 2), list("abc")
    found = ranked(line(0, 9, 1, 2, 5), ["a", "z", "b", "c", ""], drawings, names, trained={"c"})
    assert (found.number, found.without_drawing, found.trained) == (2, 2, 1)
    assert found.top_1 == 1
    nothing = ranked(line(0), ["z"], drawings, names)
    assert nothing.to_json() == {"number": 0, "without_drawing": 1, "trained": 0, "drawings": 3}


def test_blocks_of_samples_are_ranked_like_the_whole(rows, monkeypatch):
    samples = rows + np.random.default_rng(1).normal(size=rows.shape).astype(np.float32)
    whole = ranked(samples, NAMES, rows, NAMES)
    small = partial(distances.squared_distance_blocks, block_bytes=3 * 8 * 40)
    monkeypatch.setattr(pairing, "squared_distance_blocks", small)
    assert ranked(samples, NAMES, rows, NAMES) == whole
    slow = ((samples[:, None].astype(float) - rows[None]) ** 2).sum(2)
    ranks = (slow <= slow.diagonal()[:, None]).sum(1)
    assert whole.median_rank == np.median(ranks)
    assert whole.top_5 == pytest.approx((ranks <= 5).mean())


@pytest.mark.parametrize(("drawings", "subjects"), [(0, 2), (3, 1)])
def test_sets_that_do_not_belong_together_are_refused(drawings, subjects):
    with pytest.raises(DataError, match="a subject per sample"):
        ranked(line(0, 1), ["a"] * subjects, np.ones((drawings, 1), np.float32), ["a"] * drawings)


def test_equal_pictures_share_their_captions():
    images = tiny_images(3)
    names = drawing_names([*images, images[0]], ["man cook", "", "dog", "woman cook"])
    assert names == [{"man cook", "woman cook"}, set(), {"dog"}, {"man cook", "woman cook"}]


def test_what_a_manifest_does_not_say_was_not_told():
    dog = {"subject": "dog", "prompt": "dog in [V] style"}
    told = SampleTexts.read([{"file": "a", "seed": 1}, dog, {"prompt": None}])
    assert told.subjects == ("", "dog", "")
    assert told.prompts == ("", "dog in [V] style", "")


SETTINGS = EvaluateSettings(features="averages", memorized_below=0.15, resamples=2)


def measured(cache, texts, samples=None):
    register_network("averages", Averages)
    domain = tiny_images(40)
    samples = domain[20:32] if samples is None else samples
    return measure_images(
        samples, tiny_images(12, 2), domain[:5], domain, SETTINGS, cache, known=Known(texts=texts)
    )


def subjects(*numbers):
    return SampleTexts(tuple(f"thing {number}" for number in numbers), ("",) * len(numbers))


def test_the_metrics_have_a_paired_section_where_subjects_are_known(tmp_path):
    texts = Texts(subjects(*range(20, 32)), subjects(*range(20, 32)), tuple(NAMES[:5]), tuple(NAMES))
    metrics = measured(tmp_path, texts).metrics()
    assert set(metrics["paired"]) == {"samples", "references"}
    kept, source = metrics["paired"]["samples"], metrics["paired"]["references"]["source"]
    assert (kept["top_1"], kept["top_5"], kept["number"], kept["drawings"]) == (1, 1, 12, 40)
    assert source["number"] == 12
    assert source["top_1"] < 0.3
    assert json.loads(json.dumps(metrics["paired"])) == metrics["paired"]
    assert all(isinstance(value, int | float) for value in (*kept.values(), *source.values()))


def test_copies_of_training_images_keep_no_subject(tmp_path):
    samples = tiny_images(40)[[0, 1, 2, 3, 4, *[0] * 7]]
    asked = subjects(*range(20, 32))
    texts = Texts(asked, UNTOLD, tuple(NAMES[:5]), tuple(NAMES))
    paired = measured(tmp_path, texts, samples).metrics()["paired"]
    assert (paired["samples"]["top_1"], paired["samples"]["number"], paired["references"]) == (0, 12, {})
    told = replace(texts, samples=subjects(0, 1, 2, 3, 4, *range(20, 27)))
    found = measured(tmp_path, told, samples).metrics()["paired"]["samples"]
    assert (found["trained"], found["number"], found["top_1"]) == (5, 7, 0)


@pytest.mark.parametrize("texts", [None, Texts(UNTOLD, UNTOLD, ("",) * 5, tuple(NAMES))])
def test_without_subjects_the_metrics_are_what_they_were(tmp_path, texts):
    metrics = measured(tmp_path, texts).metrics()
    assert not {"paired", "clip"} & set(metrics)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A text model and captioned images, where the benchmark looks for them."""
    register_network("averages", Averages)
    image_set(tiny_text_images(len(PROMPTS)), PROMPTS).save(tmp_path / "images")
    (tmp_path / "subjects.txt").write_text("\n".join(PROMPTS[:5]))
    params = yaml.safe_load(PARAMS.read_text())
    params["sample"] |= {"batch_size": 2, "steps": 2, "mixed_precision": "no", "guidance_scale": 2.0}
    params["evaluate"]["features"] = "averages"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    command = ["retrieval", "--source", "tiny", "--subjects", "subjects.txt", "--images", "images"]
    monkeypatch.setattr("sys.argv", [*command, "--out", "results/found.json"])
    return tmp_path


def test_the_stage_reads_subjects_from_manifests_and_captions_from_image_sets(tmp_path, monkeypatch):
    register_network("averages", Averages)
    monkeypatch.chdir(tmp_path)
    domain = tiny_images(40)
    whole = image_set(domain, NAMES)
    whole.save("domain")
    whole.take(range(5)).save("shots")
    for folder, images in ("samples", domain[20:32]), ("source", tiny_images(12, 2)):
        write_samples(Path(folder), images)
        manifest = json.loads(Path(folder, "manifest.json").read_text())
        for index, entry in enumerate(manifest["images"]):
            entry["subject"] = "a whale" if index == 0 else f"thing {20 + index}"
        write_json(Path(folder, "manifest.json"), manifest)
    metrics, _ = measure_folders(Path("samples"), Path("source"), Path(), SETTINGS, Path("cache"))
    kept = metrics["paired"]["samples"]
    assert (kept["top_1"], kept["number"], kept["without_drawing"], kept["drawings"]) == (1, 11, 1, 40)
    assert metrics["paired"]["references"]["source"]["without_drawing"] == 1
    assert "top_1 1, top_5 1" in _summary(metrics)


def test_the_benchmark_writes_figures_and_a_picture(project, capsys):
    tiny_text_denoiser().save(project / "models/sources/tiny")
    benchmark.main()
    record = json.loads((project / "results/found.json").read_text())
    assert (record["number"], record["drawings"], record["top_5_chance"]) == (5, 6, pytest.approx(5 / 6))
    assert (record["features"], record["features_digest"]) == ("averages", "0")
    assert record["sample"]["guidance_scale"] == 2.0
    assert len(record["model_digest"]) == 64
    assert (project / "results/found.png").is_file()
    assert "5 subjects among 6 drawings by averages: nearest" in capsys.readouterr().out


def test_images_do_not_depend_on_the_benchmarks_batches(project):
    model, settings = tiny_text_denoiser(), config.load().sample
    whole = benchmark.draw_subjects(model, PROMPTS[:5], settings.model_copy(update={"batch_size": 5}))
    parts = benchmark.draw_subjects(model, PROMPTS[:5], settings)
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert np.abs(whole.astype(int) - benchmark.draw_subjects(model, PROMPTS[1:], settings)).max() > 1


def test_the_benchmark_refuses_a_model_without_prompts_and_subjects_without_an_image(project):
    settings = config.load()
    with pytest.raises(ConfigError, match="is unconditional"):
        benchmark.draw_subjects(tiny_denoiser(), PROMPTS, settings.sample)
    images = ImageSet.load(project / "images")
    with pytest.raises(ConfigError, match="none of the 1 subjects"):
        benchmark.measure(tiny_text_images(1), ["a whale"], images, settings)


def figures(top_1, clip=None):
    """Return metrics of a text model as the stage writes them."""
    pair = {"number": 8, "without_drawing": 0, "trained": 0, "drawings": 500, "median_rank": 2.0}
    pair |= {"top_1": 0.25, "top_5": 0.5, "top_1_chance": 0.002, "top_5_chance": 0.01}
    paired = {"samples": {**pair, "top_1": top_1}, "references": {"source": pair}}
    scores = {"number": 8, "frechet_distance": 10.0}
    return {
        **{"features": "net", "features_digest": "0", "number": 8, "domain_number": 490},
        **{"domain_is_shots": False, "samples": scores, "paired": paired},
        "references": {"shots": scores, "source": scores, "domain": scores},
        **({} if clip is None else {"clip": clip}),
    }


CLIP = {
    "model": "some/clip",
    "digest": "f00d",
    "samples": {"clip_score": 31.5, "subject_clip_score": 30.5, "intra_clip": 0.3},
    "references": {"source": {"clip_score": 29.5}, "domain": {"clip_score": 27.5, "intra_clip": 0.2}},
}


def reported(tmp_path, **metrics):
    """Return the report's tables and page of two adaptations of params.yaml."""
    settings = config.load(PARAMS)
    for name, content in metrics.items():
        path = tmp_path / "evaluation" / f"sunglasses-{name}" / "metrics.json"
        write_json(path, content)
    tables = metric_tables(read(tmp_path, settings).results)
    rows = [{row.figure.key: row for row in table.rows} for table in tables]
    return rows, report.render(tmp_path, settings)


def test_the_report_shows_how_often_subjects_are_kept_beside_chance_and_source(tmp_path):
    (rows,), html = reported(tmp_path, finetune=figures(0.5), domainstudio=figures(0.625))
    cells = [(cell.text, cell.spread, cell.best) for cell in rows["top_1"].cells]
    assert cells == [("50.0 %", "chance 0.2 %", False), ("62.5 %", "chance 0.2 %", True)]
    assert [cell.text for cell in rows["top_1"].references] == ["–", "25.0 %", "–"]
    assert [cell.spread for cell in rows["top_5"].cells] == ["chance 1.0 %"] * 2
    assert "clip_score" not in rows
    assert "Subject kept" in html
    assert "CLIP" not in html


def test_the_report_shows_clips_figures_and_keeps_those_of_two_models_apart(tmp_path):
    (rows,), html = reported(tmp_path, finetune=figures(0.5, CLIP), domainstudio=figures(0.5, CLIP))
    assert [cell.text for cell in rows["clip_score"].cells] == ["31.5", "31.5"]
    assert [cell.text for cell in rows["clip_score"].references] == ["–", "29.5", "27.5"]
    assert all(cell.note for cell in rows["intra_clip"].cells), "more varied than real images"
    assert "CLIP: <b>some/clip</b>" in html
    assert "f00d" in html
    other = figures(0.5, CLIP | {"digest": "beef"})
    assert len(reported(tmp_path, domainstudio=other)[0]) == 2
