"""Image sets on disk, draws, and pictures."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from domainstudio.data import ImageRecord, ImageSet, Refusal, contact_sheet, grid, save_png
from domainstudio.errors import DataError
from tests.models import tiny_images
from tests.modules import ROOT


def image_set(number: int = 6) -> ImageSet:
    records = tuple(
        ImageRecord(f"{i}.png", f"{i:064}", 9, 10, f"x/{i}.png", f"image {i}", "cat" if i else None, "1F600")
        for i in range(number)
    )
    refused = (Refusal("x/bad.png", "damaged"),)
    return ImageSet(tiny_images(number), records, "x", "CC-BY-4.0", "© Ärzte", refused, ("x/.DS_Store",))


def test_saved_and_loaded_are_equal(tmp_path: Path) -> None:
    saved = image_set()
    saved.save(tmp_path / "set")
    loaded = ImageSet.load(tmp_path / "set")
    assert (loaded.images == saved.images).all() and loaded.images.dtype == np.uint8
    for name in ("records", "origin", "licence", "attribution", "refused", "ignored", "digest", "resolution"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert len(loaded) == 6
    names = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert names == ["contact_sheet.png", "images.safetensors", "manifest.json"]
    assert saved.digest == hashlib.sha256(saved.images.tobytes()).hexdigest()
    strided = ImageSet(np.asfortranarray(saved.images), saved.records, "x")
    assert strided.digest == saved.digest
    image_set().save(tmp_path / "again")
    for name in names:
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def without(file):
    return lambda folder: (folder / file).unlink()


def with_bytes(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def with_manifest(**changes):
    def change(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def with_tensors(**tensors):
    return with_bytes("images.safetensors", save(tensors))


ANOTHER_PIXEL = tiny_images()
ANOTHER_PIXEL[3, 1, 2, 2] ^= 1
NO_MANIFEST = r"manifest\.json is not an image set's manifest"
DAMAGED = r"images\.safetensors is damaged"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_tensors(images=ANOTHER_PIXEL), r"images\.safetensors is not what manifest\.json describes"),
        (without("manifest.json"), r"manifest\.json cannot be read"),
        (with_bytes("manifest.json", b"{"), NO_MANIFEST),
        (with_bytes("manifest.json", b"\xff\xfe"), NO_MANIFEST),
        (with_bytes("manifest.json", b'{"format": 2}'), NO_MANIFEST),
        (with_manifest(surprise=1), NO_MANIFEST),
        (with_manifest(resolution="8"), NO_MANIFEST),
        (with_manifest(images=[{"id": "a"}]), NO_MANIFEST),
        (with_manifest(images=[]), "6 images but 0 records"),
        (without("images.safetensors"), r"images\.safetensors cannot be read"),
        (with_bytes("images.safetensors", b""), DAMAGED),
        (with_bytes("images.safetensors", b"\x80\x04pickle"), DAMAGED),
        (with_tensors(images=np.zeros((6, 3, 8, 8), np.float32)), "expected uint8"),
        (with_tensors(other=np.zeros(1, np.uint8)), DAMAGED),
    ],
)
def test_load_names_what_is_damaged(tmp_path, change, message):
    image_set().save(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        ImageSet.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "dvc repro" in str(caught.value)


def test_a_draw_is_seeded_without_replacement_and_in_order() -> None:
    images = image_set(40)
    drawn = images.draw(10, seed=3)
    ids = [int(record.id.removesuffix(".png")) for record in drawn.records]
    assert ids == sorted(np.random.default_rng(3).choice(40, 10, replace=False).tolist())
    assert len(set(ids)) == 10 and ids == sorted(ids)
    assert (drawn.images == images.images[ids]).all()
    assert drawn.digest == images.draw(10, seed=3).digest != images.draw(10, seed=4).digest
    for name in ("origin", "licence", "attribution"):
        assert getattr(drawn, name) == getattr(images, name)
    assert images.draw(None, seed=3) is images
    assert images.draw(40, seed=1).digest == images.digest
    for number in (41, 0):
        with pytest.raises(DataError, match=f"40 usable images and {number} were asked for: lower `number`"):
            images.draw(number, seed=3)


def test_grid_places_every_pixel() -> None:
    images = image_set(5).images
    picture = np.asarray(grid(images, columns=3, pad=2))
    assert picture.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    for index in range(5):
        top, left = 2 + index // 3 * 10, 2 + index % 3 * 10
        assert (picture[top : top + 8, left : left + 8] == images[index].transpose(1, 2, 0)).all()
    assert (picture[12:, 22:] == 255).all() and (picture[:2] == 255).all()
    assert grid(images[:2], columns=8, pad=0).size == (16, 8)


def test_a_contact_sheet_stays_small() -> None:
    assert contact_sheet(np.zeros((3, 3, 512, 512), np.uint8)).size == (3 * 65 + 1, 65 + 1)
    many = contact_sheet(np.zeros((5000, 3, 8, 8), np.uint8))
    assert many.size == (31 * 9 + 1, 20 * 9 + 1)


def test_png_files_hold_the_pixels(tmp_path: Path) -> None:
    images = image_set(2).images
    paths = [tmp_path / "new" / f"{index}.png" for index in range(2)]
    save_png(images, paths)
    for image, path in zip(images, paths, strict=True):
        with Image.open(path) as saved:
            assert (np.asarray(saved) == image.transpose(1, 2, 0)).all()


def test_pictures_refuse_what_is_no_batch_of_images() -> None:
    for wrong in (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 3, 8, 8)), np.zeros((0, 3, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8 images"):
            grid(wrong, columns=1)
    with pytest.raises(ValueError, match="at least 1 column"):
        grid(image_set().images, columns=0)
    with pytest.raises(ValueError, match="6 images need as many paths, got 1"):
        save_png(image_set().images, ["a.png"])


def test_datasets_need_neither_torch_nor_boto3() -> None:
    code = "import sys, domainstudio.data, stages.prepare; print({'torch', 'boto3', 'dvc'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
