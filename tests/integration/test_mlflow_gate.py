"""Which version becomes the champion, why, and how that is taken back: on a real MLflow."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from domainstudio import config
from domainstudio.data import ImageRecord, ImageSet
from domainstudio.registry import aliases, audit, judging, versions
from domainstudio.registry.aliases import Alias, Promotion
from domainstudio.registry.gate import Measurement
from domainstudio.registry.versions import MEASUREMENT
from domainstudio.tracking.server import TrackingError
from stages import evaluate, register, sample
from tests import warm
from tests.integration.mlflow_parts import (
    MODEL,
    NAME,
    aliases_of,
    environment,
    make_project,
    measure,
    other_result,
    register_other,
    rows,
    run_stage,
    save_pipeline,
    use_local_store,
    version_tags,
    versions_of,
)
from tests.models import tiny_images

Patch = pytest.MonkeyPatch
CHAMPION = Alias(MODEL)
PROVENANCE = Path("models/adapted", NAME, "provenance.json")
SAMPLES = Path("samples/adapted", NAME, "manifest.json")


@pytest.fixture
def database(tmp_path: Path, monkeypatch: Patch) -> Path:
    make_project(tmp_path)
    monkeypatch.setattr(audit, "current_user", lambda: "tester")
    return use_local_store(tmp_path, monkeypatch)


def stored(database: Path) -> dict[str, list[Any]]:
    """Return all that a registration can change."""
    tables = ("registered_model_tags", "registered_model_aliases", "model_version_tags", "model_versions")
    found = {name: sorted(rows(database, f"select * from {name}"), key=str) for name in tables}
    found["model_versions"] = rows(database, "select version, description from model_versions")
    return found


def drawn_in(steps: int) -> None:
    """Change how the samples were drawn."""
    SAMPLES.write_text(json.dumps({**json.loads(SAMPLES.read_text()), "steps": steps}))


def events() -> list[tuple[str, str]]:
    return [(event.what, event.version) for event in aliases.history(CHAMPION)]


def test_a_better_model_becomes_champion_and_a_worse_one_does_not(database, monkeypatch, capsys):
    run_stage(monkeypatch, NAME)
    register_other(monkeypatch, 1, frechet_distance_infinity=13.0, intra_distance_in_domain=0.7)
    assert aliases_of(database) == {"champion": 2, "previous_champion": 1}
    reason = (
        "better intra distance in the domain: Fréchet distance ∞ 13 against 12.5 (+4.0%, allowed +5%); "
        "intra distance in the domain 0.7 against 0.5 (+40.0%, allowed -5%); "
        "memorised 0% against 0% (allowed 5%)"
    )
    out = capsys.readouterr().out
    assert f"{MODEL}@champion is version 2, before it was 1: {reason}\n" in out

    register_other(monkeypatch, 2, memorized_share=0.3, intra_distance_in_domain=0.9)
    assert aliases_of(database) == {"champion": 2, "previous_champion": 1, "challenger": 3}
    out = capsys.readouterr().out
    assert f"{MODEL}@champion stays version 2; version 3: memorises too much: " in out
    assert f"take it all the same: python -m stages.register --promote 3 --reason WHY {NAME}\n" in out
    tags = version_tags(database, 3)
    assert (tags["gate"], tags["gate.reason"].partition(":")[0]) == ("refused", "memorises too much")
    assert json.loads(tags["gate.figures"])[-1] == {
        **{"name": "memorized_share", "candidate": 0.3, "champion": 0.0, "allowed": 0.05},
        **{"passed": False, "improved": False},
    }
    assert version_tags(database, 2)["champion_reason"] == version_tags(database, 2)["gate.reason"] == reason
    (card,) = rows(database, "select description from model_versions where version = 3")[0]
    assert "**Gate**: refused: memorises too much: " in card
    assert f"models:/{MODEL}/3" in card and "@champion" not in card
    (refused,) = [each for each in verdicts() if each["outcome"] == "refused"]
    assert refused["against"] == "2"
    assert refused["champion"]["figures"]["intra_distance_in_domain"] == 0.7

    before = stored(database)
    run_stage(monkeypatch, NAME)  # the refused one again
    assert stored(database) == before
    other_result(0)
    PROVENANCE.write_text(PROVENANCE.read_text().replace("0" * 64, "5" * 64))
    run_stage(monkeypatch, NAME)  # the first one again: no verdict is made anew
    assert f"{MODEL}@champion stays version 2; version 1: version 2 took its place" in capsys.readouterr().out
    after = stored(database)
    assert {**after, "model_versions": None} == {**before, "model_versions": None}
    assert versions_of(database) == [1, 2, 3]


def test_people_have_the_last_word_and_all_is_on_record(database, monkeypatch, capsys):
    run_stage(monkeypatch, NAME)
    for seed, figure in (1, 11.0), (2, 30.0):
        register_other(monkeypatch, seed, frechet_distance_infinity=figure)
    with pytest.raises(SystemExit):
        run_stage(monkeypatch, "--promote", "3", NAME)
    assert "say why with --reason" in capsys.readouterr().err
    with pytest.raises(TrackingError, match="not found"):
        run_stage(monkeypatch, "--promote", "9", "--reason", "typo", NAME)
    assert aliases_of(database) == {"champion": 2, "previous_champion": 1, "challenger": 3}

    run_stage(monkeypatch, "--promote", "3", "--reason", "cleaner lines", NAME)
    assert aliases_of(database) == {"champion": 3, "previous_champion": 2}
    assert version_tags(database, 3)["champion_reason"] == "cleaner lines"
    assert version_tags(database, 3)["gate"] == "refused", "what the gate said is not rewritten"

    run_stage(monkeypatch, "--rollback", NAME, "--reason", "too red")
    assert aliases_of(database) == {"champion": 2, "previous_champion": 1}
    assert version_tags(database, 2)["champion_reason"] == "rollback from version 3. too red"
    run_stage(monkeypatch, NAME)  # the result of version 3 again
    assert "version 3: it was rolled back at 20" in capsys.readouterr().out
    run_stage(monkeypatch, "--rollback", NAME)
    assert aliases_of(database) == {"champion": 1}
    with pytest.raises(TrackingError, match="nothing before it"):
        run_stage(monkeypatch, "--rollback", NAME)
    run_stage(monkeypatch, "--promote", "3", "--reason", "after all", NAME)
    assert aliases_of(database) == {"champion": 3, "previous_champion": 1}
    assert "rolled_back_champion" not in version_tags(database, 3)

    capsys.readouterr()
    run_stage(monkeypatch, "--history", NAME)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["when", "(UTC)", "version", "what", "champion", "by", "why"]
    assert [" ".join(line.split()[2:7]).partition(" tester")[0] for line in lines] == [
        "1 registered none",
        "1 promoted 1",
        "2 registered 1",
        "2 promoted 2",
        "3 registered 2",
        "3 refused 2",
        "3 promoted by hand 3",
        "2 rolled back 2",
        "1 rolled back 1",
        "3 promoted by hand 3",
    ]
    assert lines[6].endswith("  tester  cleaner lines")
    assert rows(database, "select count(distinct key) from registered_model_tags") == [(len(lines),)]


def test_a_champion_that_was_measured_otherwise_is_measured_again(database, monkeypatch, capsys):
    other = SAMPLES.read_text().replace('"ddim"', '"ddpm"')
    run_stage(monkeypatch, NAME)
    provenance = PROVENANCE.read_text()
    other_result(1, frechet_distance_infinity=5.0)
    SAMPLES.write_text(other)
    run_stage(monkeypatch, NAME)
    why = "version 2: not comparable with the champion (scheduler ddpm, the champion's ddim): "
    assert why in capsys.readouterr().out
    before = stored(database)
    run_stage(monkeypatch, NAME)
    assert stored(database) == before

    other_result(0, frechet_distance_infinity=12.0)  # the first model, measured as the second was
    PROVENANCE.write_text(provenance)
    run_stage(monkeypatch, NAME)
    assert aliases_of(database) == {"champion": 1, "challenger": 2}
    assert version_tags(database, 1)["frechet_distance_infinity"] == "12 (efficientnet-lite0)"
    register_other(monkeypatch, 1, frechet_distance_infinity=5.0)
    assert aliases_of(database) == {"champion": 2, "previous_champion": 1}
    measure(frechet_distance_infinity=50.0)  # a verdict is of one measurement; the champion keeps its place
    run_stage(monkeypatch, NAME)
    assert aliases_of(database) == {"champion": 2, "previous_champion": 1}
    other_result(0, frechet_distance_infinity=4.0)
    PROVENANCE.write_text(provenance)
    run_stage(monkeypatch, NAME)
    assert aliases_of(database) == {"champion": 1, "previous_champion": 2}
    assert events() == [
        *(("registered", "1"), ("promoted", "1"), ("registered", "2"), ("not comparable", "2")),
        *(("promoted", "2"), ("promoted", "1")),
    ]


def verdicts() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in Path("mlartifacts").rglob("gate.json")]


def make_result(monkeypatch: Patch, seed: int, shots: int) -> None:
    """Leave what the stages leave of a model, its training images beginning with that of a number."""
    save_pipeline(Path("models/sources/noto"), 9)
    other_result(seed)
    records = tuple(ImageRecord(str(i), "0", 8, 8, f"{i}.png") for i in range(12))
    domain = ImageSet(tiny_images(12), records, origin="images")
    domain.save(Path("data/targets/ink/domain"))
    domain.take(range(shots, shots + 5)).save(Path("data/targets/ink/shots"))
    for stage, *arguments in (sample, "source", "noto"), (sample, "adapted", NAME), (evaluate, NAME):
        monkeypatch.setattr(sys, "argv", ["stage", *arguments])
        stage.main()


def test_a_champion_of_other_training_images_is_drawn_and_measured_again(database, monkeypatch, capsys):
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["sample"] |= {"number": 8, "batch_size": 8, "steps": 2}
    values["evaluate"] |= {"memorized_below": 0.0}
    values["sources"]["noto"]["subjects"] = "subjects.txt"
    Path("subjects.txt").write_text("a house\n")
    Path("params.yaml").write_text(yaml.safe_dump(values))
    make_result(monkeypatch, 0, shots=0)
    run_stage(monkeypatch, NAME)
    make_result(monkeypatch, 1, shots=6)
    run_stage(monkeypatch, NAME)
    tags = version_tags(database, 2)
    assert tags["gate"] in ("promoted", "refused")
    assert tags["gate.reason"].endswith("; version 1 measured again")
    assert tags["gate.reason"] in capsys.readouterr().out
    (verdict,) = [each for each in verdicts() if each["against"] == "1"]
    assert verdict["champion"]["conditions"] == verdict["candidate"]["conditions"]
    assert not list(Path(".checkpoints").glob("champion-*"))

    make_result(monkeypatch, 0, shots=6)  # as if the champion had been sampled and evaluated here
    measured = json.loads(Path("evaluation", NAME, "metrics.json").read_text())["samples"]
    for name in ("frechet_distance", "kid", "intra_distance", "memorized_share"):
        assert verdict["champion"]["figures"][name] == pytest.approx(measured[name], rel=1e-6), name


def test_a_champion_whose_files_are_gone_is_not_compared(database, monkeypatch, capsys):
    run_stage(monkeypatch, NAME)
    for file in Path("mlartifacts").rglob("*.safetensors"):
        file.parent.joinpath("lost").touch()
        file.unlink()
    other_result(1, frechet_distance_infinity=5.0)
    drawn_in(steps=5)
    run_stage(monkeypatch, NAME)
    assert f"{MODEL} version 1 cannot be measured again: " in capsys.readouterr().err
    shutil.rmtree(next(path.parent for path in Path("mlartifacts").rglob("lost")).parents[1])
    register_other(monkeypatch, 2, frechet_distance_infinity=5.0)
    assert f"{MODEL} version 1 cannot be measured again: " in capsys.readouterr().err
    assert aliases_of(database) == {"champion": 1, "challenger": 3}
    assert version_tags(database, 3)["gate"] == "not comparable"


def test_who_became_champion_meanwhile_is_measured_too(database, monkeypatch):
    for seed in range(3):
        other_result(seed, frechet_distance_infinity=12.5 - seed)
        drawn_in(steps=4 + seed)
        run_stage(monkeypatch, NAME)
    assert aliases_of(database) == {"champion": 1, "challenger": 3}  # whose files cannot be drawn here
    asked = []

    def reevaluate(rival: str) -> Measurement:
        asked.append(rival)
        if rival == "1":
            aliases.promote(CHAMPION, "2", "meanwhile")
        own = Measurement.from_json(version_tags(database, 3)[MEASUREMENT])
        distance = 11.0 if rival == "1" else 10.4
        return Measurement({**own.figures, "frechet_distance_infinity": distance}, own.conditions)

    promotion = judging.judge(CHAMPION, "3", config.load().registry.gate, reevaluate)
    assert asked == ["1", "2"]
    assert not promotion.promoted and promotion.reason.endswith("; version 2 measured again")
    assert version_tags(database, 3)["gate"] == "refused"  # better than 1 by the margin, not than 2


@pytest.mark.parametrize("killed", ["decide", "_record"])
def test_a_promotion_that_was_killed_is_completed(database, monkeypatch, killed):
    run_stage(monkeypatch, NAME)
    other_result(1, frechet_distance_infinity=11.0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(judging, killed, Mock(side_effect=SystemExit))
        run_stage(monkeypatch, NAME)
    assert version_tags(database, 2)["gate"] == "pending"
    run_stage(monkeypatch, NAME)
    assert aliases_of(database) == {"champion": 2, "previous_champion": 1}
    assert version_tags(database, 2)["gate"] == "promoted"
    run_stage(monkeypatch, "--rollback", NAME)
    assert aliases_of(database) == {"champion": 1}


FIRST = """
import sqlite3, sys, time
from domainstudio.registry import judging
from stages import register
judge = judging.judge
def slowly(*arguments, **options):
    count = "select count(*) from model_versions"
    while sqlite3.connect("mlflow.db").execute(count).fetchone()[0] < 3:
        time.sleep(0.1)
    time.sleep(1)
    return judge(*arguments, **options)
