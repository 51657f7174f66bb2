"""The note on which `finetune` depends, instead of what chooses among the states of a training."""

import json
import shutil
import sys

import pytest
import yaml

from stages import chooser
from tests.project import ROOT, params


@pytest.fixture
def note(tmp_path, monkeypatch):
    """Write the note of an adaptation, with states to choose from or without, and return it."""
    for name in ("dvc.yaml", "domainstudio", "stages"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["chooser", "ink-finetune"])

    def write(every, **choose):
        values = params()
        values["adaptations"]["ink-finetune"] = {**values["adaptations"]["ink-finetune"]}
        values["adaptations"]["ink-finetune"]["finetune"] = {"candidate_every": every}
        values["choose"] |= choose
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
        chooser.main()
        return json.loads((tmp_path / "training/ink-finetune/chooser.json").read_text())

    return write


def test_the_note_changes_with_what_chooses_only_where_a_state_is_chosen(note, tmp_path):
    def edit(path):
        (tmp_path / path).write_text((tmp_path / path).read_text() + "\n")

    last, best = note(0), note(2)
    assert last != best and best["choose"]["max_copies"] == 0.1
    for path in ("domainstudio/metrics/ridge.py", "domainstudio/selection/rule.py"):
        before = note(2)
        edit(path)
        assert note(0) == last and note(2) != before
    before = note(2)
    edit("domainstudio/metrics/frechet.py")  # which chooses nothing
    assert note(2) == before
    assert note(0, max_copies=0.2) == last and note(2, max_copies=0.2) != before
