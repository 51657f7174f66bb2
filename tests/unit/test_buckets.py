"""Aspect-ratio buckets: which there are, what is packed, kept, shown and drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file

from domainstudio import config
from domainstudio.config import PrepareSettings
from domainstudio.data import ImageSet
from domainstudio.data.buckets import bucket_sizes, crop, nearest_bucket
from domainstudio.data.packing import prepare
from domainstudio.errors import DataError
from domainstudio.metrics.evaluation import held_out
from domainstudio.report.reading import PackedImages, read
from domainstudio.training.prior import PriorImages
from stages import prepare as stage
from tests.project import ROOT, params

SETTINGS = PrepareSettings(resolution=32)
SIZES = {"a": (90, 60), "b": (60, 100), "c": (64, 64), "d": (70, 64), "e": (300, 100)}
"""Names and (width, height) of five pictures; their buckets as (height, width)."""
BUCKETS = {"a": (24, 40), "b": (40, 24), "c": (32, 32), "d": (32, 32), "e": (24, 40)}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture whose red grows to the right, and whose green downwards; its blue is its own."""
    across = np.broadcast_to(np.linspace(0, 255, width)[None, :], (height, width))
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    blue = np.full((height, width), 10 * seed)
    return Image.fromarray(np.stack([across, down, blue], axis=2).round().astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        picture(*size, seed).save(tmp_path / f"images/{name}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("resolution", [8, 24, 32, 64, 200, 256, 512, 520, 768, 1024])
def test_buckets_are_about_as_large_as_the_square_and_never_larger(resolution: int) -> None:
    sizes = bucket_sizes(resolution)
    step = next(step for step in (64, 32, 16, 8) if step <= max(8, resolution // 8))
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert (width, height) in sizes
        assert 1 / 2 <= width / height <= 2
        assert 0 <= resolution**2 - height * width < step * max(height, width)
        assert (height, width) == (resolution, resolution) or height % step == width % step == 0


def test_the_buckets_of_the_usual_resolutions() -> None:
    assert bucket_sizes(512) == ((640, 384), (576, 448), (512, 512), (448, 576), (384, 640))
    sdxl = [(960, 1088), (896, 1152), (832, 1216), (768, 1344), (768, 1280), (704, 1408)]
    assert [size for size in bucket_sizes(1024) if size[1] > size[0]] == sdxl


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((3000, 4000), (448, 576)),
        ((4000, 3000), (576, 448)),
        ((2000, 3000), (384, 640)),
        ((1080, 1920), (384, 640)),
        ((100, 1000), (384, 640)),
        ((1000, 100), (640, 384)),
        ((100, 110), (512, 512)),
    ],
)
def test_an_image_goes_to_the_nearest_aspect_ratio(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert nearest_bucket(size, 512) == bucket


def test_a_crop_is_the_largest_centred_part_of_its_shape() -> None:
    wide = np.asarray(crop(picture(300, 100), (24, 40))).astype(int)
    assert wide.shape == (24, 40, 3)
    # Of 300 columns 100 · 40 / 24 = 167 are kept, from 66 on, and every row.
    assert abs(wide[0, 0, 0] - 255 * 66 / 299) < 4 and abs(wide[0, -1, 0] - 255 * 233 / 299) < 4
    assert wide[0, 0, 1] < 8 and wide[-1, 0, 1] > 247
    tall = np.asarray(crop(picture(100, 300), (40, 24))).astype(int)
    assert tall[0, 0, 0] < 8 and tall[0, -1, 0] > 247
    assert abs(tall[0, 0, 1] - 255 * 66 / 299) < 4


def test_an_image_set_holds_its_squares_and_its_buckets(folder: Path, tmp_path: Path) -> None:
    plain, images = prepare(str(folder), SETTINGS), prepare(str(folder), SETTINGS, buckets=True)
    assert (images.images == plain.images).all() and plain.bucketed == ()
    assert [image.shape[1:] for image in images.bucketed] == list(BUCKETS.values())
    for record, image in zip(images.records, images.bucketed, strict=True):
        name = record.id.removesuffix(".png")
        with Image.open(folder / f"{name}.png") as read_back:
            expected = np.asarray(crop(read_back, BUCKETS[name]))
        assert (image.transpose(1, 2, 0) == expected).all()
    assert images.digest != plain.digest
    assert held_out(plain.images, images.take([1, 3]).images) == [0, 2, 4], "found by their squares"
    images.save(tmp_path / "set")
    loaded = ImageSet.load(tmp_path / "set")
    assert loaded.digest == images.digest and loaded.records == images.records
    assert all((a == b).all() for a, b in zip(loaded.bucketed, images.bucketed, strict=True))


def test_sets_without_buckets_have_the_files_they_had(folder: Path, tmp_path: Path) -> None:
    prepare(str(folder), SETTINGS).save(tmp_path / "set")
    assert set(load_file(tmp_path / "set/images.safetensors")) == {"images"}
    keys = "format origin licence attribution resolution digest images refused ignored"
    assert " ".join(json.loads((tmp_path / "set/manifest.json").read_text())) == keys


def test_padded_images_keep_everything_in_the_bucket(folder: Path) -> None:
    settings = SETTINGS.model_copy(update={"crop": "pad", "background": "#ff00ff"})
    padded = prepare(str(folder), settings, buckets=True)
    long = padded.bucketed[4].astype(int)
    assert long.shape == (3, 24, 40)
    assert (long[:, 0] == [[255], [0], [255]]).all() and (long[:, -1] == [[255], [0], [255]]).all()
    assert long[0, 12, 0] < 16 and long[0, 12, -1] > 239, "40 x 13 pixels of the picture, from side to side"


def test_a_set_for_each_shape(folder: Path) -> None:
    images = prepare(str(folder), SETTINGS, buckets=True)
    groups = images.buckets()
    assert [group.images.shape for group in groups] == [(2, 3, 24, 40), (2, 3, 32, 32), (1, 3, 40, 24)]
    assert ["".join(record.id[0] for record in group.records) for group in groups] == ["ae", "cd", "b"]
    for group in groups:
        for record, image in zip(group.records, group.images, strict=True):
            assert (image == images.bucketed[images.records.index(record)]).all()
    taken = images.take([4, 1])
    assert all(taken.bucketed[i] is images.bucketed[index] for i, index in enumerate([4, 1]))
    assert [group.records[0].id for group in taken.buckets()] == ["e.png", "b.png"]
    plain = prepare(str(folder), SETTINGS)
    assert plain.buckets() == (plain,)


@pytest.mark.parametrize("damage", ["pixel", "missing", "shape", "foreign"])
def test_damaged_buckets_are_noticed(folder: Path, tmp_path: Path, damage: str) -> None:
    prepare(str(folder), SETTINGS, buckets=True).save(tmp_path / "set")
    path = tmp_path / "set/images.safetensors"
    tensors = load_file(path)
    if damage == "pixel":
        tensors["bucketed.1"][0, 3, 3] ^= 1
    elif damage == "missing":
        del tensors["bucketed.1"]
    elif damage == "shape":
        tensors["bucketed.1"] = tensors["bucketed.1"].transpose(0, 2, 1).copy()
    else:
        tensors["other"] = np.zeros(1, np.uint8)
    save_file(tensors, path)
    with pytest.raises(DataError, match=r"images\.safetensors (is damaged|is not what)"):
        ImageSet.load(tmp_path / "set")


def test_as_many_buckets_as_images(folder: Path) -> None:
    images = prepare(str(folder), SETTINGS, buckets=True)
    with pytest.raises(DataError, match="5 images but 4 in buckets"):
        ImageSet(images.images, images.records, "x", bucketed=images.bucketed[:4])


def test_the_contact_sheet_and_the_report_show_whole_shapes(folder: Path, tmp_path: Path) -> None:
    images = prepare(str(folder), SETTINGS.model_copy(update={"resolution": 64}), buckets=True)
    target = tmp_path / "data/targets/sunglasses"
    images.save(target / "shots")
    prepare(str(folder), SETTINGS).save(target / "domain")
    with Image.open(target / "shots/contact_sheet.png") as sheet:
        tile = np.asarray(sheet.convert("RGB"))[1:65, 1:65].transpose(2, 0, 1).astype(int)
    inside = (tile != 255).any(axis=0)  # the first picture is wide: 80 x 48, shown with 64 x 38 pixels
    assert abs(int(inside.any(axis=1).sum()) - 38) <= 1 and inside.any(axis=0).sum() == 64
    assert tile[0, 32, 0] < 16 and tile[0, 32, -1] > 239
    known = read(tmp_path, config.load(ROOT / "params.yaml")).targets["sunglasses"]
    assert known.shots and known.domain
    shots = PackedImages(target / "shots", known.shots.manifest)
    assert [shots.image(i).size for i in range(5)] == [image.shape[:0:-1] for image in images.bucketed]
    assert PackedImages(target / "domain", known.domain.manifest).image(0).size == (32, 32)
    with pytest.raises(DataError, match="cannot read image 5"):
        shots.image(5)


def test_the_stage_packs_the_shots_in_buckets_and_the_domain_square(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = params()
    assert values["prepare"]["aspect_buckets"] is False
    values["prepare"] |= {"aspect_buckets": True, "resolution": 32}
    values["targets"]["ink"]["number"] = 4
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", "target", "ink"])
    stage.main()
    shots, domain = (ImageSet.load(f"data/targets/ink/{part}") for part in ("shots", "domain"))
    assert len(shots.bucketed) == 4 and domain.bucketed == ()
    assert (domain.draw(4, 0).images == shots.images).all()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("data/targets/ink/shots: 4 images from images, in buckets: ")
    assert "of 40×24" in said[0] and said[1] == "data/targets/ink/domain: 5 images from images"
    assert json.loads(Path("data/targets/ink/domain/manifest.json").read_text())["digest"] == domain.digest


def test_prior_images_are_cropped_to_the_bucket() -> None:
    square = np.stack([np.asarray(picture(32, 32, seed)).transpose(2, 0, 1) for seed in range(3)])
    prior = PriorImages(square, ("a", "b", "c"))
    assert prior.fitted((32, 32)) is prior
    wide = prior.fitted((24, 40))
    assert wide.images.shape == (3, 3, 24, 40) and wide.texts == prior.texts
    values = wide.images.astype(int)
    assert (values[:, 0, 12, 0] < 16).all() and (values[:, 0, 12, -1] > 239).all(), "its whole width"
    assert (abs(values[:, 1, 0, 20] - 255 * 6.4 / 32) < 12).all(), "of its height 40% are cut"
    assert (values[:, 2] == np.array([0, 10, 20]).reshape(3, 1, 1)).all()
    torch.from_numpy(wide.images)
