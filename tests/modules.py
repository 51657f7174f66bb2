"""The project's modules and what each of them imports, read from their source."""

import ast
from collections.abc import Collection
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("domainstudio", "stages", "services", "flows", "benchmarks")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


@cache
def imports_of(module: str, *, for_types: bool) -> frozenset[str]:
    """Return the project's modules that one imports, inside functions too.

    Args:
        module: its name.
        for_types: count those under TYPE_CHECKING.
    """
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not for_types:
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
    return frozenset((found & MODULES.keys()) - {module})


def reachable(start: str, without: Collection[str] = ()) -> set[str]:
    """Return the files that run once a module is imported and its functions are called, its own included.

    Args:
        start: the module.
        without: modules that are left out, and what only they import.
    """
    seen: set[str] = set()
    todo = {start}
    while todo:
        module = todo.pop()
        seen.add(module)
        found = imports_of(module, for_types=False)
        packages = {name.rpartition(".")[0] for name in found} & MODULES.keys()
        todo |= (found | packages) - seen - set(without)
    return {MODULES[module].relative_to(ROOT).as_posix() for module in seen}
