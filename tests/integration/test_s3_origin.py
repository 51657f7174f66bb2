"""Images from a real S3 server."""

from __future__ import annotations

import socket
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from domainstudio.config import PrepareSettings
from domainstudio.data import packing
from domainstudio.errors import DataError, MissingExtraError
from stages import prepare as prepare_stage
from stages.origins import LISTERS
from tests.integration.s3_parts import png, remove_credentials
from tests.project import params

prepare = partial(packing.prepare, listers=LISTERS)
SETTINGS = PrepareSettings(resolution=16)
ROOT = Path(__file__).parents[2]


def test_a_prefix_gives_the_same_images_as_the_folder(s3, tmp_path):
    files = {"b.png": png(1), "cats/a.png": png(2), "b.txt": b"a square\n"}
    files |= {".DS_Store": b"x", "notes.md": b"x"}
    url = s3.upload("same", files)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)

    remote, local = prepare(url, SETTINGS), prepare(str(tmp_path), SETTINGS)

    assert remote.digest == local.digest
    assert [(r.id, r.sha256, r.caption, r.label) for r in remote.records] == [
        (r.id, r.sha256, r.caption, r.label) for r in local.records
    ]
    assert [r.origin for r in remote.records] == [f"{url}/b.png", f"{url}/cats/a.png"]
    assert remote.records[0].caption == "a square"
    assert remote.ignored == (f"{url}/.DS_Store", f"{url}/notes.md")
    assert prepare(f"{url}/", SETTINGS).digest == remote.digest


def test_a_prefix_is_a_folder_and_not_the_beginning_of_a_name(s3):
    url = s3.upload("ink", {"a.png": png(3)})
    s3.upload("ink2", {"b.png": png(4)})
    assert [record.id for record in prepare(url, SETTINGS).records] == ["a.png"]


def test_more_objects_than_one_page_of_the_listing(s3):
    notes = {f"{index:04}.md": b"x" for index in range(1001)}
    url = s3.upload("many", {**notes, "z.png": png(5)})
    images = prepare(url, SETTINGS)
    assert [record.id for record in images.records] == ["z.png"]
    assert len(images.ignored) == 1001


def test_a_damaged_object_is_refused_by_its_url(s3):
    url = s3.upload("damaged", {"a.png": png(6), "b.png": png(7)[:200], "c.png": png(6)})
    with pytest.raises(DataError) as caught:
        prepare(url, SETTINGS)
    assert f"{url}/b.png: damaged" in str(caught.value)
    assert f"{url}/c.png: the same file as {url}/a.png" in str(caught.value)
    kept = prepare(url, SETTINGS.model_copy(update={"on_refusal": "skip"}))
    assert [record.id for record in kept.records] == ["a.png"]
    assert [refusal.origin for refusal in kept.refused] == [f"{url}/b.png", f"{url}/c.png"]


def test_keys_that_are_no_plain_paths_are_refused(monkeypatch):
    from domainstudio.storage import s3

    bad = ("../up.png", "a/../../up.png", "/root.png", "a//b.png", "a\\b.png", "c:x.png", "n\x00.png")
    names = ["good.png", *bad]
    listed = [s3.S3Object(n, f"s3://b/p/{n}", 10, lambda n=n: png(len(n))) for n in names]  # type: ignore[misc]
    monkeypatch.setattr(s3, "list_objects", lambda url: iter(listed))
    images = prepare("s3://b/p", SETTINGS.model_copy(update={"on_refusal": "skip"}))
    assert [record.id for record in images.records] == ["good.png"]
    reason = "its key is not a plain path. Rename the object"
    assert {(refusal.origin, refusal.reason) for refusal in images.refused} == {
        (f"s3://b/p/{name}".replace("\x00", "\\x00"), reason) for name in bad
    }


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://test-bucket/nothing-here", "holds no objects: correct the prefix"),
        ("s3://no-such-bucket/x", "there is no such bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://Bad_Bucket!/x", "Bad_Bucket"),
        ("s3://test-bucket/notes", r"holds no images .* it has only s3://test-bucket/notes/a\.md"),
    ],
)
def test_what_is_missing_is_named(s3, url, message):
    s3.put("notes/a.md", b"x")
    with pytest.raises(DataError, match=message):
        prepare(url, SETTINGS)


def test_credentials_and_endpoint_are_named(s3, monkeypatch, tmp_path):
    url = s3.upload("secret", {"a.png": png(8)})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match="AWS_SECRET_ACCESS_KEY"):
        prepare(url, SETTINGS)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
    with pytest.raises(DataError, match="AWS_ACCESS_KEY_ID"):
        prepare(url, SETTINGS)
    remove_credentials(monkeypatch)
    with pytest.raises(DataError, match="no S3 credentials"):
        prepare(url, SETTINGS)


def test_a_server_that_is_down_is_named(s3, monkeypatch):
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(DataError, match="cannot be reached"):
            prepare(f"s3://{s3.bucket}/x", SETTINGS)


def test_without_boto3_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(MissingExtraError, match=r'pip install "domainstudio\[pipeline\]"'):
        prepare("s3://bucket/x", SETTINGS)


def test_the_stage_reads_from_s3(s3, tmp_path, monkeypatch, capsys):
    url = s3.upload("stage", {f"{index}.png": png(20 + index) for index in range(4)})
    values = params() | {"source_images": {"noto": {"images": url, "number": 3}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(sys, "argv", ["prepare", "source", "noto"])
    prepare_stage.main()
    assert capsys.readouterr() == (f"data/sources/noto: 3 images from {url}\n", "")
