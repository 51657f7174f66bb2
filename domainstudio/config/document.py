"""A YAML file: its values, read as DVC reads them (YAML 1.2), and the line of each key."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from domainstudio.errors import ConfigError
from domainstudio.redaction import redact

Key: TypeAlias = tuple[str, ...]
"""The parts of a dotted key."""

LARGEST = 2**20
"""Characters of a file of settings. The parser runs out of its stack in some larger ones."""

DEEPEST = 10_000
"""Brackets of a file, and characters of a line, likewise."""

VALUES = 100_000
"""Values of a file: aliases of aliases are more than any memory holds."""


@dataclass(frozen=True)
class Document:
    """A file of settings.

    Attributes:
        path: The file.
        text: Its content.
        values: What it says: mappings with text as keys, lists, text, numbers, true, false and null.
    """

    path: Path
    text: str
    values: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> Document:
        """Read a file.

        Raises:
            ConfigError: it is missing, or no YAML, or not a mapping of such values. The message names file,
                line and key.
        """
        path = Path(path)
        text = _text(path)
        values = _parsed(path, text)
        if values is None or not isinstance(values, dict):
            raise ConfigError(f"{path} must hold a mapping of sections, got {type(values).__name__}")
        document = cls(path, text, values)
        for number, (key, fault) in enumerate(_faults(values)):
            if fault or number > VALUES:
                place, name = document.place(key), ".".join(key)
                raise ConfigError(f"{place}: {name}: {fault or 'its aliases are too many values'}")
        return document

    def place(self, key: Sequence[str]) -> str:
        """Return file and line of a key; of one that is not there, those of the section it belongs to."""
        nodes = list(self._along(key))
        return f"{self.path}:{nodes[-1][1]}" if nodes else str(self.path)

    def depth(self, key: Sequence[str]) -> int:
        """Return how many parts of a key are there."""
        return len(list(self._along(key)))

    def written(self, key: Sequence[str]) -> Key:
        """Return a key without the parts that are not written: names of types that a checker puts between."""
        return tuple(part for part, _ in self._along(key))

    def _along(self, key: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Yield each part of a key that is there, with its line."""
        node: Any = self._root
        for part in key:
            found = _child(node, part)
            if found is not None:
                line, node = found
                yield part, line

    @cached_property
    def _root(self) -> Any:
        from ruamel.yaml import YAML

        return YAML(typ="safe").compose(self.text)


def parse(text: str) -> Any:
    """Return what YAML says, as DVC reads it.

    Raises:
        Exception: it is no YAML. Most are `ruamel.yaml.YAMLError`.
    """
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(text)


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: run from the project's root, or name the file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read: {reason}. Correct the file, or its permissions") from error
    longest = max(map(len, text.splitlines()), default=0)
    if len(text) > LARGEST or longest > DEEPEST or sum(map(text.count, "[{")) > DEEPEST:
        raise ConfigError(f"{path} is too large or too deep for a file of settings")
    return text


def _parsed(path: Path, text: str) -> Any:
    from ruamel.yaml.error import YAMLError

    try:
        return parse(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line + 1 if mark is not None else _line_of_control(text)
        said = str(getattr(error, "problem", None) or error).partition("\n")[0]
        place = f"{path}:{line}" if line else f"{path}"
        key = ".".join(_key_at(text, line)) if line else ""
        raise ConfigError(f"{place}: {f'{key}: ' * bool(key)}not valid YAML: {redact(said)}") from error
    except Exception as error:  # of values, such as whole numbers of 5,000 digits
        raise ConfigError(f"{path} is not valid YAML: {redact(str(error))}") from error


def _line_of_control(text: str) -> int | None:
    """Return the line of the first character that YAML does not allow."""
    for number, line in enumerate(text.split("\n"), 1):
        if any(unicodedata.category(each) in ("Cc", "Cs", "Cn") and each not in "\t\r" for each in line):
            return number
    return None


def _key_at(text: str, line: int) -> Key:
    """Return the key that a line is below, by its indentation: the text is no YAML."""
    open_keys: list[tuple[int, str]] = []
    for each in text.splitlines()[:line]:
        if match := re.match(r"( *)([^\s#:\[{-][^\s:]*) *:(?:\s|$)", each):
            indent = len(match[1])
            open_keys = [*(pair for pair in open_keys if pair[0] < indent), (indent, match[2])]
    return tuple(name for _, name in open_keys)


def _faults(value: Any, key: Key = (), inside: frozenset[int] = frozenset()) -> Iterator[tuple[Key, str]]:
    """Yield every key of nested values, with why its value cannot be used, or with nothing."""
    fault = _fault(value)
    if isinstance(value, dict | list) and (id(value) in inside or len(key) > 50):
        fault = "is nested too deep"
    yield key, fault
    if isinstance(value, dict | list) and not fault:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            if isinstance(value, dict) and not isinstance(name, str):
                yield (*key, str(name)), "a key must be text: put it in quotes"
            yield from _faults(item, (*key, str(name)), inside | {id(value)})


def _fault(value: Any) -> str:
    if isinstance(value, str):
        odd = [each for each in value if unicodedata.category(each) in ("Cc", "Cs") and each not in "\n\t"]
        return f"has the character {odd[0]!a}, which cannot stand in a setting" if odd else ""
    if isinstance(value, int) and not isinstance(value, bool):
        return "" if abs(value) < 2**63 else "is a whole number of more than 64 bits"
    if value is None or isinstance(value, bool | float | dict | list):
        return ""
    return f"is a {type(value).__name__} by YAML's rules: put it in quotes if you mean text"


def _child(node: Any, part: str) -> tuple[int, Any] | None:
    """Return line and node of an entry of a mapping or a list; of a merged mapping (`<<`) too."""
    if not isinstance(node.value, list):
        return None
    if node.id == "sequence":
        inside = part.isdecimal() and int(part) < len(node.value)
        return (node.value[int(part)].start_mark.line + 1, node.value[int(part)]) if inside else None
    for key, value in node.value:
        if key.value == part:
            return key.start_mark.line + 1, value
    for key, value in node.value:
        if key.value == "<<":
            for each in value.value if value.id == "sequence" else [value]:
                if (found := _child(each, part)) is not None:
                    return found
    return None
