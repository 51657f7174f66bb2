"""Transfers from and to a real S3 server: resumed, checked, and only of what changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from domainstudio.config import PrepareSettings
from domainstudio.data import packing
from domainstudio.errors import DataError, UnavailableError
from domainstudio.registry.importing import import_model
from domainstudio.storage import s3 as transfers
from stages.origins import LISTERS
from tests.integration.conftest import S3Server
from tests.integration.s3_parts import Proxy, png, proxy_of

MIB = 2**20
prepare = partial(packing.prepare, listers=LISTERS)


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A network that can fail, parts of 1 MiB, and little patience."""
    monkeypatch.setattr(transfers, "PART", MIB)
    monkeypatch.setattr(transfers, "PARALLEL", 2)
    with proxy_of(s3, monkeypatch) as proxy:
        yield proxy


def content(seed: int, size: int = 8 * MIB) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def only(url: str) -> transfers.S3Object:
    (item,) = transfers.find_objects(url)
    return item


def broken_download(proxy: Proxy, item: transfers.S3Object, path: Path) -> Path:
    """Break a download off in its midst; return what is there of it."""
    proxy.cut_after = 4 * MIB + MIB // 2
    with pytest.raises(DataError, match="cannot be reached"):
        transfers.download(item, path)
    assert not path.exists()
    proxy.cut_after = None
    proxy.listen()
    proxy.forget()
    (unfinished,) = path.parent.glob(".*.partial")
    assert 2 * MIB <= unfinished.stat().st_size < 5 * MIB
    return unfinished


def test_a_download_that_broke_off_goes_on(s3, proxy, tmp_path):
    item = only(s3.put("resume/a", content(0)))
    rest = item.size - broken_download(proxy, item, tmp_path / "to/a").stat().st_size
    transfers.download(item, tmp_path / "to/a")
    assert (tmp_path / "to/a").read_bytes() == content(0)
    assert rest <= proxy.received < rest + MIB // 10
    assert proxy.count("GET") == rest / MIB
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["a"]


def test_a_changed_object_is_not_glued_to_the_old_one(s3, proxy, tmp_path):
    url = s3.put("changed/a", content(0))
    old = only(url)
    broken_download(proxy, old, tmp_path / "a")
    s3.put("changed/a", content(1))
    with pytest.raises(DataError, match="has changed since it was listed"):
        transfers.download(old, tmp_path / "a")
    transfers.download(only(url), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content(1)

    small = only(s3.put("small/a", b"old"))
    s3.put("small/a", b"new")
    with pytest.raises(DataError, match="has changed since it was listed"):
        transfers.download(small, tmp_path / "b")


def test_a_damaged_download_is_refused(s3, proxy, tmp_path):
    item = only(s3.put("damaged-download/a", content(0)))
    unfinished = broken_download(proxy, item, tmp_path / "a")
    with unfinished.open("r+b") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="damaged-download/a is damaged"):  # by the server's CRC-32
        transfers.download(item, tmp_path / "a")
    item = only(s3.put("other/a", content(0), Metadata={"sha256": "0" * 64}))
    with pytest.raises(DataError, match="other/a is damaged: its checksum is not 00000"):
        transfers.download(item, tmp_path / "a")
    with pytest.raises(DataError, match="other/a is damaged"):
        transfers.download(item, tmp_path / "a", sha256="1" * 64)
    assert not list(tmp_path.iterdir())


def test_an_upload_is_in_parts_and_happens_once(s3, proxy, tmp_path):
    path, url = tmp_path / "big", f"s3://{s3.bucket}/up/big"
    path.write_bytes(content(0, 20 * MIB))
    sha256 = transfers.upload(path, url)
    assert proxy.count("PUT /test-bucket/up/big?") == 3
    proxy.forget()
    assert transfers.upload(path, url) == sha256
    assert [request.split()[0] for request in proxy.requests] == ["HEAD"]
    item = only(f"s3://{s3.bucket}/up")
    transfers.download(item, tmp_path / "back", sha256)
    assert (tmp_path / "back").read_bytes() == path.read_bytes()

    path.write_bytes(content(1, 20 * MIB))
    assert transfers.upload(path, url) != sha256
    assert only(f"s3://{s3.bucket}/up").etag != item.etag


