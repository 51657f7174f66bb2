"""What a disk refuses is one line with path, reason and free space; other errors stay what they are."""

import errno
import os
import re
import sqlite3
from pathlib import Path

import pytest
import torch

from domainstudio.errors import DataError, DiskError
from domainstudio.storage import checkpoint
from domainstudio.storage.disk import number_of, writing
from domainstudio.storage.files import output_file, output_folder
from stages.cli import run


@pytest.fixture
def small_files():
    """Let this process write at most 2,000 bytes of a file, as a full disk would."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_state_that_does_not_fit_is_told_and_the_one_before_stays(tmp_path, small_files):
    checkpoint.save(tmp_path, 1, {"weights": torch.ones(8)})
    with pytest.raises(DiskError, match=r"step-0000002 cannot.*too large \(.* free of .* on /.*Make ro"):
        checkpoint.save(tmp_path, 2, {"weights": torch.ones(1000)})
    found = checkpoint.latest(tmp_path)
    assert found is not None and found[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


def test_errors_of_other_files_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), output_file(tmp_path / "out"):
        Path(tmp_path, "missing").read_text()
    with pytest.raises(DataError), output_folder(tmp_path / "out"):
        raise DataError("bad")
    with pytest.raises(DiskError, match=r"out\.txt"), output_file(tmp_path / "out.txt") as partial:
        partial.mkdir()
        partial.read_bytes()


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (sqlite3.OperationalError("database or disk is full"), errno.ENOSPC),
        (OSError([("a", "b", "[Errno 30] Read-only file system: 'b'")]), errno.EROFS),
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), None),
        (ValueError("x"), None),
    ],
)
def test_the_number_of_an_error(error, number):
    assert number_of(error) == number


def test_a_state_that_cannot_be_read_is_not_given_up(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {})

    def stale(path, **options):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(DiskError, match=r"Stale file handle.*Mount it again"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            OSError(errno.ENOSPC, "x", "out/a"),
            74,
            r"out/a cannot be .*: No space left .* free of .*",
        ),
        (DataError("https://me:secret@host/x is no origin"), 2, r"https://\*\*\*@host/x is no origin"),
    ],
)
def test_a_stage_ends_with_one_line_and_its_status(error, status, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == status
    assert re.fullmatch(rf"error: {said}\n", capsys.readouterr().err)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EISDIR, errno.EMFILE])
def test_what_says_nothing_of_a_disk_is_a_defect(number):
    def main():
        raise OSError(number, "x", "out/a")

    with pytest.raises(OSError, match="out/a"):
        run(main)


def test_writing_names_the_path(tmp_path):
    with (
        pytest.raises(DiskError, match=f"{tmp_path}/a cannot be .*: Input/output error"),
        writing(tmp_path / "a"),
    ):
        raise OSError(errno.EIO, "x")
