"""What a stage prints, as the flow's log shows it; and the summary at the end."""

import base64
import io
import json
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domainstudio.errors import DataError
from domainstudio.storage.s3 import UnreachableError
from domainstudio.tracking.server import TrackingError, TrackingUnavailableError
from flows.run.commands import Commands, StageFailedError, _stream, environment, patiently
from flows.run.summary import Row, markdown, picture
from stages import cli

BAR = b"".join(b"\r%d%%|#" % percent for percent in range(100)) + b"\r100%|##########\n"
DVC_HINTS = b"WARNING: stage: 'p' is frozen. It\nmd5: 55f30d0d64934618f039bf150f7434bf.dir\n"
DVC_HINTS += b"Running stage 'a':\nTo track the changes with git, run:\n\n\tgit add dvc.lock\nloss 0.5\n"


@pytest.mark.parametrize(
    ("output", "lines"),
    [
        pytest.param(b"start\n" + BAR + b"end\n", ["start", "0%|#", "100%|##########", "end"], id="a bar"),
        pytest.param(b"\x1b[31mred\x1b[0m\r\n\xff!\n", ["red", "\ufffd!"], id="colours and broken text"),
        pytest.param(DVC_HINTS, ["Running stage 'a':", "loss 0.5"], id="hints for a terminal"),
    ],
)
def test_what_is_no_text_for_a_log_is_left_out(output, lines):
    logged: list[str] = []
    tail: deque[str] = deque()
    _stream(io.BytesIO(output), logged.append, tail)
    assert logged == lines
    assert [*tail] == [line for line in lines if line != "0%|#"]  # which the bar's end replaces


def test_the_stages_find_this_python_first():
    path = environment({"PATH": "/usr/bin:/bin", "DVC_NO_ANALYTICS": "0"})
    assert path["PATH"].split(":") == [str(Path(sys.executable).parent), "/usr/bin", "/bin"]
    assert path["DVC_NO_ANALYTICS"] == "0"


def test_a_refusal_is_not_worth_a_retry():
    assert not StageFailedError("a", 2, ["ConfigError: x"], 1.0).retryable
    assert StageFailedError("a", 137, ["Killed"], 1.0).retryable


def waits(lines):
    """Return the waits that were logged."""
    return [line.rpartition(" in ")[2] for line in lines if line.startswith("a waits: ")]


AWAY = ["sys.exit(75)", "sys.exit('ERROR: unexpected error - Could not connect to the endpoint URL')"]


@pytest.mark.parametrize("away", AWAY)
def test_a_server_that_is_away_is_waited_for(away, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.run.commands.DELAYS", (0.01, 0.02, 0.03))
    code = f"import sys; tries = open('tries', 'a'); tries.write('x'); {away} if tries.tell() < 3 else 0"
    lines: list[str] = []
    Commands(tmp_path).run([sys.executable, "-c", code], lines.append, "a")
    assert waits(lines) == ["0.01 s", "0.02 s"]


@pytest.mark.parametrize(("status", "waited"), [(75, ["0.01 s"]), (1, [])])
def test_a_server_that_stays_away_fails_the_stage(status, waited, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.run.commands.DELAYS", (0.01,))
    lines: list[str] = []
    with pytest.raises(StageFailedError, match=f"exit status {status}") as caught:
        Commands(tmp_path).run([sys.executable, "-c", f"raise SystemExit({status})"], lines.append, "a")
    assert caught.value.retryable and waits(lines) == waited and len(lines) == len(waited)


def test_a_call_waits_for_its_server():
    answers = iter([UnreachableError("away"), UnreachableError("away"), None, UnreachableError("gone")])

    def call():
        if (error := next(answers)) is not None:
            raise error
        return "here"

    lines: list[str] = []
    assert patiently(call, lines.append, "a", (0.0, 0.0, 0.0)) == "here"
    assert lines == ["a waits: away; next attempt in 0 s"] * 2
    with pytest.raises(UnreachableError, match="gone"):
        patiently(call, lines.append, "a", ())


def test_the_status_of_a_process_is_seen_through_its_launcher(tmp_path, monkeypatch):
    monkeypatch.setattr("flows.run.commands.DELAYS", ())
    (tmp_path / "away.py").write_text("raise SystemExit(75)")
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    with pytest.raises(StageFailedError) as caught:
        Commands(tmp_path).run([sys.executable, "-m", *launcher, "away.py"], lambda _: None, "a")
    assert caught.value.status == 75


ERRORS = [(UnreachableError(), 75), (TrackingUnavailableError(), 75), (TrackingError(), 2), (DataError(), 2)]


@pytest.mark.parametrize(("error", "status"), ERRORS)
def test_a_stage_tells_a_server_that_is_away_from_a_mistake(error, status):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == status


def test_the_summary_lists_metrics_side_by_side(tmp_path):
    for name, samples in {"a": {"kid": 0.01234567, "recall": 1}, "b": {"recall": None}}.items():
        (tmp_path / "evaluation" / name).mkdir(parents=True)
        (tmp_path / "evaluation" / name / "metrics.json").write_text(json.dumps({"samples": samples}))
    (tmp_path / "evaluation" / "c").mkdir()
    (tmp_path / "evaluation" / "c" / "metrics.json").write_text("{")
    text = markdown(tmp_path, [Row("finetune@a", "run", 1.25), Row("report", "not run")])
    expected = ["| adaptation | kid | recall |", "| a | 0.01235 | 1 |", "| b | – | – |", "| c | – | – |"]
    assert {*expected, "| finetune@a | run | 1.2 |", "| report | not run | – |"} <= {*text.splitlines()}
    assert "report.html" not in text
    (tmp_path / "report.html").write_text("")
    whole, one = Row("report", "run"), Row("adaptation_report@a", "run")
    assert (tmp_path / "report.html").as_uri() in markdown(tmp_path, [whole, one])
    assert "report.html" not in markdown(tmp_path, [whole], temporary=True)
    assert "report.html" not in markdown(tmp_path, [one])


def test_a_picture_becomes_a_data_url(tmp_path):
    Image.new("RGBA", (1280, 320), "red").save(tmp_path / "grid.png")
    kind, _, data = picture(tmp_path / "grid.png").partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (160, 640, 3) and pixels[9, 9, 0] > 250
