"""Images of prior preservation that several processes draw together."""

import numpy as np

from domainstudio.config import Method
from tests.integration.training_parts import launch
from tests.models import tiny_denoiser
from tests.unit.test_adaptation import adaptation as adaptation_of
from tests.unit.test_adaptation import image_set, prior_of

PROCESSES = """
import os, sys
import numpy as np
from domainstudio.config import Method
from domainstudio.distributed import this_process
from domainstudio.training.recipe import Recipe
from tests.unit.test_adaptation import DRAWING, adaptation

os.chdir(sys.argv[1])
process = this_process()
recipe = Recipe.load(adaptation(Method(prior=1.0)), DRAWING, process)
np.save(f"{process.process_index}.npy", recipe.prior.images)
"""


def test_all_processes_draw_the_prior_that_one_would_draw(tmp_path):
    denoiser, shots = tiny_denoiser(), image_set(8)
    denoiser.save(tmp_path / "models/sources/tiny")
    shots.save(tmp_path / "data/targets/ink/shots")
    launch(PROCESSES, tmp_path)
    first, second = (np.load(tmp_path / f"{rank}.npy").astype(int) for rank in (0, 1))
    alone = prior_of(denoiser, shots, adaptation_of(Method(prior=1.0)), tmp_path / "alone")
    assert (first == second).all()
    assert abs(first - alone.images).max() <= 1
