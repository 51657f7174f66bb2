"""From vector drawings to pixels."""

from __future__ import annotations

from xml.etree import ElementTree

from domainstudio.errors import MissingExtraError

OVERSAMPLING = 4
"""Drawings are rendered at this multiple of the resolution, and then reduced like any other image."""

INSTALL = 'Install it: pip install "domainstudio[demo]"'


def rasterize_svg(
    data: bytes, resolution: int, drop: tuple[str, ...] = (), oversampling: int = OVERSAMPLING
) -> bytes:
    """Render a drawing as a PNG of `oversampling` × `resolution` pixels.

    Args:
        data: An SVG file's bytes.
        resolution: Side of the image it will become, in pixels.
        drop: Ids of the groups to leave out.
        oversampling: The multiple; the time grows with its square.

    Raises:
        MissingExtraError: resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise MissingExtraError(
            f"resvg-py, which renders the demo's drawings, is not installed. {INSTALL}"
        ) from error
    text = data.decode("utf-8")
    if drop:
        root = ElementTree.fromstring(data)
        for parent in list(root.iter()):
            for child in [child for child in parent if child.get("id") in drop]:
                parent.remove(child)
        text = ElementTree.tostring(root, encoding="unicode")
    side = oversampling * resolution
    return bytes(resvg_py.svg_to_bytes(svg_string=text, width=side, height=side))
