"""Two processes that hold shards of the weights (FSDP) train the model that two with all of them train."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.testing import assert_close

from domainstudio.errors import TrainingError
from domainstudio.storage import checkpoint
from domainstudio.training.sharding import is_sharded
from tests.integration.training_parts import launch

TRAIN = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from domainstudio.config import SampleSettings
from domainstudio.training.previews import previewer
from tests.integration.test_training import trainer

folder, sharded, last = Path(sys.argv[1]), sys.argv[2] == "sharded", int(sys.argv[3])
if sharded:  # what a file of `accelerate config` does on GPUs: accelerate reads it there alone
    state = Accelerator(cpu=True).state
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["ResnetBlock2D"],
    )
training = trainer(folder, steps=4, batch_size=3, checkpoint_every=2, preview_every=3, ema_decay=0.9)
training.preview = previewer(SampleSettings(number=2, steps=2), number=2)
assert (type(training.parameters[0]).__name__ == "DTensor") == sharded
take_step = training.take_step

def limited():
    if training.step == last:
        raise SystemExit
    return take_step()

training.take_step = limited
history = training.train()
if training.accelerator.is_main_process:
    training.denoiser.save(folder / "model")
    (folder / "history.json").write_text(json.dumps([record["total"] for record in history]))
"""


@pytest.mark.timeout(600)
def test_shards_give_the_same_model_also_after_an_interruption(tmp_path: Path) -> None:
    launch(TRAIN, tmp_path / "whole", "whole", 4)
    launch(TRAIN, tmp_path / "shards", "sharded", 3)
    step, state = checkpoint.latest(tmp_path / "shards") or (0, {})
    assert step == 2
    launch(TRAIN, tmp_path / "shards", "sharded", 4)

    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("whole", "shards")]
    assert histories[1] == pytest.approx(histories[0], rel=1e-4) and len(histories[0]) == 4
    network = "model/unet/diffusion_pytorch_model.safetensors"
    whole, shards = (load_file(tmp_path / name / network) for name in ("whole", "shards"))
    assert_close(shards, whole, rtol=1e-3, atol=5e-5)  # a step changes weights by 1e-3
    assert {name: value.shape for name, value in state["network"].items()} == {
        name: value.shape for name, value in whole.items()
    }
    assert (tmp_path / "shards/previews/step-000003.png").is_file()
    assert (
        json.loads((tmp_path / "shards/model/unet/config.json").read_text())["_class_name"] == "UNet2DModel"
    )


@pytest.mark.parametrize(
    "kind, version, said",
    [(DistributedType.FSDP, 1, "fsdp_version: 2"), (DistributedType.DEEPSPEED, 0, "DEEPSPEED")],
)
def test_other_ways_to_share_are_refused(kind: DistributedType, version: int, said: str) -> None:
    asked = SimpleNamespace(distributed_type=kind, is_fsdp2=version == 2)
    with pytest.raises(TrainingError, match=said):
        is_sharded(asked)