def test_what_the_network_damages_is_not_taken(s3, proxy, tmp_path):
    (tmp_path / "a").write_bytes(b"to be damaged")
    proxy.change = lambda sent: sent.replace(b"to be damaged", b"to be DAMAGED")
    with pytest.raises(DataError, match="network/a"):
        transfers.upload(tmp_path / "a", f"s3://{s3.bucket}/network/a")
    assert transfers.find_objects(f"s3://{s3.bucket}/network") == []


@pytest.mark.parametrize(
    ("status", "code", "passes"),
    [
        (503, "SlowDown", True),
        (500, "InternalError", True),
        (400, "RequestTimeout", True),
        (501, "NotImplemented", False),
        (403, "AccessDenied", False),
    ],
)
def test_a_server_that_cannot_now_is_away(s3, proxy, tmp_path, status, code, passes):
    item = only(s3.put("busy/a", b"small"))
    (tmp_path / "new").write_bytes(b"new")
    calls = {
        "GET /test-bucket?": lambda: transfers.find_objects(f"s3://{s3.bucket}/busy"),
        "GET /test-bucket/busy/a": lambda: transfers.download(item, tmp_path / "a"),
        "PUT /test-bucket/busy/b": lambda: transfers.upload(tmp_path / "new", f"s3://{s3.bucket}/busy/b"),
    }
    for start, call in calls.items():
        proxy.refused = (start, status, code)
        with pytest.raises(DataError) as caught:
            call()
        assert isinstance(caught.value, UnavailableError) == passes, start
        assert proxy.count(start)
    proxy.refused = None
    transfers.download(item, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"small"


def test_an_upload_can_be_cancelled(s3, proxy, tmp_path):
    (tmp_path / "big").write_bytes(content(0, 20 * MIB))
    with pytest.raises(DataError, match="cancelled"):
        transfers.upload(tmp_path / "big", f"s3://{s3.bucket}/cancel/big", lambda: True)
    assert transfers.find_objects(f"s3://{s3.bucket}/cancel") == []


def test_a_model_is_imported_again_without_what_did_not_change(s3, proxy, tmp_path):
    weights = "model/unet/x.safetensors"
    s3.put(weights, content(0))
    s3.put("model/unet/config.json", b"{}")
    url = f"s3://{s3.bucket}/model"
    s3.put("model/model_index.json", b"{}")

    import_model(url, tmp_path / "first")
    assert proxy.received > 8 * MIB
    proxy.forget()
    s3.put("model/unet/config.json", b'{"changed": true}')
    import_model(url, tmp_path / "second")
    assert [path for path in proxy.requests if "config.json" in path or "safetensors" in path] == [
        "GET /test-bucket/model/unet/config.json"
    ]
    assert (tmp_path / "second/unet/x.safetensors").read_bytes() == content(0)
    assert (tmp_path / "second/unet/config.json").read_bytes() == b'{"changed": true}'
    assert (tmp_path / "first/unet/config.json").read_bytes() == b"{}"

    proxy.forget()
    with (tmp_path / "second/unet/x.safetensors").open("r+b") as file:  # also damages the local copy
        file.write(b"edited")
    import_model(url, tmp_path / "third")
    assert (tmp_path / "third/unet/x.safetensors").read_bytes() == content(0)


def test_images_are_transferred_once(s3, proxy):
    for seed in range(3):
        url = s3.put(f"once/{seed}.png", png(seed))
    settings = PrepareSettings(resolution=16)
    first = prepare(url, settings)
    assert proxy.count("GET /test-bucket/once/") == 3
    proxy.forget()
    assert prepare(url, settings).digest == first.digest
    assert proxy.count("GET /test-bucket/once/") == 0
    s3.put("once/1.png", png(9))
    changed = prepare(url, settings)
    assert proxy.count("GET /test-bucket/once/") == 1
    assert [a.sha256 == b.sha256 for a, b in zip(first.records, changed.records, strict=True)] == [1, 0, 1]
    shutil.rmtree(transfers.CACHE)
    assert prepare(url, settings).digest == changed.digest
