"""The stage `prepare`, and what stage scripts share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from domainstudio.data import ImageSet
from domainstudio.errors import DataError
from stages.cli import run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for seed in range(12):
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"images/{seed:02}.png")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["prepare"]["resolution"] = 16
    params["pretrain"]["images"] = "images"
    params["targets"] = {"ink": {"shots": "images", "number": 4, "seed": 7, "domain": "images"}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return tmp_path


def stage(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stages.prepare", *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_source_and_target(project: Path) -> None:
    done = stage(project, "source")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "data/source: 12 images from images\n"
    done = stage(project, "target", "ink")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "data/targets/ink/shots: 4 images from images\ndata/targets/ink/domain: 12 images from images\n"
    )
    source = ImageSet.load(project / "data/source")
    shots, domain = (ImageSet.load(project / "data/targets/ink" / name) for name in ("shots", "domain"))
    assert domain.digest == source.digest and domain.resolution == 16
    assert shots.digest == domain.draw(4, 7).digest
    assert sorted(path.name for path in (project / "data/targets").iterdir()) == ["ink"]


def test_shots_may_have_an_origin_of_their_own(project: Path) -> None:
    (project / "few").mkdir()
    for name in ("03.png", "05.png"):
        (project / "few" / name).write_bytes((project / "images" / name).read_bytes())
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["targets"]["ink"] |= {"shots": "few", "number": None}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    assert stage(project, "target", "ink").returncode == 0
    shots = ImageSet.load(project / "data/targets/ink/shots")
    domain = ImageSet.load(project / "data/targets/ink/domain")
    assert (shots.images == domain.images[[3, 5]]).all() and shots.origin == "few"


def test_an_error_is_one_clean_message_and_loses_nothing(project: Path) -> None:
    assert stage(project, "target", "ink").returncode == 0
    before = ImageSet.load(project / "data/targets/ink/shots").digest
    (project / "images/zz.png").write_bytes(b"x")
    done = stage(project, "target", "ink")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: images: 1 of 13 images cannot be used:\n  images/zz.png: not a readable"
    )
    assert "Traceback" not in done.stderr
    assert ImageSet.load(project / "data/targets/ink/shots").digest == before
    assert sorted(path.name for path in (project / "data/targets").iterdir()) == ["ink"]


def test_wrong_names_are_named(project: Path) -> None:
    done = stage(project, "target", "inc")
    assert (done.returncode, done.stderr) == (2, "error: targets has no 'inc'; there are ['ink']\n")
    for arguments in (["target"], ["source", "ink"], ["sauce"], []):
        assert stage(project, *arguments).returncode == 2


def test_run_reports_expected_errors_and_lets_defects_through(capsys: pytest.CaptureFixture[str]) -> None:
    def expected() -> None:
        raise DataError("no images")

    with pytest.raises(SystemExit) as caught:
        run(expected)
    assert caught.value.code == 2 and capsys.readouterr().err == "error: no images\n"
    with pytest.raises(ZeroDivisionError):
        run(lambda: print(1 / 0))
