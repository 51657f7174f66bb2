"""A few faults of every kind; `make test-faults` tries thousands."""

import pytest

from tests.faults.__main__ import CHEAP, _silence
from tests.faults.cases import Tally, WrongError, try_case
from tests.faults.events import Interruption
from tests.faults.stages import STAGES, KilledStages, Project, RefusedWrites, fork


@pytest.mark.parametrize(
    ("name", "number"),
    [("images", 400), ("settings", 60), ("states", 40), ("caches", 30), ("sets", 100), ("models", 12)],
)
def test_damage_is_refused_passed_over_or_harmless(tmp_path, name, number):
    kind, tally = CHEAP[name](tmp_path), Tally()
    for case in range(number):
        try_case(kind, 1, case, tally)
    assert not tally.failures
    assert tally.tried == number
    assert len(tally.outcomes) > 1 or name == "caches"  # not everything is refused, nor everything passed


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with _silence():
        return Project(tmp_path_factory.mktemp("faults"), ("prepare", "finetune"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KilledStages, RefusedWrites])
def test_stages_that_are_killed_or_whose_disk_refuses_go_on(project, kind):
    tally = Tally()
    for case in range(2):
        try_case(kind(project), 1, case, tally)
    assert not tally.failures


@pytest.mark.slow
def test_a_full_disk_is_one_line_with_path_room_and_status(project):
    project.reset("prepare")
    ended = fork(project.root, STAGES["prepare"], Interruption(largest=1000))
    assert ended.status == 74
    assert "error: data/targets/ink cannot be read or written: File too large (" in ended.said
    assert " free of " in ended.said
    assert not list((project.root / "data/targets").iterdir())


def test_the_suite_counts_what_fails():
    class Silent:
        name, weight = "silent", 1.0

        def case(self, rng):
            raise WrongError("wrong") if rng.random() < 0.5 else ValueError("defect")

    tally = Tally()
    for case in range(20):
        try_case(Silent(), 0, case, tally)
    assert len(tally.failures) == 20
    assert set(tally.outcomes) == {"silently wrong", "traceback"}
