"""The comparison along training: what it computes, and what it refuses."""

import json

import numpy as np
import pytest

from benchmarks import curves
from benchmarks.records import difference, find_baseline, read
from domainstudio.errors import DataError


def record(name, seed, step, frechet, intra, **other):
    measured = {"frechet_distance": frechet, "intra_distance": intra}
    return {"adaptation": name, "method": name, "seed": seed, "step": step, **measured, **other}


def straight(name, seed, offset, levels=(100.0, 60.0, 20.0)):
    # Intra distance is linear in the Fréchet distance, so interpolation is exact.
    return [record(name, seed, 10 * i + 10, x, 0.001 * x + offset) for i, x in enumerate(levels)]


@pytest.fixture
def recorded(tmp_path):
    """Return a function that writes records and reads them."""

    def write_and_read(records):
        (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
        return read([tmp_path / "r.jsonl"])

    return write_and_read


def test_difference_at_equal_frechet_distance_is_the_offset_whatever_the_steps(recorded):
    ours = straight("a", 0, 0.25, (90.0, 50.0, 30.0)) + straight("a", 1, 0.35, (80.0, 30.0))
    theirs = straight("b", 0, 0.2) + straight("b", 1, 0.2)
    found = difference(recorded(ours + theirs), "a", "b")
    assert found is not None
    assert found.seeds == (0, 1)
    assert found.means == pytest.approx([0.05, 0.15])
    assert np.isnan(found.by_seed[1][found.levels > 80.5]).all()
    assert np.isfinite(found.by_seed[0][found.levels > 80.5]).all()


def test_steps_after_the_best_are_left_out_and_curves_that_do_not_meet_have_no_difference(recorded):
    ours, theirs = [*straight("a", 0, 0.3), record("a", 0, 99, 70.0, -5.0)], straight("b", 0, 0.2)
    found = difference(recorded(ours + theirs), "a", "b")
    assert found is not None
    assert found.means == pytest.approx([0.1])
    apart = straight("a", 0, 0.3, (100.0, 90.0)) + straight("b", 0, 0.2, (50.0, 40.0))
    assert difference(recorded(apart), "a", "b") is None


def test_a_later_record_replaces_an_earlier_one(recorded):
    found = recorded([record("a", 0, 10, 50.0, 0.1), record("a", 0, 10, 40.0, 0.2)])
    assert [item.values["frechet_distance"] for item in found.measurements] == [40.0]


def test_table_has_mean_and_deviation_over_seeds(recorded):
    records = [record("a", seed, 10, value, None) for seed, value in enumerate((10.0, 20.0, 30.0))]
    text = curves.table(recorded([*records, {"reference": "domain", "kid": 0.5}]))
    assert "| a | 10 | 3 | 20.0 ± 10.0 |" in text
    assert "*domain*" in text


OTHER = record("b", 0, 1, 1, 1)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "no measurements"),
        ([{"reference": "domain"}], "no measurements"),
        ([{"adaptation": "a"}], "r.jsonl:1"),
        ([record("a", 0, 1, 1, 1, features="x"), OTHER | {"features": "y"}], "different features"),
        ([record("a", 0, 1, 1, 1, target="x"), {"reference": "domain", "target": "y"}], "different target"),
    ],
)
def test_records_that_do_not_compare_are_refused(recorded, records, words):
    with pytest.raises(DataError, match=words):
        recorded(records)


def test_baseline_by_adaptation_or_by_its_only_method(recorded):
    records = [record("ink-plain", 0, 1, 1, 1) | {"method": "finetune"}, record("ink-studio", 0, 1, 1, 1)]
    found = recorded(records)
    assert find_baseline(found, "finetune") == "ink-plain"
    assert find_baseline(found, "ink-studio") == "ink-studio"
    with pytest.raises(DataError, match="name one of them"):
        find_baseline(found, "lora")


@pytest.mark.slow
def test_the_command_writes_pictures_and_tables_that_repeat(tmp_path, recorded, monkeypatch):
    domain = {"reference": "domain", "frechet_distance": 5.0, "intra_distance": 0.4, "memorized_share": 0.01}
    recorded([*straight("finetune", 0, 0.2), *straight("studio", 0, 0.3), domain])
    written = []
    for name in ("one", "two"):
        output = tmp_path / name / "curves"
        monkeypatch.setattr("sys.argv", ["curves", str(tmp_path / "r.jsonl"), "--output", str(output)])
        curves.main()
        written.append({path.name: path.read_bytes() for path in output.parent.iterdir()})
    suffixes = (".png", ".svg", ".md", "-difference.png", "-difference.svg")
    assert set(written[0]) == {f"curves{suffix}" for suffix in suffixes}
    assert written[0] == written[1]
    assert b"+0.1000" in written[0]["curves.md"]
