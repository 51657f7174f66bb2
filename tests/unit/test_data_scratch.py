"""Many images: read side by side, in files that are mapped, and kept where preparing was ended."""

import filecmp
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from domainstudio.config import PrepareSettings
from domainstudio.data import ImageSet, outcome, packing, pixels, scratch, workers
from domainstudio.data.packing import prepare
from domainstudio.errors import ConfigError
from tests.project import write_images

SETTINGS = PrepareSettings(resolution=32, min_size=1, on_refusal="skip")
FILES = ("images.safetensors", "manifest.json", "contact_sheet.png")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Twelve images, a copy of one, and a file that is none; every folder counts as one of many images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(workers.WORKERS_VARIABLE, "1")
    monkeypatch.setattr(packing, "MANY", 1)
    monkeypatch.setattr(scratch, "CHUNK", 4)
    write_images(tmp_path / "images", 12)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 31, 3), np.uint8)).save("images/05b.png")
    Path("images/03b.png").write_bytes(Path("images/03.png").read_bytes())
    Path("images/04b.png").write_bytes(b"x")
    return tmp_path / "images"


@pytest.fixture
def read(monkeypatch):
    """The files that are decoded, by name."""
    names: list[str] = []

    def counted(candidate, *arguments):
        names.append(Path(candidate.origin).name)
        return outcome.read_candidate(candidate, *arguments)

    monkeypatch.setattr(scratch, "read_candidate", counted)
    return names


def left() -> set[str]:
    return {path.name for path in scratch.CACHE.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", ["1", "2"])
def test_many_images_make_the_same_files_as_few(number, monkeypatch):
    monkeypatch.setenv(workers.WORKERS_VARIABLE, number)
    prepare("images", SETTINGS, buckets=True).save("many")
    monkeypatch.setattr(packing, "MANY", 100)
    prepare("images", SETTINGS, buckets=True).save("few")
    assert [filecmp.cmp(f"many/{name}", f"few/{name}", shallow=False) for name in FILES] == [True] * 3
    loaded = ImageSet.load("many")
    assert len(loaded) == 13 and [Path(each.origin).name for each in loaded.refused] == ["03b.png", "04b.png"]
    assert len({image.shape for image in loaded.bucketed}) == 2
    assert left() == {"lock"}


def test_an_ended_start_is_gone_on_with(read, monkeypatch):
    counted = vars(scratch)["read_candidate"]

    def ended(*arguments):
        if len(read) == 10:
            raise KeyboardInterrupt
        return counted(*arguments)

    monkeypatch.setattr(scratch, "read_candidate", ended)
    with pytest.raises(KeyboardInterrupt):
        prepare("images", SETTINGS)
    monkeypatch.setattr(scratch, "read_candidate", counted)
    read.clear()
    os.utime("images/00.png", ns=(1, 1))
    kept = prepare("images", SETTINGS)
    assert read[:2] == ["00.png", "04b.png"] and len(read) == 2 + 7  # changed; refused; not in a whole chunk
    monkeypatch.setattr(packing, "MANY", 100)
    assert kept.digest == prepare("images", SETTINGS).digest


def test_a_damaged_row_and_another_resolution_are_read_again(read):
    stopping = SETTINGS.model_copy(update={"on_refusal": "stop"})
    with pytest.raises(Exception, match="2 of 15 images cannot be used"):
        prepare("images", stopping)
    (squares,) = scratch.CACHE.rglob("squares")
    with squares.open("r+b") as file:
        file.write(b"damage")
    read.clear()
    Path("images/03b.png").unlink()
    Path("images/04b.png").unlink()
    assert len(prepare("images", stopping)) == 13
    assert read == ["00.png"]
    read.clear()
    prepare("images", stopping.model_copy(update={"resolution": 8}))
    assert len(read) == 13


def test_no_more_than_a_block_of_pixels_is_in_memory(folder, monkeypatch):
    monkeypatch.setattr(pixels, "BLOCK", 2**18)
    for path in folder.glob("0?b.png"):
        path.unlink()
    settings = SETTINGS.model_copy(update={"resolution": 256})
    prepare("images", settings).save("warm")
    tracemalloc.start()
    prepare("images", settings).save("set")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    loaded = ImageSet.load("set")
    peak_of_load = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = loaded.images.nbytes
    assert size == 12 * 3 * 256 * 256
    assert peak < size, peak
    assert peak_of_load < size / 2, peak_of_load
    loaded.images[0] = 0  # in memory alone
    assert ImageSet.load("set").images[0].any()


def test_the_file_is_the_one_that_safetensors_writes(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (11, 3, 8, 8), np.uint8)
    arrays = {
        "images": np.asfortranarray(images),
        **{f"bucketed.{i}": images[i, :, :, :5] for i in range(11)},
    }
    pixels.write_pixels(tmp_path / "ours", arrays)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, tmp_path / "theirs")
    assert filecmp.cmp(tmp_path / "ours", tmp_path / "theirs", shallow=False)


def test_a_wrong_number_of_workers_is_named(monkeypatch):
    for wrong in ("0", "two", "-1"):
        monkeypatch.setenv(workers.WORKERS_VARIABLE, wrong)
        with pytest.raises(ConfigError, match=f"{workers.WORKERS_VARIABLE} must be .* got '{wrong}'"):
            prepare("images", SETTINGS)
