"""The library imports without the pipeline's packages, and cheaply."""

import subprocess
import sys

import pytest

from tests.modules import MODULES, ROOT

OUTSIDE = ("domainstudio.registry", "domainstudio.tracking")
CORE = [name for name in MODULES if name.startswith("domainstudio") and not name.startswith(OUTSIDE)]


def blocking(*packages):
    """Return code after which importing a package fails as if it were not installed."""
    return f"import sys\nfor name in {packages!r}: sys.modules[name] = None\n"


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_no_core_module_needs_the_pipelines_packages():
    blocked = blocking("prefect", "dvc", "mlflow", "boto3", "torchvision")
    result = run(blocked + "\n".join(f"import {name}" for name in CORE))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "module",
    ["domainstudio", *(f"domainstudio.{room}" for room in ("config", "data", "sampling", "report"))],
)
def test_light_modules_do_not_import_torch(module):
    result = run(blocking("torch", "diffusers") + f"import {module}")
    assert result.returncode == 0, result.stderr
