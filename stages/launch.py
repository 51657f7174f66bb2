"""Several processes for a stage: it starts itself again under `accelerate launch`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from domainstudio.config import LaunchSettings

LAUNCHED = "DOMAINSTUDIO_LAUNCHED"
"""Set in the processes that a launcher has started."""


def launch(module: str, settings: LaunchSettings) -> None:
    """Go on as one of several processes: does not return where there are to be more than this one.

    Args:
        module: the stage's, such as `stages.finetune`.
        settings: how many, or accelerate's own file.
    """
    if (settings.processes == 1 and settings.accelerate_config is None) or LAUNCHED in os.environ:
        return
    import torch

    number = str(settings.processes)
    if settings.accelerate_config is not None:
        launcher = ["accelerate.commands.launch", "--config_file", settings.accelerate_config, "--module"]
    elif torch.cuda.is_available():
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", number]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--module"]
    else:  # accelerate starts several processes on CPUs by MPI alone; it takes over those of torch as well
        launcher = [
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(settings.processes),
            "-m",
        ]
    os.environ[LAUNCHED] = "1"
    sys.stdout.flush()
    # In the place of this process, so that whoever ends the stage ends the launcher, which ends the others.
    os.execv(sys.executable, [sys.executable, "-m", *launcher, module, *sys.argv[1:]])
