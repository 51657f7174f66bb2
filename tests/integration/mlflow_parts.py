"""What the tests of MLflow share: a tiny project with a tiny model, its tracking store, a real server."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from urllib.error import HTTPError

import numpy as np
import torch
import yaml
from PIL import Image

from domainstudio import config
from stages import register
from tests import warm
from tests.integration.conftest import free_port
from tests.project import params

ROOT = Path(__file__).parents[2]
NAME = "ink-domainstudio"
MODEL = f"domainstudio-{NAME}"
KEY = "5" * 64
METRICS: dict[str, Any] = {
    "features": "efficientnet-lite0",
    "features_digest": "f" * 64,
    "number": 8,
    "samples": {
        "frechet_distance_infinity": 12.5,
        "kid": 0.25,
        "intra_distance_in_domain": 0.5,
        "memorized_share": 0.0,
    },
    "references": {"shots": {"frechet_distance_infinity": 20.0}},
}


def history(first: int, last: int) -> list[dict[str, float]]:
    """Return what a trainer logs for steps first … last; the same steps are the same records."""
    return [
        {"step": s, "timestamp": 1_700_000_000_000 + s, "seconds": s / 8, "total": 1 / s, "simple": 2 / s}
        for s in range(first, last + 1)
    ]


def save_pipeline(folder: Path, seed: int = 0) -> None:
    """Write a DDIM pipeline of 8x8 pixels with random weights."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
    DDIMPipeline(unet, DDIMScheduler(timestep_spacing="trailing")).save_pretrained(folder)


def make_project(root: Path, seed: int = 0, key: str = KEY) -> Path:
    """Write what the stages before `register` leave behind."""
    (root / "params.yaml").write_text(yaml.safe_dump(params()))
    save_pipeline(root / "models/adapted" / NAME, seed)
    write_result(root, NAME, key)
    return root


def write_result(
    root: Path,
    name: str,
    key: str = KEY,
    *,
    readme: str = "",
    metrics: dict[str, Any] = METRICS,
    condition: str | None = None,
    guidance_scale: float = 1.0,
) -> None:
    """Write all that the stages before `register` leave of an adaptation of params.yaml, but the weights.

    Args:
        root: the project, with params.yaml and `models/adapted/<name>`.
        name: the adaptation.
        key: of its parameters and inputs.
        readme: the model's card.
        metrics: what was measured.
        condition: prompt or class of the one sample, for a model with conditions.
        guidance_scale: guidance of that sample.
    """
    model = root / "models/adapted" / name
    licence = "| licence | Apache-2.0 |"
    (model / "README.md").write_text(
        readme or f"---\nlibrary_name: diffusers\n---\n\n# {name}\n\n{licence}\n"
    )
    provenance = {
        "format": 1,
        "adaptation": name,
        "key": key,
        "params": config.load(root / "params.yaml").adaptation(name).model_dump(mode="json"),
        "inputs": {"source": "a" * 64, "shots": "b" * 64},
        "versions": {"torch": "2.0"},
        "steps": 40,
    }
    (model / "provenance.json").write_text(json.dumps(provenance))
    _write(root / "training" / name / "history.jsonl", "".join(json.dumps(r) + "\n" for r in history(1, 40)))
    _write(root / "evaluation" / name / "metrics.json", json.dumps(metrics))
    _write(root / "evaluation" / name / "nearest.json", json.dumps({"threshold": 0.15, "pairs": []}))
    for part, digest in ("shots", "b" * 64), ("domain", "d" * 64):
        manifest = {"digest": digest, "licence": "CC-BY-4.0", "attribution": "somebody"}
        _write(root / "data/targets/ink" / part / "manifest.json", json.dumps(manifest))
    image: dict[str, Any] = {"file": "images/000000.png", "seed": 1000}
    samples: dict[str, Any] = {"scheduler": "ddim", "steps": 4, "images": [image]}
    if condition is not None:
        image["prompt"], samples["guidance_scale"] = condition, guidance_scale
    _write(root / "samples/adapted" / name / "manifest.json", json.dumps(samples))
    _write(root / "dvc.lock", yaml.safe_dump(_lock()))
    pictures = [f"samples/adapted/{name}/grid.png", f"training/{name}/previews/step-000040.png"]
    for path in [*pictures, "data/targets/ink/shots/contact_sheet.png"]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_mandelbrot((64, 32), (-2, -1, 1, 1), 20).save(root / path)


def use_local_store(root: Path, monkeypatch: Any) -> Path:
    """Make `root` the project with an empty SQLite store; return the database's path."""
    shutil.copy(_empty_database(), root / "mlflow.db")
    monkeypatch.chdir(root)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "DVC_STAGE", "DVC_ROOT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return root / "mlflow.db"


def run_stage(monkeypatch: Any, *arguments: str) -> None:
    """Run the stage `register` in this process."""
    monkeypatch.setattr(sys, "argv", ["register", *arguments])
    register.main()


