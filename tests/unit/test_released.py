"""The loops of other trainers: they train, and pass through the networks as often as their scripts do."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.loops import DiffusersLoop, Loop, ReleasedLoop
from tests.models import PROMPTS, tiny_text_denoiser, tiny_text_images

NUMBER = 3


def passes(denoiser):
    """Count rows and passes with gradients through UNet, encoder and decoder from here on."""
    seen: Counter[tuple[str, int, bool]] = Counter()
    parts = {"unet": denoiser.pipeline.unet, "encoder": denoiser.vae.encoder, "decoder": denoiser.vae.decoder}
    for name, part in parts.items():
        part.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({(name, len(inputs[0]), torch.is_grad_enabled()): 1})
        )
    return seen


@pytest.mark.parametrize("released", [False, True])
def test_a_loop_passes_as_its_script_does_and_trains(tmp_path, released):
    denoiser = tiny_text_denoiser()
    images = torch.from_numpy(tiny_text_images(2 * NUMBER)).float() / 127.5 - 1
    prompts = [f"{text} [V]" for text in PROMPTS[:NUMBER]] + PROMPTS[:NUMBER]
    with torch.no_grad():
        condition = denoiser.condition(prompts)
    before = {name: value.clone() for name, value in denoiser.network.state_dict().items()}
    if released:
        files = [tmp_path / f"{index}.png" for index in range(2 * NUMBER)]
        for path in files:
            Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(path)
        loop: Loop = ReleasedLoop(denoiser, images, condition, files=files, learning_rate=1e-3)
        expected = {("unet", 2 * NUMBER, True): 2, ("decoder", NUMBER, True): 2}
    else:
        loop = DiffusersLoop(denoiser, images, condition, prompts=prompts, learning_rate=1e-3)
        expected = {("unet", 2 * NUMBER, True): 1, ("encoder", 2 * NUMBER, False): 1}
    seen = passes(denoiser)
    torch.manual_seed(0)
    loop.take_step()
    assert seen == expected
    changed = {
        name.split(".")[0]
        for name, value in denoiser.network.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"unet"}
    assert all(torch.isfinite(value).all() for value in denoiser.network.state_dict().values())
