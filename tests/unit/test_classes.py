"""What becomes of each class when one of them is adapted: each is measured against its own domain."""

import json

import numpy as np
import pytest
import yaml

from benchmarks import classes
from domainstudio import config
from domainstudio.data.pictures import save_png
from domainstudio.metrics.features import Features
from domainstudio.metrics.networks import register_network
from tests.models import Averages, image_set
from tests.project import params

LABELS = ["cat", "dog"] * 6


def images(seed, colours):
    """Return small images of about the given colours."""
    noise = np.random.default_rng(seed).integers(-20, 20, (len(colours), 3, 8, 8))
    return (np.array(colours)[:, :, None, None] + noise).astype(np.uint8)


def save_samples(folder, pixels):
    paths = [folder / f"images/{i}.png" for i in range(len(pixels))]
    save_png(pixels, paths)
    entries = [{"file": f"images/{p.name}", "subject": label} for p, label in zip(paths, LABELS, strict=True)]
    (folder / "manifest.json").write_text(json.dumps({"images": entries}))
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The source domain is red; cats become blue."""
    register_network("averages", Averages)
    monkeypatch.chdir(tmp_path)
    red, blue = (200, 40, 40), (40, 40, 200)
    cats = image_set(images(1, [blue] * 8), labels=["cat"] * 8)
    cats.save(tmp_path / "data/targets/ink/domain")
    cats.take([0, 1, 2]).save(tmp_path / "data/targets/ink/shots")
    image_set(images(2, [red] * 12), labels=LABELS).save(tmp_path / "data/sources/noto")
    before = images(3, [red] * 12)
    adapted = before.copy()
    adapted[::2] = cats.images[:6]  # three of them copies of the shots
    save_samples(tmp_path / "source", before)
    save_samples(tmp_path / "adapted", adapted)
    values = params()
    values["evaluate"] |= {"features": "averages", "memorized_below": 1e-6}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def test_each_class_is_measured_against_its_own_domain(project):
    settings = config.load()
    adaptation = settings.adaptation("ink-finetune")
    (cat, dog), (cat_before, dog_before) = (
        classes.measure_classes(project / samples, project / "source", adaptation, settings)
        for samples in ("adapted", "source")
    )
    assert (cat["class"], cat["adapted"], cat["number"], cat["real"]) == ("cat", True, 6, 5)
    assert (dog["class"], dog["adapted"], dog["number"], dog["real"]) == ("dog", False, 6, 6)
    assert cat["memorized_share"] == pytest.approx(0.5)
    assert cat["frechet_distance"] < 0.01 < 0.5 < cat_before["frechet_distance"]
    assert dog["frechet_distance"] == dog_before["frechet_distance"] < 0.01
    assert cat["changed"] > 1 and dog["changed"] == 0
    text = classes.table([{"reference": "source", **dog_before}, {"adaptation": "mine", **dog}])
    assert "| dog | *source model* | – | 0.00 | 0.00 |" in text


def test_changed_is_a_share_of_the_distance_of_unrelated_samples():
    rows = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    before = Features("any", "0", rows, rows)
    shuffled = before.take(np.roll(np.arange(60), 1))
    assert classes.kept(before, before, before)["changed"] == 0
    assert classes.kept(shuffled, before, before)["changed"] == pytest.approx(1, abs=0.1)


def test_grey_images_are_without_colour():
    images = np.full((4, 3, 4, 4), 90, dtype=np.uint8)
    assert classes.colourless(images) == 1
    images[0, 0] += 10  # 4% of the range
    assert classes.colourless(images) == 0.75
