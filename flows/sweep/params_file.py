"""Write overrides of an adaptation into params.yaml, and leave every other character of it as it is.

ruamel.yaml, which keeps comments as well, puts a new key behind the comment that heads the next section. Here
PyYAML's marks say where in the text a value stands, and what was written is read back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

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
        ConfigError: no file has the adaptation, or this cannot write to it.
    """
    for path in map(Path, reversed(files)):
        text = path.read_text(encoding="utf-8")
        wanted = _unshared(yaml.safe_load(text))
        if adaptation not in (wanted.get("adaptations") or {}):
            continue
        changes = []
        for key, value in values.items():
            place = ["adaptations", adaptation, *key.split(".")]
            before = _replace(wanted, place, value)
            if before != value:
                text = _edited(text, place, value)
                changes.append(f"{path}: {'.'.join(place)}: {before} → {value}")
        if yaml.safe_load(text) != wanted:  # as where an alias would change in another place too
            raise ConfigError(f"{path} is laid out in a way that is not written to. By hand: {changes}")
        write_text(path, text)
        return changes
    raise ConfigError(f"{', '.join(map(str, files))}: no adaptations.{adaptation} to write to")


def _unshared(value: Any) -> Any:
    """Return a copy in which every alias is a value of its own."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _replace(content: dict[str, Any], place: Sequence[str], value: Any) -> Any:
    """Set a value in nested mappings and return what was there."""
    *parents, last = place
    for part in parents:
        if not isinstance(content.get(part), dict):
            content[part] = {}
        content = content[part]
    before, content[last] = content.get(last, "not set"), value
    return before


def _edited(text: str, place: Sequence[str], value: Any) -> str:
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    for depth, part in enumerate(place):
        assert isinstance(node, yaml.MappingNode)
        rest = place[depth + 1 :]
        found = next((child for key, child in node.value if key.value == part), None)
        if found is None:
            return _added(text, node, {part: _nested(rest, value)})
        if not rest or not isinstance(found, yaml.MappingNode):
            new = _flow(_nested(rest, value))
            return text[: found.start_mark.index] + new + text[found.end_mark.index :]
        node = found
    raise AssertionError("unreachable")


def _nested(place: Sequence[str], value: Any) -> Any:
    for part in reversed(place):
        value = {part: value}
    return value


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
