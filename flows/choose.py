"""The choice among another trainer's LoRA files as a flow: `python -m stages.choose` on any node."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from domainstudio.errors import ConfigError
from domainstudio.storage import s3
from flows.run import gpus
from flows.run.commands import Commands, StageFailedError
from flows.run.workspace import WORKSPACES_VARIABLE
from flows.server import unimportant

_S3 = "s3://"


@flow(name="choose", persist_result=False)
def choose(
    adapters: str,
    shots: str,
    source: str,
    out: str,
    prompts: list[str] | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Choose among the LoRA files that another trainer saved along its training, with a GPU slot.

    Args:
        adapters: Folder of the LoRA files, or `s3://bucket/prefix`.
        shots: The images they were trained on: a folder, or `s3://bucket/prefix`.
        source: The pipeline they change: a folder, or a hub id.
        out: Where the chosen file, selection.json and report.html go: a folder, or `s3://bucket/prefix`. In
            a folder a second run goes on where the first stopped.
        prompts: To draw with; by default the images' captions.
        options: Further options of `python -m stages.choose`, such as `{"number": 32}`.
    """
    with tempfile.TemporaryDirectory(prefix="domainstudio-", dir=os.environ.get(WORKSPACES_VARIABLE)) as name:
        folder = Path(name)
        results = folder / "out" if out.startswith(_S3) else Path(out).absolute()
        given = {"adapters": _fetched(adapters, folder / "adapters"), "shots": shots, "source": source}
        command = _command({**given, "out": str(results)}, prompts or [], options or {})
        try:
            summary = _run(command, folder).replace(str(results), out.rstrip("/"))
        except StageFailedError as error:
            return Failed(message=str(error))
        if out.startswith(_S3):
            _store(results, out)
    return _told(summary, out)


def _command(given: Mapping[str, str], prompts: list[str], options: Mapping[str, Any]) -> list[str]:
    command = [sys.executable, "-m", "stages.choose"]
    for name, value in given.items():
        # The stage runs in a folder of its own: what is here is named from the root.
        command += [f"--{name}", str(Path(value).absolute()) if Path(value).exists() else value]
    for prompt in prompts:
        command += ["--prompt", prompt]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def _run(command: list[str], folder: Path) -> str:
    """Run the stage with a GPU slot, and return the line in which it names its choice."""
    commands = Commands(folder)
    with gpus.from_server(None).hold(1, lambda: commands.stopping) as devices:
        tail = commands.run(command, get_run_logger().info, "stages.choose", devices)
    return next(line for line in reversed(tail) if ".safetensors: " in line)


def _fetched(adapters: str, folder: Path) -> str:
    """Return the folder of the LoRA files, after copying them from S3 where they are there.

    Raises:
        DataError: the server cannot be reached, or refuses.
        ConfigError: there are none.
    """
    if not adapters.startswith(_S3):
        return adapters
    listed = [item for item in s3.find_objects(adapters) if s3.is_safe(item.path)]
    found = [item for item in listed if item.path.endswith(".safetensors")]
    if not found:
        raise ConfigError(f"{adapters} has no .safetensors files: correct `adapters`")
    for item in found:
        place = folder / item.path
        place.parent.mkdir(parents=True, exist_ok=True)
        s3.download(item, place)
    return str(folder)


def _store(results: Path, url: str) -> None:
    """Copy the results to S3, without the samples that they were measured on."""
    for path in sorted(results.iterdir()):
        if path.is_file():
            s3.upload(path, f"{url.rstrip('/')}/{path.name}")


def _told(summary: str, out: str) -> State[Any]:
    with unimportant("summary"):
        text = f"{summary}\n\nThe report: `{out.rstrip('/')}/report.html`\n"
        create_markdown_artifact(text, key="choice", description="The chosen LoRA file")
    return Completed(message=summary)
