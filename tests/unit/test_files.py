"""Files and folders are there whole or not at all, also after an exception or a kill."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from domainstudio.errors import DataError, DiskError
from domainstudio.storage.files import move_folder, output_file, output_folder, write_json, write_text


def test_a_text_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_text(path, "one")
    write_text(path, "two\r\n")
    assert path.read_bytes() == b"two\r\n"
    assert list(path.parent.iterdir()) == [path]


def test_after_an_exception_a_file_is_as_before(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), output_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_secret_file_is_its_owners_alone(tmp_path):
    write_text(tmp_path / "secret", "x", mode=0o600)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_an_output_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "out"
    with output_folder(out) as partial:
        (partial / "a").write_text("1")
        assert not out.exists()
    with pytest.raises(KeyboardInterrupt), output_folder(out) as partial:
        (partial / "a").write_text("2")
        raise KeyboardInterrupt
    assert (out / "a").read_text() == "1"
    with output_folder(out) as partial:
        (partial / "b").write_text("3")
    assert [path.name for path in out.iterdir()] == ["b"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_killed_exchange_is_mended(tmp_path):
    (tmp_path / ".out.previous").mkdir()
    (tmp_path / ".out.previous/a").write_text("1")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(DataError), output_folder(tmp_path / "out"):
        raise DataError("again")
    assert (tmp_path / "out/a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_synced_folder_may_hold_folders(tmp_path):
    with output_folder(tmp_path / "out", synced=True) as partial:
        (partial / "inner").mkdir()
        (partial / "inner/a").write_text("1")
    assert (tmp_path / "out/inner/a").read_text() == "1"


def test_a_folder_that_another_disk_refuses_is_not_half_there(tmp_path, monkeypatch):
    source, target = tmp_path / "drawn", tmp_path / "kept/samples"
    for folder, text in ((source, "new"), (target, "old")):
        folder.mkdir(parents=True)
        for name in "abc":
            (folder / name).write_text(text)

    def another_disk(old, new, **_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), old)

    copy = shutil.copyfile

    def full(old, new, **options):
        if Path(old).name != "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy(old, new, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", another_disk)
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(DiskError, match=r"kept/samples cannot be .*No space left"):
            move_folder(source, target)
    assert [path.read_text() for path in sorted(target.iterdir())] == ["old"] * 3
    assert len(list(source.iterdir())) == 3
    assert [path.name for path in target.parent.iterdir()] == ["samples"]

    move_folder(source, target)
    assert [path.read_text() for path in sorted(target.iterdir())] == ["new"] * 3
    assert not source.exists()
