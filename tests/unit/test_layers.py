"""Which room may import which: a table, held against every import, also those for types only."""

from graphlib import CycleError, TopologicalSorter

import pytest

from tests.modules import MODULES, imports_of

LAYERS = (
    (
        *("errors", "seeding", "redaction", "git", "distributed", "project", "precision", "telemetry"),
        "markdown",
    ),
    ("config", "storage"),
    ("data", "tracking"),
    ("models",),
    ("sampling",),
    ("metrics", "training"),
    ("demo", "registry", "report", "selection"),
    ("stages", "services"),
    ("benchmarks", "flows"),
)
"""From the ground up. A room imports itself and lower layers, never its own layer's other rooms."""

LEVELS = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def room_of(module):
    """Return `models` for `domainstudio.models.lora`, `stages` for `stages.sample`, "" for the package."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "domainstudio" else first


def test_every_room_has_a_layer():
    rooms = {room_of(module) for module in MODULES} - {""}
    assert rooms == LEVELS.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_goes_up_or_sideways(module):
    here = room_of(module)
    others = {other: room_of(other) for other in imports_of(module, for_types=True)}
    wrong = [
        other
        for other, room in others.items()
        if room not in ("", here) and LEVELS[room] >= LEVELS.get(here, -1)
    ]
    assert not wrong, f"{module} ({here}) must not import {wrong}"


def test_no_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter({module: imports_of(module, for_types=True) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))
