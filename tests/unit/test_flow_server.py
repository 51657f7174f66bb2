"""Whether a Prefect server is named, which decides how a run with nothing to do is shown."""

import os

import pytest

from flows.cli import may_have_server

NOTHING = "nothing"
PROFILES = 'active = "{}"\n[profiles.team]\nPREFECT_API_URL = "http://there/api"\n[profiles.alone]\n'


@pytest.mark.parametrize(
    ("expected", "file", "content"),
    [
        (False, NOTHING, ""),
        (False, "home/profiles.toml", PROFILES.format("alone")),
        (False, "home/profiles.toml", PROFILES.format("gone")),
        (False, "pyproject.toml", '[project]\ndependencies = ["prefect"]'),
        (False, ".env", "AWS_PROFILE=x"),
        (True, "home/profiles.toml", PROFILES.format("team")),
        (True, "home/profiles.toml", "["),
        (True, "pyproject.toml", "[tool.prefect.api]"),
        (True, "prefect.toml", ""),
        (True, ".env", "PREFECT_API_URL=http://there/api"),
    ],
)
def test_a_server_may_be_named_in_a_file(tmp_path, monkeypatch, expected, file, content):
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / file).write_text(content)
    assert may_have_server() is expected
    monkeypatch.setenv("PREFECT_API_URL", "http://there/api")
    assert may_have_server()
