"""Training states: whole or absent, never pickled, damage passed over."""

import json
import re
import threading

import pytest
import torch

from domainstudio.errors import CheckpointError
from domainstudio.storage import checkpoint
from domainstudio.training.resuming import check_fits
from domainstudio.training.saving import StateWriter


def state():
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "history": [{"step": 1, "total": 0.1}], "flag": None}


def latest(folder):
    found = checkpoint.latest(folder)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ema": {"step": 0.5, "decay": 1}}, "ema.step is a number, expected a whole number"),
        ({"more": {}}, "more is missing or unknown"),
        ({"scaler": ...}, "scaler is missing or unknown"),
        ({"ema": {"step": 4}}, "ema: decay is missing or unknown"),
    ],
)
def test_a_state_of_another_form_does_not_fit(change, reason):
    parts = {"ema": {"step": 4, "decay": 0.9}}
    state = {"history": [], "scaler": {}, "ema": {"step": 2, "decay": 1}}
    check_fits(state, parts, {"history", "scaler"})
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        changed = {name: value for name, value in {**state, **change}.items() if value is not ...}
        check_fits(changed, parts, {"history", "scaler"})


def test_round_trip_keeps_types_keys_and_bits_and_pickles_nothing(tmp_path):
    before = state()
    folder = checkpoint.save(tmp_path, 5, before)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert json.loads((folder / "state.json").read_text())["step"] == 5
    step, after = latest(tmp_path)
    assert step == 5
    assert after["history"] == before["history"]
    assert after["flag"] is None
    moments = after["optimizer"]["state"][0]  # integer keys stay integers
    for name, value in before["optimizer"]["state"][0].items():
        assert torch.equal(moments[name], value)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.randn(3))])
    optimizer.load_state_dict(after["optimizer"])


def test_only_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000002", "step-0000003"]


def test_a_half_written_state_is_not_seen_and_without_a_folder_none(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    checkpoint.save(tmp_path, 1, state())
    (tmp_path / ".step-0000002.partial").mkdir()
    assert latest(tmp_path)[0] == 1


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_damaged_state_is_passed_over_by_name(tmp_path, name, caplog):
    checkpoint.save(tmp_path, 1, state())
    damaged = checkpoint.save(tmp_path, 2, state()) / name
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert latest(tmp_path)[0] == 1
    assert "step-0000002 is damaged" in caplog.text


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_one_flipped_bit_anywhere_is_noticed(tmp_path, name, caplog):
    content = {"weights": torch.randn(64), "history": [{"step": 1, "total": 0.1}], "flag": None}
    checkpoint.save(tmp_path, 1, content)
    path = checkpoint.save(tmp_path, 2, content) / name
    whole = path.read_bytes()
    for place in range(0, len(whole), 23):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        caplog.clear()
        assert latest(tmp_path)[0] == 1, f"bit {place % 8} of byte {place}"
        assert "step-0000002 is damaged" in caplog.text


def test_a_state_that_does_not_fit_is_passed_over_by_name(tmp_path, caplog):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"history": [step]})

    def check(step, state):
        if state["history"] == [2]:
            raise CheckpointError("history: 2 is unknown")

    assert checkpoint.latest(tmp_path, check) == (1, {"history": [1]})
    assert "step-0000002 is damaged (history: 2 is unknown" in caplog.text


def test_a_damaged_state_goes_when_the_next_whole_one_is_there(tmp_path):
    for step in (1, 2, 9):
        checkpoint.save(tmp_path, step, state())
    checkpoint.save(tmp_path, 3, state())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000002", "step-0000003"]


def test_states_of_earlier_versions_are_read(tmp_path, caplog):
    path = checkpoint.save(tmp_path, 4, {"weights": torch.ones(2)}) / "state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"format": 1, "step": 4, "tree": content["tree"]}))
    assert torch.equal(latest(tmp_path)[1]["weights"], torch.ones(2))
    path.write_text(json.dumps({"format": 2, "step": 4, "tree": content["tree"]}))
    assert checkpoint.latest(tmp_path) is None
    assert "it lacks 'sha256'" in caplog.text


def test_the_key_depends_on_parameters_and_inputs_only():
    key = checkpoint.run_key({"a": 1, "b": 2}, {"source": "x"})
    assert key == checkpoint.run_key({"b": 2, "a": 1}, {"source": "x"})
    assert key != checkpoint.run_key({"a": 1, "b": 3}, {"source": "x"})
    assert key != checkpoint.run_key({"a": 1, "b": 2}, {"source": "y"})


def test_a_state_is_written_beside_what_changes_it(tmp_path, monkeypatch):
    disk, write = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *arguments: disk.wait(60) and write(*arguments))
    writer, weights, history = StateWriter(tmp_path), torch.zeros(3), [1]
    writer.write(1, {"weights": weights, "history": history})
    weights += 1
    history.append(2)
    assert writer.durable(wait=False) == 0 and not list(tmp_path.iterdir())
    disk.set()
    assert writer.durable(wait=True) == 1
    step, state = latest(tmp_path)
    assert (step, state["history"]) == (1, [1]) and not state["weights"].any()

    monkeypatch.setattr(checkpoint, "write", lambda *_: (tmp_path / "full/disk").touch())
    writer.write(2, {"weights": weights})
    with pytest.raises(FileNotFoundError):
        writer.write(3, {"weights": weights})
    assert writer.durable(wait=True) == 1
