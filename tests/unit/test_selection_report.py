"""What the report and the page of a folder of LoRA files show of a choice."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from domainstudio.config import ChooseSettings
from domainstudio.data import grid
from domainstudio.errors import DataError
from domainstudio.report.selection import choice, page
from domainstudio.selection.figures import Curve
from domainstudio.selection.record import FILE, Measured, Selection
from domainstudio.selection.rule import choose
from tests.models import tiny_images

RULE = ChooseSettings()


@pytest.fixture
def folder(tmp_path):
    """A record of three candidates, of which the first has nothing in the domain and the last copies."""
    figures = {100: (0.2, np.nan, 0.0, 0.0), 200: (0.7, 0.8, 0.0, 1.0), 300: (0.9, 0.7, 0.5, 1.0)}
    curves = {step: Curve(*(np.full(9, value) for value in values)) for step, values in figures.items()}
    found = choose(curves, RULE)
    record = Selection(
        chosen=found.step,
        reason=found.reason,
        why="because",
        warning=None,
        rule=RULE,
        features="averages",
        copies_below=0.5,
        false_alarms=0.1,
        probe_accuracy=0.9,
        candidates=tuple(
            Measured.of(step, f"step-{step:07d}", curve, found) for step, curve in curves.items()
        ),
        left_out={"bad": "bad.safetensors is damaged"},
    )
    (tmp_path / FILE).write_text(record.model_dump_json())
    for name in ("source", *(each.name for each in record.candidates)):
        grid(tiny_images(), 10).save(tmp_path / f"{name}.png")
    return tmp_path


def test_the_chosen_candidate_is_marked_and_undefined_figures_are_left_out(folder):
    shown = choice(folder)
    assert shown is not None
    assert [(row.title, row.chosen) for row in shown.rows] == [
        ("source model", False),
        ("step 100", False),
        ("step 200", True),
        ("step 300", False),
    ]
    assert "diversity" not in shown.rows[1].detail
    panels = {name: str(panel) for name, _, panel in shown.panels}
    assert panels["diversity"].count("<circle") == 2
    assert panels["copies"].count("<circle") == 3
    assert ['class="threshold"' in panel for panel in panels.values()] == [False, False, True, False]
    assert "Chosen: 200" in panels["fidelity"]


def test_the_page_holds_its_pictures_and_names_what_was_left_out(folder):
    html = page(folder, "ink & <paper>")
    assert "ink &amp; &lt;paper&gt;" in html
    assert html.count('src="data:image/png') == 4
    assert "Left out: bad.safetensors is damaged." in html
    assert "http" not in html.replace('http-equiv="Content', "")


def test_a_record_is_read_as_it_was_written_and_a_damaged_one_is_named(folder, tmp_path):
    found = Selection.read(folder)
    assert found is not None
    assert found.best.step == 200
    assert Selection.read(tmp_path / "none") is None is choice(tmp_path / "none")
    (folder / FILE).write_text("{")
    readers: tuple[Callable[[Path], object], ...] = (Selection.read, choice)
    for read in readers:
        with pytest.raises(DataError, match=r"selection\.json cannot be understood"):
            read(folder)
