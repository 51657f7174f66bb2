"""Comparisons of methods along training: what is recorded, chosen and kept, and the rule's regret."""

import json
import math
import sys

import pytest
import yaml

from benchmarks import compare, records, regret
from domainstudio.errors import DataError
from tests.models import image_set, tiny_denoiser, tiny_images
from tests.project import params


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a prepared target, and one adaptation alone and switched."""
    values = params()
    values["sources"] = {"noto": {"subjects": "subjects.txt"}}
    values["source_images"], values["sweeps"] = {"noto": {"images": "demo/none.yaml"}}, {}
    values["targets"] = {"ink": {"shots": "images", "number": 4, "seed": 1, "domain": "images"}}
    item = {"source": "noto", "target": "ink", "method": "finetune"}
    values["adaptations"] = {"plain": item, "switched": {**item, "combine": {"mode": "switch", "at": 0.8}}}
    values["registry"]["models"] = {}
    values["finetune"] |= {"batch_size": 4, "learning_rate": 0.01, "lr_warmup_steps": 0}
    values["sample"] |= {"number": 12, "steps": 2, "batch_size": 12}
    values["choose"] |= {"number": 8, "steps": 2}
    values["evaluate"]["resamples"] = 0
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "subjects.txt").write_text("a house\n")
    tiny_denoiser().save(tmp_path / "models/sources/noto")
    image_set(tiny_images(4)).save(tmp_path / "data/targets/ink/shots")
    image_set(tiny_images(24)).save(tmp_path / "data/targets/ink/domain")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, *options, draws=("2",), out="out.jsonl"):
    command = ["compare", "--adaptations", "plain", "switched", "--seeds", "0", "--draws", *draws, *options]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "1", "3", "--out", out])
    compare.main()


@pytest.mark.slow
def test_a_comparison_records_each_step_once_with_its_null_and_the_step_that_the_rule_takes(
    project, monkeypatch
):
    run(monkeypatch, "--choose", "--null", "plain")
    lines = (project / "out.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    points = [row for row in rows if "adaptation" in row]
    assert [(row["adaptation"], row["step"], row.get("null_of")) for row in points] == [
        ("plain", 1, None),
        ("plain", 3, None),
        ("switched", 1, None),
        ("switched", 3, None),
        ("plain-half-speed", 2, "plain"),
        ("plain-half-speed", 6, "plain"),
    ]
    assert [row["reference"] for row in rows if "reference" in row] == ["shots", "source", "domain"]
    for name in ("plain", "switched", "plain-half-speed"):
        assert sum(row.get("chosen", False) for row in points if row["adaptation"] == name) == 1
    assert all(row["draw"] == 2 and row["number"] == 12 for row in points)
    assert len({row["kid"] for row in points}) == 6
    assert len(list((project / ".checkpoints/compare").glob("*/states"))) == 2  # combinations share theirs

    (project / "out.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    run(monkeypatch, "--choose", "--null", "plain")
    again = [json.loads(line) for line in (project / "out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in again if row.get("null_of")] == [2, 6]
    assert [row for row in again if "reference" not in row] == points

    unmarked = [json.dumps({k: v for k, v in row.items() if k != "chosen"}) for row in points]
    (project / "marked.jsonl").write_text("\n".join(unmarked) + "\n")
    run(monkeypatch, "--choose", "--only-chosen", out="marked.jsonl")
    rows = [json.loads(line) for line in (project / "marked.jsonl").read_text().splitlines()]
    marked = [row for row in rows if row.get("chosen")]
    assert marked == [row for row in points if row.get("chosen") and "null_of" not in row]

    for _ in range(2):  # the second call has nothing to do
        run(monkeypatch, "--choose", "--only-chosen", out="chosen.jsonl")
        rows = [json.loads(line) for line in (project / "chosen.jsonl").read_text().splitlines()]
        alone = [row for row in rows if "adaptation" in row]
        assert alone == [row for row in points if row.get("chosen") and "null_of" not in row]


@pytest.mark.slow
def test_trainings_side_by_side_are_recorded_as_one_after_another(project, monkeypatch):
    run(monkeypatch, "--jobs", "2", draws=("2", "3"), out="jobs.jsonl")
    run(monkeypatch, draws=("2", "3"), out="alone.jsonl")  # the trained models are kept
    found = []
    for name in ("jobs.jsonl", "alone.jsonl"):
        rows = [json.loads(line) for line in (project / name).read_text().splitlines()]
        assert sum("reference" in row for row in rows) == 6, "three of each draw"
        found.append(sorted(json.dumps(row) for row in rows if "adaptation" in row))
    assert len(found[0]) == 8
    assert found[0] == found[1]


def point(step, kid, varied, chosen=False, seed=0):
    return {
        "adaptation": "a",
        "seed": seed,
        "step": step,
        "kid": kid,
        "intra_distance_in_domain": varied,
        **({"chosen": True} if chosen else {}),
    }


REFERENCES = [
    {"reference": "source", "kid": 4.0},
    {"reference": "domain", "kid": 0.0, "intra_distance_in_domain": 2.0},
]


@pytest.fixture
def recorded(tmp_path):
    def write_and_read(rows):
        path = tmp_path / "r.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
        return records.read([path])

    return write_and_read


def test_regret_is_what_a_step_loses_against_the_best_of_its_run(recorded):
    """Values: 1 − √(kid / 4) − (1 − varied / 2) are 0.5, 0.75 and 0.25; a kid below 0 counts as 0."""
    rows = [point(1, 1.0, 2.0), point(2, -0.1, 1.5, chosen=True), point(3, 0.0, 0.5)]
    incomplete = [point(1, 1.0, 1.0, chosen=True, seed=1)]
    found = regret.regrets(recorded([*REFERENCES, *rows, *incomplete]))
    expected = {regret.CHOSEN: [0.0], "always 1": [0.25], "always 2": [0.0], "always 3": [0.5]}
    assert found == {policy: pytest.approx(values) for policy, values in expected.items()}
    cheap = regret.regrets(recorded([*REFERENCES, *rows]), gain_per_loss=4.0)
    assert cheap[regret.CHOSEN] == [pytest.approx(0.5)]


def test_a_step_without_variety_in_the_domain_is_worst_and_what_lacks_is_said(recorded):
    rows = [point(1, 1.0, None), point(2, 1.0, 1.0, chosen=True)]
    found = regret.regrets(recorded([*REFERENCES, *rows]))
    assert found["always 1"] == [math.inf]
    with pytest.raises(DataError, match="lack the reference domain"):
        regret.regrets(recorded([REFERENCES[0], *rows]))
    with pytest.raises(DataError, match="no run with a chosen step"):
        regret.regrets(recorded([*REFERENCES, point(1, 1.0, 1.0)]))