def other_result(seed: int, **figures: float | None) -> None:
    """Overwrite model and metrics with others, as a training with other parameters does."""
    folder = Path("models/adapted", NAME)
    save_pipeline(folder, seed)
    provenance = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps({**provenance, "key": f"{seed:064d}"}))
    measure(**figures)


def register_other(monkeypatch: Any, seed: int, **figures: float | None) -> None:
    """Register such a result."""
    other_result(seed, **figures)
    run_stage(monkeypatch, NAME)


def measure(**figures: float | None) -> None:
    """Overwrite the metrics: those of `METRICS` with these figures."""
    samples: Any = METRICS["samples"]
    metrics = {**METRICS, "samples": {**samples, **figures}}
    Path("evaluation", NAME, "metrics.json").write_text(json.dumps(metrics))


def versions_of(database: Path) -> list[int]:
    """Return the numbers of all versions."""
    query = "select version from model_versions where current_stage != 'Deleted_Internal' order by version"
    return [version for (version,) in rows(database, query)]


def aliases_of(database: Path) -> dict[str, int]:
    """Return the version of each alias of the model."""
    query = f"select alias, version from registered_model_aliases where name = '{MODEL}'"
    return dict(rows(database, query))


def version_tags(database: Path, version: int) -> dict[str, str]:
    """Return the tags of a version."""
    return dict(rows(database, f"select key, value from model_version_tags where version = {version}"))


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of an SQL query."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return list(connection.execute(query))


def decode(png: str) -> np.ndarray:
    """Return the pixels of a served image, which is a PNG file in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).astype(int)


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a subprocess that can import this repository and start uvicorn."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **variables}


@contextmanager
def serving(command: list[str], url: str, log: Path, cwd: Path, **variables: str) -> Iterator[None]:
    """Run a server of MLflow until it answers at `url`, and stop it with all its workers afterwards."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [warm.python(), "-m", "mlflow", *command],
            env=environment(**variables),
            cwd=cwd,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240  # two imports of torch and diffusers on a busy machine
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"mlflow {command[0]} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


Ask = Callable[[dict[str, Any], dict[str, Any]], tuple[int, Any]]
"""Takes a record and params; returns the status, and the pictures or the message."""


@contextmanager
def served(version: str, database: Path, log: Path) -> Iterator[Ask]:
    """Run `mlflow models serve` on a version, such as `models:/name/1`, and yield what asks it over HTTP."""
    address = f"127.0.0.1:{free_port()}"
    command = ["models", "serve", "-m", version, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", address.partition(":")[2]]

    def ask(record: dict[str, Any], params: dict[str, Any]) -> tuple[int, Any]:
        body = json.dumps({"dataframe_records": [record], "params": params}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{address}/invocations", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)["predictions"]
        except HTTPError as refused:
            return refused.code, refused.read().decode()

    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{database}", "PYTHONPATH": ""}
    with serving(command, f"http://{address}/ping", log, Path.cwd(), **variables):
        yield ask


@contextmanager
def tracking_server(folder: Path, port: int) -> Iterator[str]:
    """Run `mlflow server` on a database and artifacts in `folder`; yield its URL."""
    folder.mkdir(exist_ok=True)
    if not (folder / "mlflow.db").exists():
        shutil.copy(_empty_database(), folder / "mlflow.db")
    url = f"http://127.0.0.1:{port}"
    command = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with serving(command, f"{url}/health", folder / "log.txt", folder):
        yield url


@cache
def _empty_database() -> Path:
    """Make MLflow's tables once; it takes seconds."""
    folder = Path(mkdtemp(prefix="mlflow-empty-"))
    code = "import sys; from mlflow.tracking import MlflowClient as C; C(sys.argv[1]).search_experiments()"
    uri = f"sqlite:///{folder}/mlflow.db"
    subprocess.run([warm.python(), "-c", code, uri], env=environment(), cwd=folder, check=True)
    return folder / "mlflow.db"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _lock() -> dict[str, Any]:
    source, target, images = "models/sources/noto", "data/targets/ink", "data/sources/noto"
    md5 = {path: f"{number:032x}.dir" for number, path in enumerate((source, target, images))}
    md5["demo/noto.yaml"] = f"{4:032x}"
    entry = {path: {"path": path, "hash": "md5", "md5": digest} for path, digest in md5.items()}
    made = {"path": f"models/adapted/{NAME}", "hash": "md5", "md5": f"{3:032x}.dir"}
    return {
        "schema": "2.0",
        "stages": {
            "prepare_source@noto": {"cmd": "…", "outs": [entry[images]]},
            "prepare_target@ink": {"cmd": "…", "outs": [entry[target]]},
            "pretrain": {"cmd": "…", "deps": [entry["demo/noto.yaml"]], "outs": [entry[source]]},
            f"finetune@{NAME}": {"cmd": "…", "deps": [entry[source], entry[target]], "outs": [made]},
            f"evaluate@{NAME}": {"cmd": "…", "deps": [made], "params": {"params.yaml": {"evaluate": {}}}},
            "finetune@another": {"cmd": "…", "deps": [entry[source]]},
        },
    }


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
