"""Write overrides of an adaptation into params.yaml, and leave every other character of it as it is.

ruamel.yaml (0.19) does not serve here: it puts a key that is added behind the comment that heads the next
section, indents lists anew, joins lines and writes nothing for `null`. Here PyYAML's marks say where in the
text a value stands, and what was written is read back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from domainstudio.config.base import replaced
from domainstudio.config.document import Document, parse
from domainstudio.errors import ConfigError
from domainstudio.storage.files import write_text


def write_overrides(files: Sequence[str | Path], adaptation: str, values: Mapping[str, Any]) -> list[str]:
    """Set values of an adaptation in the file that describes it.

    Args:
        files: params.yaml and its overlays, of which the last that has the adaptation is changed.
        adaptation: a key of `adaptations`.
        values: by dotted key of the adaptation, such as `method` or `weights.image`.

    Returns:
        A line for each value that is another now.

    Raises:
        ConfigError: no file has the adaptation, or its layout cannot be edited.
    """
    for path in map(Path, reversed(files)):
        text = path.read_text(encoding="utf-8")
        wanted = Document.read(path).values
        if adaptation not in (wanted.get("adaptations") or {}):
            continue
        changes = []
        for key, value in values.items():
            place = ["adaptations", adaptation, *key.split(".")]
            if (before := _value(wanted, place)) != value:
                wanted = replaced(wanted, place, value)
                text = _edited(text, yaml.compose(text, Loader=yaml.SafeLoader), place, value)
                changes.append(f"{path}: {'.'.join(place)}: {before} → {value}")
        if parse(text) != wanted:  # such as an alias, which would change in two places
            raise ConfigError(
                f"{path} is laid out in a way that cannot be edited here. Change it by hand: {changes}"
            )
        write_text(path, text)
        return changes
    raise ConfigError(f"{', '.join(map(str, files))}: no adaptations.{adaptation} to write to")


def _value(content: Any, place: Sequence[str]) -> Any:
    for part in place:
        if not isinstance(content, dict) or part not in content:
            return "not set"
        content = content[part]
    return content


def _edited(text: str, node: yaml.Node | None, place: Sequence[str], value: Any) -> str:
    """Return a text with another value at a place below a node."""
    assert node is not None
    if not place or not isinstance(node, yaml.MappingNode):
        return text[: node.start_mark.index] + _flow(replaced({}, place, value)) + text[node.end_mark.index :]
    first, *rest = place
    for key, child in node.value:
        if key.value == first:
            return _edited(text, child, rest, value)
    return _added(text, node, {first: replaced({}, rest, value)})


def _added(text: str, node: yaml.MappingNode, entry: Mapping[str, Any]) -> str:
    """Return a text with one more entry at the end of a mapping."""
    if node.flow_style:
        end = node.end_mark.index - 1
        return f"{text[:end]}{', ' if node.value else ''}{_flow(entry)[1:-1]}{text[end:]}"
    last: yaml.Node = node
    while isinstance(last, yaml.CollectionNode) and not last.flow_style:
        last = last.value[-1][1] if isinstance(last, yaml.MappingNode) else last.value[-1]
    line_end = text.find("\n", last.end_mark.index)
    head, tail = (text[:line_end], text[line_end:]) if line_end >= 0 else (text, "\n")
    indent = " " * node.start_mark.column
    lines = yaml.safe_dump(entry, sort_keys=False, allow_unicode=True).splitlines()
    return head + "".join(f"\n{indent}{line}" for line in lines) + tail


def _flow(value: Any) -> str:
    """Return a value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
