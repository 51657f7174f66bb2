"""What a stage prints, as the flow's log shows it; and the summary at the end."""

import base64
import io
import json
from collections import deque
from pathlib import Path

from PIL import Image

from flows.commands import StageFailedError, _stream, environment
from flows.summary import Row, markdown, picture


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