judging.judge = slowly
sys.argv = ["register", sys.argv[1]]
register.main()
"""


def test_two_processes_at_once_are_judged_one_after_the_other(database, monkeypatch, tmp_path):
    run_stage(monkeypatch, NAME)
    other_result(1, frechet_distance_infinity=10.0)
    command = [warm.python(), "-c", FIRST, NAME]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as first:
        deadline = time.monotonic() + 200
        while len(versions_of(database)) < 2 and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        other_result(2, frechet_distance_infinity=9.9)  # better than version 1, hardly than version 2
        run_stage(monkeypatch, NAME)
        out, _ = first.communicate(timeout=100)
    assert "@champion is version 2, before it was 1: better Fréchet distance ∞" in out
    assert aliases_of(database) == {"champion": 2, "previous_champion": 1, "challenger": 3}
    assert version_tags(database, 3)["gate.reason"].startswith(
        "not better by 5% in Fréchet distance ∞ or intra"
    )
    assert events()[-4:] == [("registered", "2"), ("registered", "3"), ("promoted", "2"), ("refused", "3")]


def test_the_same_result_twice_at_once_is_one_version(database, monkeypatch):
    create = versions._create_version

    def after_another(*arguments: Any) -> str:
        monkeypatch.setattr(versions, "_create_version", create)
        register.main()
        return create(*arguments)

    monkeypatch.setattr(versions, "_create_version", after_another)
    run_stage(monkeypatch, NAME)
    assert versions_of(database) == [1]
    assert aliases_of(database) == {"champion": 1}
    assert events() == [("registered", "1"), ("promoted", "1")]


def test_flows_get_values(database, monkeypatch):
    run_stage(monkeypatch, NAME)
    register_other(monkeypatch, 1, frechet_distance_infinity=99.0)
    monkeypatch.undo()
    monkeypatch.chdir(database.parent)
    monkeypatch.setenv("DOMAINSTUDIO_FLOW_RUN", "1234")
    kept = judging.judge(CHAMPION, "2", None)
    assert (kept.promoted, kept.changed, kept.previous) == (False, False, "1"), "a verdict stands"
    done = aliases.promote(CHAMPION, "2", "approved", by="reviewer")
    assert done == Promotion(MODEL, "2", True, "approved", previous="1", changed=True)
    again = aliases.promote(CHAMPION, "2", "approved")
    assert (again.promoted, again.changed) == (True, False)
    back = aliases.rollback(CHAMPION, "no")
    assert (back.version, back.promoted, back.previous) == ("1", True, "2")
    *_, by_hand, taken_back = aliases.history(CHAMPION)
    assert (by_hand.by, by_hand.why) == ("reviewer", "approved")
    assert taken_back.by.endswith(", flow run 1234")
    assert taken_back.aliases == {"champion": "1"}
