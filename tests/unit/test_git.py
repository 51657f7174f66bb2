"""The commit of a result, and whether the code differed from it."""

import subprocess

from domainstudio import git
from domainstudio.redaction import redact


def run(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(("git", *identity, *arguments), cwd=folder, check=True, capture_output=True)


def test_code_counts_but_not_what_the_pipeline_writes(tmp_path):
    def dirty() -> bool:
        state = git.state(tmp_path)
        assert state is not None
        assert len(state.commit) == 40
        return state.dirty

    assert git.state(tmp_path) is None
    run(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "dvc.lock").write_text("1")
    run(tmp_path, "add", ".")
    run(tmp_path, "commit", "-qm", "first")
    (tmp_path / "dvc.lock").write_text("2")
    (tmp_path / "report.html").write_text("new")
    assert not dirty()
    (tmp_path / "code.py").write_text("2")
    assert dirty()
    run(tmp_path, "commit", "-qam", "second")
    assert not dirty()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/new.py").write_text("3")
    assert dirty()


def test_passwords_are_taken_out_of_addresses():
    text = "postgresql://me:secret@host/db or s3://bucket/a@b"
    assert redact(text) == "postgresql://***@host/db or s3://bucket/a@b"
    assert redact("https://me:secret@host/", "") == "https://host/"
