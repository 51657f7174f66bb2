"""What a stage prints, as the flow's log shows it; and the summary at the end."""

import base64
import io
import json
import sys
from collections import deque
from pathlib import Path

import pytest
from PIL import Image

from domainstudio.errors import DataError
from domainstudio.storage.s3 import UnreachableError
from domainstudio.tracking.server import TrackingError, TrackingUnavailableError
from flows.run.commands import Commands, StageFailedError, _stream, environment, patiently
from flows.run.summary import Row, markdown, picture
from stages import cli


def streamed(output: bytes) -> tuple[list[str], list[str]]:
    logged: list[str] = []
    tail: deque[str] = deque()
    _stream(io.BytesIO(output), logged.append, tail)
    return logged, list(tail)


def test_a_progress_bar_does_not_flood_the_log() -> None:
    bar = b"".join(b"\r%d%%|#" % percent for percent in range(100)) + b"\r100%|##########\n"
    logged, tail = streamed(b"start\n" + bar + b"end\n")
    assert logged == ["start", "0%|#", "100%|##########", "end"]
    assert tail == ["start", "100%|##########", "end"]


def test_colours_and_broken_text_are_no_problem() -> None:
    assert streamed(b"\x1b[31mred\x1b[0m\r\n\xff!\n")[0] == ["red", "\ufffd!"]


def test_dvcs_hints_for_a_terminal_are_left_out() -> None:
    output = b"Running stage 'a':\nTo track the changes with git, run:\n\n\tgit add dvc.lock\nloss 0.5\n"
    assert streamed(output)[0] == ["Running stage 'a':", "loss 0.5"]


def test_the_stages_find_this_python_first() -> None:
    import sys

    path = environment({"PATH": "/usr/bin:/bin", "DVC_NO_ANALYTICS": "0"})
    assert path["PATH"].split(":") == [str(Path(sys.executable).parent), "/usr/bin", "/bin"]
    assert path["DVC_NO_ANALYTICS"] == "0"


def test_a_refusal_is_not_worth_a_retry() -> None:
    assert not StageFailedError("a", 2, ["ConfigError: x"], 1.0).retryable
    assert StageFailedError("a", 137, ["Killed"], 1.0).retryable


AWAY = ["sys.exit(75)", "sys.exit('ERROR: unexpected error - Could not connect to the endpoint URL')"]


@pytest.mark.parametrize("away", AWAY)
def test_a_server_that_is_away_is_waited_for(
    away: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.run.commands.DELAYS", (0.01, 0.02, 0.03))
    code = f"import sys; tries = open('tries', 'a'); tries.write('x'); {away} if tries.tell() < 3 else 0"
    lines: list[str] = []
    Commands(tmp_path).run([sys.executable, "-c", code], lines.append, "a")
    waits = [line.rpartition(" in ")[2] for line in lines if line.startswith("a waits: ")]
    assert waits == ["0.01 s", "0.02 s"]


def test_a_server_that_stays_away_fails_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.run.commands.DELAYS", (0.01,))
    for status, waits in ((75, 1), (1, 0)):
        lines: list[str] = []
        with pytest.raises(StageFailedError, match=f"exit status {status}") as caught:
            Commands(tmp_path).run([sys.executable, "-c", f"raise SystemExit({status})"], lines.append, "a")
        assert caught.value.retryable and len(lines) == waits


def test_a_call_waits_for_its_server() -> None:
    answers = iter([UnreachableError("away"), UnreachableError("away"), None, UnreachableError("gone")])

    def call() -> str:
        if (error := next(answers)) is not None:
            raise error
        return "here"

    lines: list[str] = []
    assert patiently(call, lines.append, "a", (0.0, 0.0, 0.0)) == "here"
    assert lines == ["a waits: away; next attempt in 0 s"] * 2
    with pytest.raises(UnreachableError, match="gone"):
        patiently(call, lines.append, "a", ())


ERRORS = [(UnreachableError(), 75), (TrackingUnavailableError(), 75), (TrackingError(), 2), (DataError(), 2)]


def test_the_status_of_a_process_is_seen_through_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.run.commands.DELAYS", ())
    (tmp_path / "away.py").write_text("raise SystemExit(75)")
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    with pytest.raises(StageFailedError) as caught:
        Commands(tmp_path).run([sys.executable, "-m", *launcher, "away.py"], lambda _: None, "a")
    assert caught.value.status == 75


@pytest.mark.parametrize(("error", "status"), ERRORS)
def test_a_stage_tells_a_server_that_is_away_from_a_mistake(error: Exception, status: int) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == status


def test_the_summary_lists_metrics_side_by_side(tmp_path: Path) -> None:
    for name, samples in {"a": {"kid": 0.01234567, "recall": 1}, "b": {"recall": None}}.items():
        (tmp_path / "evaluation" / name).mkdir(parents=True)
        (tmp_path / "evaluation" / name / "metrics.json").write_text(json.dumps({"samples": samples}))
    (tmp_path / "evaluation" / "c").mkdir()
    (tmp_path / "evaluation" / "c" / "metrics.json").write_text("{")
    text = markdown(tmp_path, [Row("finetune@a", "run", 1.25), Row("report", "not run")])
    lines = text.splitlines()
    assert "| adaptation | kid | recall |" in lines
    assert "| a | 0.01235 | 1 |" in lines
    assert "| b | – | – |" in lines
    assert "| c | – | – |" in lines
    assert "| finetune@a | run | 1.2 |" in lines
    assert "| report | not run | – |" in lines
    assert "report.html" not in text
    (tmp_path / "report.html").write_text("")
    assert (tmp_path / "report.html").as_uri() in markdown(tmp_path, [])
    assert "report.html" not in markdown(tmp_path, [], temporary=True)


def test_a_picture_is_its_own_address(tmp_path: Path) -> None:
    Image.new("RGBA", (1280, 320), "red").save(tmp_path / "grid.png")
    kind, _, data = picture(tmp_path / "grid.png").partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (640, 160) and image.getpixel((9, 9))[0] > 250
