"""The comparison along training: what it computes, and what it refuses."""

import json

import numpy as np
import pytest

from benchmarks import curves
from domainstudio.errors import DataError


def record(name, seed, step, frechet, intra, **other):
    measured = {"frechet_distance": frechet, "intra_distance": intra}
    return {"adaptation": name, "method": name, "seed": seed, "step": step, **measured, **other}


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return [path]


def straight(name, seed, offset, levels=(100.0, 60.0, 20.0)):
    # Intra distance is linear in the Fréchet distance, so interpolation is exact.
    return [record(name, seed, 10 * i + 10, x, 0.001 * x + offset) for i, x in enumerate(levels)]


def test_difference_at_equal_frechet_distance_is_the_offset_whatever_the_steps(tmp_path):
    ours = straight("a", 0, 0.25, (90.0, 50.0, 30.0)) + straight("a", 1, 0.35, (80.0, 30.0))
    theirs = straight("b", 0, 0.2) + straight("b", 1, 0.2)
    found = curves.difference(curves.read(write(tmp_path / "r.jsonl", ours + theirs)), "a", "b")
    assert found.seeds == (0, 1)
    assert found.means == pytest.approx([0.05, 0.15])
    assert np.isnan(found.by_seed[1][found.levels > 80.5]).all()
    assert np.isfinite(found.by_seed[0][found.levels > 80.5]).all()


def test_steps_after_the_best_are_left_out(tmp_path):
    ours = [*straight("a", 0, 0.3), record("a", 0, 99, 70.0, -5.0)]
    found = curves.difference(
        curves.read(write(tmp_path / "r.jsonl", ours + straight("b", 0, 0.2))), "a", "b"
    )
    assert found.means == pytest.approx([0.1])


def test_curves_that_do_not_meet_have_no_difference(tmp_path):
    records = straight("a", 0, 0.3, (100.0, 90.0)) + straight("b", 0, 0.2, (50.0, 40.0))
    assert curves.difference(curves.read(write(tmp_path / "r.jsonl", records)), "a", "b") is None


def test_a_later_record_replaces_an_earlier_one(tmp_path):
    records = [record("a", 0, 10, 50.0, 0.1), record("a", 0, 10, 40.0, 0.2)]
    found = curves.read(write(tmp_path / "r.jsonl", records))
    assert [item.values["frechet_distance"] for item in found.measurements] == [40.0]


def test_table_has_mean_and_deviation_over_seeds(tmp_path):
    records = [record("a", seed, 10, value, None) for seed, value in enumerate((10.0, 20.0, 30.0))]
    text = curves.table(
        curves.read(write(tmp_path / "r.jsonl", [*records, {"reference": "domain", "kid": 0.5}]))
    )
    assert "| a | 10 | 3 | 20.0 ± 10.0 |" in text
    assert "*domain*" in text


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "no measurements"),
        ([{"reference": "domain"}], "no measurements"),
        ([{"adaptation": "a"}], "r.jsonl:1"),
        (
            [record("a", 0, 1, 1, 1, features="x"), record("b", 0, 1, 1, 1, features="y")],
            "different features",
        ),
        ([record("a", 0, 1, 1, 1, target="x"), {"reference": "domain", "target": "y"}], "different target"),
    ],
)
def test_records_that_do_not_compare_are_refused(tmp_path, records, words):
    with pytest.raises(DataError, match=words):
        curves.read(write(tmp_path / "r.jsonl", records))


def test_baseline_by_adaptation_or_by_its_only_method(tmp_path):
    records = [record("ink-plain", 0, 1, 1, 1) | {"method": "finetune"}, record("ink-studio", 0, 1, 1, 1)]
    found = curves.read(write(tmp_path / "r.jsonl", records))
    assert curves.find_baseline(found, "finetune") == "ink-plain"
    assert curves.find_baseline(found, "ink-studio") == "ink-studio"
    with pytest.raises(DataError, match="name one of them"):
        curves.find_baseline(found, "lora")


def test_the_command_writes_pictures_and_tables_that_repeat(tmp_path, monkeypatch):
    records = straight("finetune", 0, 0.2) + straight("studio", 0, 0.3)
    records += [
        {"reference": "domain", "frechet_distance": 5.0, "intra_distance": 0.4, "memorized_share": 0.01}
    ]
    source = write(tmp_path / "r.jsonl", records)[0]
    written = []
    for name in ("one", "two"):
        monkeypatch.setattr("sys.argv", ["curves", str(source), "--output", str(tmp_path / name / "curves")])
        curves.main()
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert set(written[0]) == {
        f"curves{end}" for end in (".png", ".svg", ".md", "-difference.png", "-difference.svg")
    }
    assert written[0] == written[1]
    assert b"+0.1000" in written[0]["curves.md"]
