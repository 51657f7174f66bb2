"""Pages in Markdown, made from templates."""

from __future__ import annotations

from typing import Any


def render(package: str, name: str, **values: Any) -> str:
    """Fill a template of a package, in its folder `templates`.

    The filter `code` makes a text inline code that a table's cell can hold.
    """
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader(package)
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["code"] = lambda text: f"`{text}`".replace("|", "\\|")
    return environment.get_template(name).render(values)
