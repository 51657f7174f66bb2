"""From a folder to an image set: what is taken, ignored, refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domainstudio.config import PrepareSettings
from domainstudio.data import origins
from domainstudio.data.packing import prepare
from domainstudio.errors import ConfigError, DataError

STOP = PrepareSettings(resolution=16)
SKIP = PrepareSettings(resolution=16, on_refusal="skip")


def picture(path: Path, seed: int, size: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def reasons(folder: Path) -> dict[str, str]:
    return {Path(refusal.origin).name: refusal.reason for refusal in prepare(str(folder), SKIP).refused}


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    for seed, name in enumerate(["b.png", "a/z.JPG", "a/b/c.webp", "c.bmp", "d.tiff"]):
        picture(tmp_path / "real" / name, seed)
    tmp_path /= "link"
    tmp_path.symlink_to("real")
    images = prepare(str(tmp_path), STOP)
    assert [record.id for record in images.records] == ["a/b/c.webp", "a/z.JPG", "b.png", "c.bmp", "d.tiff"]
    assert [record.label for record in images.records] == ["a/b", "a", None, None, None]
    assert images.records[2].origin == f"{tmp_path}/b.png"
    assert images.images.shape == (5, 3, 16, 16) and images.origin == str(tmp_path)


def test_stray_files_are_ignored_and_listed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    strays = [".DS_Store", "Thumbs.db", "desktop.ini", "._a.png", "notes.md", "data.json", "README"]
    strays += [".cache/thumb.png", "__MACOSX/a.png", "alone.txt"]
    for name in strays:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not an image")
    images = prepare(str(tmp_path), STOP)
    assert [record.id for record in images.records] == ["a.png"]
    assert list(images.ignored) == sorted(f"{tmp_path}/{name}" for name in strays)
    assert images.refused == ()


def test_sidecars_give_captions(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0), picture(tmp_path / "x/b.png", 1), picture(tmp_path / "c.png", 2)
    (tmp_path / "a.txt").write_text("\ufeff a red Häuschen\n", encoding="utf-8")
    (tmp_path / "x/b.txt").write_text("another", encoding="utf-8")
    images = prepare(str(tmp_path), STOP)
    assert [record.caption for record in images.records] == ["a red Häuschen", "", "another"]
    assert images.ignored == ()

    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    assert "its caption" in reasons(tmp_path)["c.png"] and "utf-8" in reasons(tmp_path)["c.png"]


def test_every_refusal_is_named_in_one_error(tmp_path: Path) -> None:
    whole = picture(tmp_path / "a.png", 0).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:300])
    (tmp_path / "fake.jpg").write_bytes(b"not an image")
    (tmp_path / "empty.gif").write_bytes(b"")
    (tmp_path / "phone.heic").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.png")
    picture(tmp_path / "tiny.png", 1, size=8)
    (tmp_path / "twin.png").write_bytes(whole)
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(whole)
    with Image.open(tmp_path / "a.png") as image:
        image.save(tmp_path / "b.bmp")
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "c.png")
    with pytest.raises(DataError) as caught:
        prepare(str(tmp_path), STOP)
    text = str(caught.value)
    assert "9 of 11 images cannot be used" in text and "prepare.on_refusal: skip" in text
    for name, reason in [
        ("cut.png", "damaged"),
        ("fake.jpg", "not a readable image"),
        ("empty.gif", "not a readable image"),
        ("phone.heic", ".heic files are not read"),
        ("pipe.png", "not a regular file. Remove it"),
        ("b.bmp", f"the same pixels as {tmp_path}/a.png, once prepared. Remove one of them"),
        ("tiny.png", "too small: 8×8"),
        ("twin.png", f"the same file as {tmp_path}/a.png"),
    ]:
        assert f"{tmp_path}/{name}: {reason}" in text
    assert ": its name is not UTF-8. Rename it" in text

    kept = prepare(str(tmp_path), SKIP)
    assert [record.id for record in kept.records] == ["a.png", "c.png"]
    assert len(kept.refused) == 9


def test_links_are_followed_only_inside_the_folder(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    secret = picture(outside / "secret.png", 0)
    target = picture(folder / "kept/a.png", 1)
    (folder / "leaves.png").symlink_to(secret)
    (folder / "leaves").symlink_to(outside)
    (folder / "broken.png").symlink_to(folder / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "inner").symlink_to(folder / "kept")
    (folder / "again.png").symlink_to(target)
    found = reasons(folder)
    assert "leaves the folder" in found["leaves.png"] and "leaves the folder" in found["leaves"]
    assert "leads nowhere" in found["broken.png"] and "leads nowhere" in found["loop.png"]
    assert "a link to a folder" in found["inner"]
    assert "the same file as" in found["a.png"]  # again.png sorts first
    assert [record.id for record in prepare(str(folder), SKIP).records] == ["again.png"]

    (folder / "kept/a.txt").symlink_to(outside / "caption.txt")
    (outside / "caption.txt").write_text("secret")
    assert "leaves the folder" in reasons(folder)["a.png"]


def test_names_cannot_steer_what_is_shown(tmp_path: Path) -> None:
    turned, coloured, family = "\u2066gp\u202egnp.png", "\x1b[31m\n.png", "\U0001f468\u200d\U0001f467.png"
    for seed, name in enumerate([turned, coloured, family]):
        picture(tmp_path / name, seed)
    (tmp_path / "bad\u202e.png").write_bytes(b"no image")
    (tmp_path / "stray\x07").write_bytes(b"stray")
    images = prepare(str(tmp_path), SKIP)
    names = {r"\u2066gp\u202egnp.png", r"\x1b[31m\n.png", family}
    assert {record.id for record in images.records} == names
    assert {record.origin for record in images.records} == {f"{tmp_path}/{name}" for name in names}
    assert images.refused[0].origin.endswith(r"bad\u202e.png") and images.ignored == (
        rf"{tmp_path}/stray\x07",
    )


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png", 0)
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(origins.MAX_FILE_BYTES + 1)  # a hole: it takes no space
    small = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(Path, "read_bytes", lambda path: {tmp_path / "a.png": small}[path])
    assert reasons(tmp_path)["b.png"].startswith("too large: 268,435,457 bytes")


def test_another_kind_of_origin_is_a_lister(tmp_path: Path) -> None:
    data = picture(tmp_path / "a.png", 0).read_bytes()

    def list_memory(url: str) -> origins.Listing:
        return origins.listing_of([origins.Entry("x/a.png", f"{url}/x/a.png", len(data), lambda: data)])

    (record,) = prepare("memory://here", STOP, {"memory://*": list_memory}).records
    assert (record.id, record.origin, record.label) == ("x/a.png", "memory://here/x/a.png", "x")
    with pytest.raises(DataError, match=r"give a folder, memory://\*"):
        prepare("ftp://there", STOP, {"memory://*": list_memory})


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ("missing", "missing does not exist: correct the path"),
        ("a.png", r"a\.png is a file, not a folder"),
        ("empty", "empty holds no images"),
        ("broken", r"none of its 1 images can be used:\n .*a\.png: not a readable image"),
        ("https://example.org/images", "not a usable origin: give a folder"),
    ],
)
def test_unusable_origins_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: str, message: str
):
    picture(tmp_path / "a.png", 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        prepare(origin, SKIP)


def test_a_background_must_be_a_colour(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.background must be a colour"):
        prepare(str(tmp_path), PrepareSettings.model_construct(**{**STOP.model_dump(), "background": "#12"}))
