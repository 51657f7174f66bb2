"""The stage `prepare`, and what stage scripts share."""

import shutil
import sys

import pytest
import yaml

from domainstudio.data import ImageSet
from domainstudio.errors import DataError
from stages import prepare
from stages.cli import run
from tests.project import params, write_images

TARGET = {"shots": "images", "number": 4, "seed": 7, "domain": "images"}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project with twelve images, which is the current folder."""
    write_images(tmp_path / "images", 12)
    write_params(tmp_path, TARGET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_params(project, target):
    (project / "params.yaml").write_text(yaml.safe_dump(params() | {"targets": {"ink": target}}))


@pytest.fixture
def stage(monkeypatch, capsys):
    """Run the stage with arguments; return its exit status, and what it printed to stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
        with pytest.raises(SystemExit) as stop:
            run(prepare.main)
            sys.exit()
        return stop.value.code or 0, *capsys.readouterr()

    return call


def saved():
    return [ImageSet.load(f"data/targets/ink/{name}") for name in ("shots", "domain")]


def test_source_and_target(project, stage):
    assert stage("source", "noto") == (0, "data/sources/noto: 12 images from images\n", "")
    out = "data/targets/ink/shots: 4 images from images\ndata/targets/ink/domain: 12 images from images\n"
    assert stage("target", "ink") == (0, out, "")
    shots, domain = saved()
    assert domain.digest == ImageSet.load("data/sources/noto").digest and domain.resolution == 8
    assert shots.digest == domain.draw(4, 7).digest
    assert [path.name for path in (project / "data/targets").iterdir()] == ["ink"]


def test_shots_may_have_an_origin_of_their_own(project, stage):
    (project / "few").mkdir()
    for name in ("03.png", "05.png"):
        shutil.copy(project / "images" / name, project / "few")
    write_params(project, TARGET | {"shots": "few", "number": None})
    assert stage("target", "ink")[0] == 0
    shots, domain = saved()
    assert (shots.images == domain.images[[3, 5]]).all() and shots.origin == "few"


def test_an_error_is_one_clean_message_and_loses_nothing(project, stage):
    assert stage("target", "ink")[0] == 0
    before = saved()[0].digest
    (project / "images/zz.png").write_bytes(b"x")
    status, out, err = stage("target", "ink")
    assert (status, out) == (2, "")
    assert err.startswith("error: images: 1 of 13 images cannot be used:\n  images/zz.png: not a readable")
    assert "Traceback" not in err
    assert saved()[0].digest == before
    assert [path.name for path in (project / "data/targets").iterdir()] == ["ink"]


def test_wrong_names_are_named(stage):
    assert stage("target", "inc") == (2, "", "error: targets has no 'inc'; there are ['ink']\n")
    for arguments in (["target"], ["source", "ink"], ["sauce"], []):
        assert stage(*arguments)[0] == 2


def test_run_reports_expected_errors_and_lets_defects_through(capsys):
    def expected():
        raise DataError("no images")

    with pytest.raises(SystemExit) as caught:
        run(expected)
    assert caught.value.code == 2 and capsys.readouterr().err == "error: no images\n"
    with pytest.raises(ZeroDivisionError):
        run(lambda: print(1 / 0))
