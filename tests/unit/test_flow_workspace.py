"""Where a run's results go: to a branch of its own in a real repository, whatever the run is called."""

import ast
import shutil

import pytest

from domainstudio.errors import ConfigError
from flows.run import code, workspace
from flows.run.workspace import WorkspaceError
from tests.project import ROOT, run


@pytest.fixture
def origin(tmp_path):
    run(tmp_path, "git", "init", "-q", "--bare", "-b", "main", "origin")
    run(tmp_path, "git", "clone", "-q", "origin", "first")
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    run(tmp_path / "first", "git", *identity, "commit", "-q", "--allow-empty", "-m", "start")
    run(tmp_path / "first", "git", "push", "-q", "origin", "HEAD:main")
    return tmp_path / "origin"


def publish(origin, name, result):
    """Publish a run's result from a clone of its own."""
    clone = origin.parent / result
    found = workspace.checkout(str(origin), "main", clone)
    (clone / "dvc.lock").write_text(result)
    return workspace.publish(found, name, f"Results of flow run {name}")


def branches(origin):
    return {*run(origin, "git", "branch", "--format=%(refname:short)").split()} - {"main"}


def test_runs_of_one_name_publish_on_branches_of_their_own(origin):
    names = [publish(origin, "red-fox", result) for result in ("one", "two", "three")]
    assert names == ["runs/red-fox", "runs/red-fox-2", "runs/red-fox-3"]
    assert branches(origin) == {*names}
    shown = [run(origin, "git", "show", f"{name}:dvc.lock") for name in names]
    assert shown == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("ink: warm start", "runs/ink-warm-start"),
        ("a..b/.lock", "runs/a-b-lock"),
        ("Grün_1", "runs/Grün_1"),
        ("?", "runs/run"),
    ],
)
def test_a_name_becomes_one_that_git_takes(origin, name, branch):
    assert publish(origin, name, "result") == branch
    assert run(origin, "git", "show", f"{branch}:dvc.lock") == "result"


def test_a_repository_that_takes_nothing_is_an_error(origin):
    publish(origin, "red-fox", "before")
    hook = origin / "hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho closed for today >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(WorkspaceError, match="closed for today"):
        publish(origin, "red-fox", "result")
    assert branches(origin) == {"runs/red-fox"}


def test_a_flow_of_another_commit_refuses_to_run(origin, monkeypatch):
    clone = origin.parent / "first"
    for room in ("flows", "domainstudio"):
        shutil.copytree(ROOT / room, clone / room, ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "params.yaml").write_text("settings may differ\n")
    (clone / "domainstudio/training/losses.py").write_text("# stages run the clone's own code\n")
    push(clone)
    workspace.checkout(str(origin), "main", origin.parent / "same")
    (clone / "flows/new.py").touch()
    (clone / "domainstudio/config/settings.py").write_text("")
    commit = push(clone)
    monkeypatch.setenv(code.COMMIT_VARIABLE, "0ld")
    with pytest.raises(
        ConfigError, match=f"(?s){commit}.*0ld.*: flows/new.py, domainstudio/config/settings.py."
    ):
        workspace.checkout(str(origin), "main", origin.parent / "other")


def push(clone):
    run(clone, "git", "add", "--all")
    run(clone, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "change")
    run(clone, "git", "push", "-q", "origin", "HEAD:main")
    return run(clone, "git", "rev-parse", "HEAD").strip()


def test_all_that_a_flow_imports_is_compared():
    compared = {path for pattern in code.DRIVING for path in ROOT.glob(pattern)}
    sources = [
        path for path in (ROOT / "flows").rglob("*.py") if "sweep" not in path.parts
    ]  # sweeps clone nothing
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("domainstudio."):
                module = ROOT / str(node.module).replace(".", "/")
                assert {module.with_suffix(".py"), module / "__init__.py"} & compared, (path, node.module)
