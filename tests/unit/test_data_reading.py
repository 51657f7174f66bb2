"""Reading one image: what is converted faithfully, and what is refused."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from domainstudio.config import PrepareSettings
from domainstudio.data.reading import FORMATS, MAX_PIXELS, flatten, prepare_image
from domainstudio.errors import DataError
from tests.models import tiny_images

RESOLUTION = 16
SETTINGS = PrepareSettings(resolution=RESOLUTION)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def prepared(image: Image.Image, form: str = "PNG", **options: Any) -> np.ndarray:
    return prepare_image(encoded(image, form, **options), SETTINGS).pixels.astype(int)


def noise(size: int = 32) -> np.ndarray:
    return tiny_images(1, side=size)[0].transpose(1, 2, 0)


def png_header(width: int, height: int) -> bytes:
    """A valid PNG signature and header that claim any size, without the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_rgb_of_the_right_size_is_unchanged() -> None:
    pixels = noise(RESOLUTION)
    result = prepare_image(encoded(Image.fromarray(pixels)), SETTINGS)
    assert (result.pixels == pixels.transpose(2, 0, 1)).all()
    assert result.pixels.dtype == np.uint8
    assert (result.width, result.height) == (RESOLUTION, RESOLUTION)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.tile(np.linspace(0, 65535, RESOLUTION).round().astype(np.uint16), (RESOLUTION, 1))
    for form in ("PNG", "TIFF"):
        pixels = prepared(Image.fromarray(ramp), form)
        assert (pixels == np.rint(ramp / 257).astype(int)).all(), form
        assert pixels[0, 0, 0] == 0 and pixels[0, 0, -1] == 255 and len(np.unique(pixels)) == RESOLUTION
    # Its transparent value is kept.
    grey = np.full((RESOLUTION, RESOLUTION), 1000, dtype=np.uint16)
    grey[:, 8:] = 40000
    pixels = prepared(Image.fromarray(grey), transparency=1000)
    assert (pixels[:, :, :8] == 255).all()
    assert (pixels[:, :, 8:] == round(40000 / 257)).all()


def test_pixels_without_a_known_white_are_refused() -> None:
    for values in (np.zeros((32, 32), np.float32), np.full((32, 32), 70000, np.int32)):
        with pytest.raises(DataError, match="no known white"):
            prepared(Image.fromarray(values), "TIFF")


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
WHITE, COLOUR = (255, 255, 255), (200, 100, 50)


@pytest.mark.parametrize(
    ("mode", "colour", "options", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), {"form": "JPEG", "quality": 95}, (255, 0, 0)),
        ("LA", (0, 128), {}, (127, 127, 127)),
        ("RGB", (9, 9, 9), {"transparency": (9, 9, 9)}, WHITE),
        # A broken or unfitting profile is taken as sRGB.
        ("RGB", COLOUR, {"icc_profile": b"nonsense"}, COLOUR),
        ("RGB", COLOUR, {"icc_profile": SRGB}, COLOUR),
        ("L", 100, {"icc_profile": SRGB}, (100, 100, 100)),
    ],
)
def test_one_colour_of_any_kind_stays_that_colour(mode, colour, options, expected) -> None:
    pixels = prepared(Image.new(mode, (32, 32), colour), **options)
    near = {"CMYK": 3, "LA": 1}.get(mode, 0)
    assert (abs(pixels - np.reshape(expected, (3, 1, 1))) <= near).all()


def test_exif_rotation_is_applied() -> None:
    upright = np.zeros((32, 32, 3), dtype=np.uint8)
    upright[:16] = 255  # white on top
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: a viewer turns it 90° clockwise
    lying = Image.fromarray(np.rot90(upright, 1).copy())
    pixels = prepared(lying, "JPEG", exif=exif, quality=95)
    assert (pixels[:, :7] > 240).all() and (pixels[:, 9:] < 15).all()

    tall = prepare_image(encoded(Image.new("RGB", (40, 24)), "JPEG", exif=exif), SETTINGS)
    assert (tall.width, tall.height) == (24, 40)


def test_transparency_shows_the_background() -> None:
    rgba = np.zeros((32, 32, 4), dtype=np.uint8)
    rgba[:, 16:] = (255, 0, 0, 255)
    blue = SETTINGS.model_copy(update={"background": "#0000ff"})
    pixels = prepare_image(encoded(Image.fromarray(rgba)), blue).pixels
    assert (pixels[:, :, 0].T == (0, 0, 255)).all() and (pixels[:, :, -1].T == (255, 0, 0)).all()


def test_the_image_itself_keeps_its_mode() -> None:
    image = Image.new("RGB", (8, 8), "red")
    image.info["transparency"] = (255, 0, 0)
    assert flatten(image, "#00ff00").getpixel((0, 0)) == (0, 255, 0)
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 0, 0))


