"""dvc.yaml, params.yaml, the settings and the modules agree with each other."""

import ast
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from domainstudio import config
from stages.pretrain import FOLDERS
from tests.modules import MODULES, ROOT, reachable

# Modules that a result cannot depend on: messages, the places of outputs (which DVC checks itself), package
# markers, and what only observes a training.
OBSERVERS = {"domainstudio/git.py"} | {
    f"domainstudio/{name}.py"
    for name in (
        "storage/mirror",
        "storage/s3",
        "tracking/relocation",
        "tracking/runs",
        "tracking/server",
        "tracking/tracker",
    )
}
HARMLESS = {
    *("domainstudio/errors.py", "domainstudio/project.py", "domainstudio/redaction.py"),
    *("domainstudio/storage/disk.py", "stages/cli.py", "stages/launch.py"),
}
SELECTION = {module for module in MODULES if module.startswith("domainstudio.selection")}
STAGES = (
    "prepare_source",
    "prepare_target",
    "sample_source",
    "chooser",
    "finetune",
    "sample",
    "evaluate",
    "tradeoff",
    "report",
    "release",
    "register",
)


@pytest.fixture(scope="module")
def stages():
    content = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: stage.get("do", stage) for name, stage in content.items()}


def config_of(sections):
    """Return the files of config/ that say what some sections hold, and those that read any."""
    fields = config.Settings.model_fields
    kinds = (fields[name].annotation for name in sections)
    modules = {(get_args(kind) or (kind,))[-1].__module__ for kind in kinds}
    return {"domainstudio/config/settings.py", "domainstudio/config/document.py"}.union(
        *(reachable(module, without={"domainstudio.config"}) for module in modules)
    )


def run_by(name, stage):
    """Return the files that a stage runs; what chooses for `finetune` is in the note of `chooser`."""
    used = reachable(stage["cmd"].split()[2])
    trains = reachable("stages.finetune", without=SELECTION)
    if name == "finetune":
        return trains
    if name == "chooser":  # `finetune` depends on all models
        used |= {path for path in reachable("stages.finetune") - trains if "/models/" not in path}
    return used


def used_by(name, stage):
    """Return the files that can change a stage's result."""
    used = run_by(name, stage) - (OBSERVERS if name == "finetune" else set())
    sections = {param.split(".")[0] for param in stage.get("params", ())}
    config_files = {path for path in used if path.startswith("domainstudio/config/")}
    used -= config_files - config_of(sections)
    return {path for path in used if not path.endswith("__init__.py")} - HARMLESS


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_every_module_that_it_uses(stages, name):
    declared = stages[name]["deps"]
    used = used_by(name, stages[name])
    missing = [path for path in used if not any(path == d or path.startswith(f"{d}/") for d in declared)]
    assert not missing


def test_every_declared_module_is_there_and_used(stages):
    for name in STAGES:
        used = used_by(name, stages[name])
        for path in (d for d in stages[name]["deps"] if d.startswith(("domainstudio", "stages"))):
            assert any(file == path or file.startswith(f"{path}/") for file in used), f"{name}: {path}"


def test_no_stage_is_frozen(stages):
    """DVC warns of each frozen stage, at each run."""
    assert not [name for name, stage in stages.items() if stage.get("frozen")]


def test_source_models_are_trained_after_those_that_they_begin_with():
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    sources = re.search(r"^SOURCES \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sources
    made: set[str] = set()
    for section in sources[1].split():
        begins = {values[section].get("source"), Path(str(values[section].get("vae"))).parent.name}
        assert begins & set(FOLDERS.values()) <= made, section
        made.add(FOLDERS[section])
    assert made == set(FOLDERS.values()) - {"noto-flow"}  # which is not in git


# Sections that decide where something is logged, or how many processes do it: a change makes the same again.
SAME_RESULT = {
    "finetune": {"registry"},
    **{name: {"launch"} for name in ("sample_source", "sample", "evaluate", "tradeoff")},
}
# What an adaptation's attributes were resolved from, beyond its own entry.
RESOLVED_FROM = {"training": {"finetune"}, "weights": {"methods"}}


def sections_read(path):
    """Return the sections of params.yaml that a file reads, from the attributes that it names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in ("settings", "config.load()"):
                aliases = {"adaptation": "adaptations", "resolved": "adaptations"}
                found |= {aliases.get(node.attr, node.attr)} & set(config.Settings.model_fields)
            elif owner.endswith("adaptation"):
                found |= RESOLVED_FROM.get(node.attr, set())
    return found


@pytest.mark.parametrize("name", STAGES)
def test_params_name_every_section_that_a_stage_reads(stages, name):
    # All that is given the whole of the settings, or an adaptation.
    registry = (f"domainstudio/registry/{module}.py" for module in ("aliases", "registration", "releases"))
    library = ("training/recipe.py", "selection/training.py", "metrics/tradeoff.py")
    readers = ("stages/", "domainstudio/report/", *(f"domainstudio/{path}" for path in library), *registry)
    files = {path for path in run_by(name, stages[name]) if path.startswith(readers)}
    read = set().union(*(sections_read(ROOT / path) for path in files)) - SAME_RESULT.get(name, set())
    declared = {param.split(".")[0] for param in stages[name]["params"]}
    others = {  # of the other stage of one script
        "prepare_source": {"targets"},
        "prepare_target": {"source_images"},
        "sample_source": {"adaptations"},
        "sample": {"sources"},
        "chooser": {"sample"},  # which `finetune` names itself
    }
    assert declared == read - others.get(name, set())


def test_every_setting_is_described():
    def walk(model):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
        for sub in model.__subclasses__():
            walk(sub)

    for section in config.Section.__subclasses__():
        if section is not config.Adaptation:
            walk(section)


def test_the_projects_own_params_are_valid():
    settings = config.load(ROOT / "params.yaml")
    assert {"sunglasses-finetune", "sunglasses-domainstudio"} <= set(settings.resolved)
    assert not settings.adaptation("sunglasses-finetune").weights.pairwise
