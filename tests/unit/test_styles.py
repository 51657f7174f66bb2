"""Images in styles, and what is said of them."""

from typing import get_args

import numpy as np
import pytest

from domainstudio.config import Style
from domainstudio.demo.styles import STYLES, in_style, with_styles

BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)


def pixels(*colours):
    """Return images of one pixel."""
    return np.array(colours, np.uint8)[:, :, None, None]


def colours_of(images):
    return [tuple(image[:, 0, 0]) for image in images]


def test_every_style_that_may_be_set_exists():
    assert set(STYLES) == set(get_args(Style))


@pytest.mark.parametrize(
    "style, black, white, red",
    [
        ("grey", (0, 0, 0), (255, 255, 255), (76, 76, 76)),
        ("sepia", (64, 31, 5), (255, 242, 204), (121, 94, 65)),
        ("blueprint", (255, 255, 255), (26, 64, 153), (186, 198, 225)),
        ("negative", (255, 255, 255), (0, 0, 0), (0, 255, 255)),
        ("pastel", (166, 166, 166), (255, 255, 255), (255, 166, 166)),
        ("stencil", (0, 0, 0), (255, 255, 255), (0, 0, 0)),
    ],
)
def test_a_style_changes_colours(style, black, white, red):
    assert colours_of(in_style(pixels(BLACK, WHITE, RED), style)) == [black, white, red]


def test_half_of_the_images_are_as_they_are():
    images, texts = with_styles(pixels(RED, WHITE), [["a", "b"], ["c"]], ["negative", "grey"])
    added = [
        [f"{text} in {style} style" for text in each]
        for style in ("negative", "grey")
        for each in ("ab", "c")
    ]
    assert texts == [["a", "b"], ["c"]] * 2 + added
    assert colours_of(images) == [RED, WHITE] * 2 + [(0, 255, 255), BLACK, (76, 76, 76), WHITE]
    images, texts = with_styles(pixels(RED), [["a"]], [])
    assert colours_of(images) == [RED] and texts == [["a"]]
