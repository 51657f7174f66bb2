"""The comparison along training: what it computes, and what it refuses."""

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks import curves
from benchmarks.records import difference, find_baseline, read
from benchmarks.verdicts import null, verdict, verdicts
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
    assert found.runs == ((0, 0), (0, 1))
    assert found.means == pytest.approx([0.05, 0.15])
    assert np.isnan(found.by_run[1][found.levels > 80.5]).all()
    assert np.isfinite(found.by_run[0][found.levels > 80.5]).all()


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


def sound(name, run, step, frechet, intra=0.5, **other):
    known = {"frechet_distance_infinity": frechet, "intra_distance_in_domain": intra}
    return record(name, run[1], step, frechet, intra, draw=run[0], **known, **other)


RUNS = [(draw, seed) for draw in (1, 2) for seed in (0, 1, 2)]
NOISE = dict(zip(RUNS, (0.0, 2.0, 4.0, 1.0, 3.0, 5.0), strict=True))


def judged(found, name="a"):
    return {item.figure: item for item in verdicts(found, name, "b")}


def test_a_method_wins_where_the_interval_of_the_paired_difference_excludes_zero(recorded):
    theirs = [sound("b", run, 10, 100.0 + NOISE[run], 0.5) for run in RUNS]
    ours = [sound("a", run, 10, 90.0 + NOISE[run] + run[1], 0.5 + 0.1 * (run[1] - 1)) for run in RUNS]
    found = judged(recorded(theirs + ours))
    distance = found["frechet_distance_infinity"]
    expected = stats.ttest_1samp([-10.0, -9.0, -8.0] * 2, 0).confidence_interval()
    assert (distance.low, distance.high) == pytest.approx(tuple(expected))
    assert distance.outcome == "wins"
    assert distance.runs == 6
    assert distance.mean == pytest.approx(-9.0)
    assert distance.mean == pytest.approx(-9.0)
    assert found["intra_distance_in_domain"].outcome == "not shown"
    assert {item.outcome for item in verdicts(recorded(theirs + ours), "b", "a")} == {"loses", "not shown"}


def test_a_draw_on_the_other_side_leaves_a_difference_not_shown():
    gains = {(1, seed): 10.0 + seed for seed in range(6)} | {(2, 0): -0.1}
    item = verdict("intra_distance_in_domain", gains)
    assert item.low > 0
    assert item.outcome == "not shown"
    assert (
        verdict("intra_distance_in_domain", {run: abs(gain) for run, gain in gains.items()}).outcome == "wins"
    )


def test_each_adaptation_counts_at_its_chosen_step_or_at_the_best_one_of_all_runs(recorded):
    theirs = [sound("b", run, step, 100.0 + step) for run in RUNS for step in (10, 20)]
    ours = [sound("a", run, step, 120.0 - step) for run in RUNS for step in (10, 20)]
    found = recorded(theirs + ours)
    assert judged(found)["frechet_distance_infinity"].mean == pytest.approx(-10.0)
    ours = [item | {"chosen": item["step"] == 10} for item in ours]
    assert judged(recorded(theirs + ours))["frechet_distance_infinity"].mean == pytest.approx(0.0)


def test_the_baseline_against_itself_is_printed_and_wins_nothing(recorded):
    theirs = [sound("b", run, 10, 100.0 + NOISE[run]) for run in RUNS]
    slow = [sound("b-half-speed", run, 20, 101.0 + NOISE[run], null_of="b") for run in RUNS]
    found = recorded(theirs + slow)
    (distance,) = [item for item in null(found, "b") if item.figure == "frechet_distance_infinity"]
    assert distance.mean == pytest.approx(0.0)
    assert distance.outcome == "not shown"
    text = curves._judgements(found, ["b-half-speed"], "b")
    assert "| *b-half-speed* | Fréchet distance ∞ | 6 | +1 |" in text
    assert "| *the same with the next seed* | Fréchet distance ∞ | 6 | " in text


def test_table_has_mean_and_deviation_over_seeds(recorded):
    records = [record("a", seed, 10, value, None) for seed, value in enumerate((10.0, 20.0, 30.0))]
    text = curves.table(recorded([*records, {"reference": "domain", "kid": 0.5}]))
    assert "| a | 10 | 3 | 20.0 ± 10.0 |" in text
    assert "*domain*" in text
    assert "chosen" not in text
    chosen = [record("a", 0, 20, 50.0, None, chosen=True), {**records[1], "chosen": True}]
    assert "| a | chosen: 20, 10 | 2 | 35.0 ± 21.2 |" in curves.table(recorded([*records, *chosen]))


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