def test_invisible_colours_do_not_bleed_into_edges() -> None:
    rgba = np.full((64, 64, 4), (255, 0, 255, 0), np.uint8)  # invisible magenta
    rgba[:, 30:] = 255
    assert (prepared(Image.fromarray(rgba)) == 255).all()


def test_palette_with_alpha() -> None:
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.paste(1, (16, 0, 32, 32))
    pixels = prepared(palette, transparency=b"\x00\xff")
    assert (pixels[:, :, 0] == 255).all() and (pixels[:, 0, -1] == (0, 255, 0)).all()
    indexed = prepared(palette, transparency=1)
    assert (indexed[:, :, 0] == 0).all() and (indexed[:, :, -1] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_every_common_mode_gives_white_for_white(mode: str) -> None:
    assert (prepared(Image.new("RGB", (32, 32), "white").convert(mode)) == 255).all()


def test_a_colour_profile_is_applied() -> None:
    """A profile whose red and blue primaries are swapped must swap the channels."""
    swapped = SRGB.replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")
    for name in "sRGB".encode("utf-16-be"), b"sRGB":
        swapped = swapped.replace(name, b"x" * len(name))
    red = prepared(Image.new("RGB", (32, 32), (255, 0, 0)), icc_profile=swapped)
    assert (red[0] < 5).all() and (red[2] > 250).all()
    rgba = prepared(Image.new("RGBA", (32, 32), (255, 0, 0, 255)), icc_profile=swapped)
    assert (rgba == red).all()


def test_crop_keeps_the_centre_and_pad_keeps_everything() -> None:
    wide = np.zeros((32, 96, 3), dtype=np.uint8)
    wide[:, 32:64] = (0, 200, 0)
    data = encoded(Image.fromarray(wide))
    cropped = prepare_image(data, SETTINGS).pixels
    assert (cropped[1] == 200).all() and (cropped[0] == 0).all()

    settings = PrepareSettings(resolution=24, crop="pad", background="#ff0000")
    padded = prepare_image(data, settings).pixels
    assert (padded[:, :8].transpose(1, 2, 0) == (255, 0, 0)).all()
    assert (padded[:, 16:].transpose(1, 2, 0) == (255, 0, 0)).all()
    assert (padded[0, 8:16] == 0).all() and padded[1, 12, 12] == 200


def test_a_very_long_image_is_padded_without_filling_the_memory() -> None:
    strip = Image.new("RGB", (60000, 16), "black")
    pixels = prepare_image(encoded(strip), PrepareSettings(resolution=16, crop="pad")).pixels
    assert ((pixels == 0).all(axis=(0, 2))).sum() == 1


def test_the_resize_is_antialiased() -> None:
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert (abs(prepared(Image.fromarray(checks))[:, 2:-2, 2:-2] - 127.5) < 8).all()


def cut(form: str) -> bytes:
    whole = encoded(Image.fromarray(noise(64)), form)
    return whole[: len(whole) // 2]


def frames(form: str) -> bytes:
    first, *others = (Image.fromarray(np.roll(noise(), shift, axis=0)) for shift in range(3))
    return encoded(first, form, save_all=True, append_images=others)


NO_IMAGE = [b"", b"hello", b"<html></html>", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
SIZES = [(MAX_PIXELS // 10000 + 1, 10000), (60000, 60000)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *((cut(form), "damaged|not a readable image") for form in FORMATS),
        *((data, "damaged|not a readable image") for data in NO_IMAGE),
        *((frames(form), r"animated or multi-page \(3 frames\)") for form in ("GIF", "PNG", "WEBP", "TIFF")),
        *((png_header(*size), "too large") for size in SIZES),
        (png_header(1, MAX_PIXELS), "too small: 1×100000000"),  # would be 3.5 GB when decoded
        (png_header(20, 1_000_000), "too long: 20×1000000"),
    ],
)
def test_what_cannot_be_read_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_image(data, SETTINGS)


@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_one_flipped_bit_anywhere_in_a_png_is_noticed(mode: str) -> None:
    whole = encoded(Image.fromarray(noise()).convert(mode))
    for place in range(0, len(whole) - 12, 31):  # all but the end's own chunk, which holds nothing
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        with pytest.raises(DataError):
            prepare_image(bytes(changed), SETTINGS)


def test_a_photograph_with_a_second_picture_inside_is_a_still() -> None:
    first, second = Image.new("RGB", (32, 32), (250, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 250))
    pixels = prepared(first, "MPO", save_all=True, append_images=[second])
    assert (pixels[0] > 240).all() and (pixels[2] < 10).all()


def test_the_smallest_side_counts() -> None:
    settings = SETTINGS.model_copy(update={"min_size": 20})
    assert prepare_image(encoded(Image.new("RGB", (20, 40))), settings).height == 40
    with pytest.raises(DataError, match=r"too small: 19×40, prepare.min_size is 20"):
        prepare_image(encoded(Image.new("RGB", (19, 40))), settings)
