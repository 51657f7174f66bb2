"""The benchmark of reading: both readers make the same pixels, so their times compare."""

import numpy as np

from benchmarks.reading import Photographs, draw_photographs, load
from domainstudio.config import PrepareSettings
from domainstudio.data.packing import prepare


def test_the_loader_makes_the_pixels_that_prepare_makes(tmp_path):
    paths = draw_photographs(tmp_path, 3)
    images = prepare(str(tmp_path), PrepareSettings(resolution=64)).images
    photographs = Photographs(paths, 64)
    assert all((photographs[index] == image).all() for index, image in enumerate(images))
    assert len(np.unique(images, axis=0)) == load(paths, 64) == 3
