"""What is a trial, and what a server lacks: only committed settings that name a model release anything."""

from pathlib import Path

import pytest
import yaml

from domainstudio import config
from domainstudio.registry import releases
from tests.project import params, run

NAME = "ink-finetune"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in (releases.EXPERIMENT_VARIABLE, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    write(params())
    run(tmp_path, "git", "init", "-q")
    commit(tmp_path)
    return tmp_path


def write(values):
    Path("params.yaml").write_text(yaml.safe_dump(values))


def commit(root):
    run(root, "git", "add", ".")
    run(root, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "settings")


def why(name=NAME):
    return releases.trial(name, config.load())


def test_only_committed_settings_that_name_a_model_are_released(root, monkeypatch):
    assert why() is None
    values = params()
    values["finetune"]["seed"] = 7
    write(values)
    assert why() == "params.yaml has changes that are not committed"
    commit(root)
    assert why() is None
    monkeypatch.setenv(releases.EXPERIMENT_VARIABLE, "puffy-lute")
    assert why() == "puffy-lute is an experiment of DVC"
    monkeypatch.delenv(releases.EXPERIMENT_VARIABLE)
    del values["registry"]["models"][NAME]
    write(values)
    commit(root)
    assert why() == "registry.models of params.yaml does not name it"
    assert why("ink-domainstudio") is None


def test_what_this_server_lacks_is_registered_again_but_no_trial(root):
    both = {"key": "k", "measured": "m"}
    releases.write(NAME, {"model": f"domainstudio-{NAME}", "digest": "d", **both})
    releases.write("ink-domainstudio", {"model": None, **both})  # it was a trial, and is committed now
    settings = config.load()
    assert all(
        releases.withdraw_lacking(name, settings) for name in (NAME, "ink-domainstudio")
    )  # no database
    assert not any((root / "registry").iterdir())
    releases.write(NAME, {"model": None, **both})
    values = params()
    values["finetune"]["seed"] = 7
    write(values)
    assert not releases.withdraw_lacking(NAME, config.load())
    assert (releases.read(NAME) or {"model": "gone"})["model"] is None
