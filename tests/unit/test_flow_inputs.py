"""What a run in a fresh clone needs: it is named before anything starts, with what brings it there."""

import re

import pytest

from domainstudio.errors import ConfigError
from flows.run import graph, inputs
from tests.project import start_repository

DVC_YAML = """
stages:
  prepare:
    cmd: cp -r images data
    deps: [images, here.py, subjects.txt]
    outs: [data]
  finetune:
    cmd: cp -r data model
    deps: [data/shots, model.safetensors, "s3://nowhere/x"]
    outs: [model]
"""


@pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")
def test_inputs_that_a_clone_lacks_are_named_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "model.safetensors.dvc").write_text(
        "outs:\n- path: model.safetensors\n  md5: 0123456789abcdef0123456789abcdef\n"
    )
    (tmp_path / "here.py").touch()
    start_repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    stages = graph.select(graph.read())
    assert stages["finetune"].inputs == (
        "model.safetensors",
        "s3://nowhere/x",
    )  # data/shots is in what `prepare` makes
    with pytest.raises(ConfigError) as caught:
        inputs.check(stages.values(), tmp_path)
    first, *lines = str(caught.value).splitlines()
    assert first == "inputs cannot be had here:"
    expected = (
        r"  s3://.*",
        r"  images is neither in git nor in DVC: run `dvc add images && dvc push`, and commit images\.dvc .*",
        r"  subjects\.txt is neither .*",
        r"  model\.safetensors was never pushed to the DVC remote: run `dvc push` where it is",
    )
    assert len(lines) == len(expected)
    assert all(any(re.fullmatch(pattern, line) for line in lines) for pattern in expected)
    for name in ("images", "subjects.txt", "model.safetensors"):
        (tmp_path / name).touch()
    inputs.check([stages["prepare"]], tmp_path)
