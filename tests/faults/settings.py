"""Damaged and mistaken settings."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

from dvc.utils.serialize import parse_yaml

from domainstudio import config
from domainstudio.errors import ConfigError
from tests.faults.cases import WrongError
from tests.faults.damage import damaged
from tests.modules import ROOT

VALUES = (
    *("", "~", "null", "true", "false", "yes", "no", "on", "[]", "{}", "[[]]", "{a: 1}", "[1, 2]", "[null]"),
    *("0", "-1", "1", "1.0", "0.5", "1e-3", "1e400", ".inf", "-.inf", ".nan", "0600", "0x10", "0o17"),
    *("10:00", "1_000", "99999999999", "9223372036854775807", "9223372036854775808", "9" * 400, "9" * 5000),
    *("a/b", "../x", "a b", "'a:b'", '"\\0"', '"\\u202e"', '"a\\nb"', "~user", "s3://", "https://u:p@host/x"),
    *("2001-01-01", "!!binary aGk=", "!!set {a}", "&a [*a]", "*a", "!!int x", "<<", "x" * 3000, "[true]"),
)
"""What somebody may write in the place of a value."""


class MistakenSettings:
    """Settings are refused by file, line, key and value, or mean what DVC reads."""

    name, weight = "settings", 12.0

    def __init__(self, folder: Path) -> None:
        self.path = folder / "params.yaml"
        self.text = (ROOT / "params.yaml").read_text(encoding="utf-8")
        lines = self.text.splitlines()
        self.keys = [index for index, line in enumerate(lines) if re.match(r" *[\w-]+: *[^ #]", line)]
        self.sections = [index for index, line in enumerate(lines) if re.match(r" *[\w-]+:", line)]

    def case(self, rng: random.Random) -> str:
        change = rng.choice((self._value, self._value, self._value, self._lines, self._bytes))
        self.path.write_bytes(change(rng))
        try:
            settings = config.load(self.path)
        except ConfigError as error:
            _check_message(str(error), self.path)
            return "refused"
        try:
            read = parse_yaml(self.path.read_text(encoding="utf-8"), str(self.path))
        except Exception as error:
            raise WrongError(f"read, and DVC does not read it: {error}") from error
        _compare(read, settings.model_dump(), "")
        return "read as written"

    def _value(self, rng: random.Random) -> bytes:
        lines = self.text.splitlines()
        index = rng.choice(self.keys)
        key = lines[index][: lines[index].index(":")]
        lines[index] = f"{key}: {rng.choice(VALUES)}"
        return "\n".join(lines).encode()

    def _lines(self, rng: random.Random) -> bytes:
        """Leave a line out, repeat one, misspell a key, or indent it otherwise."""
        lines = self.text.splitlines()
        index, way = rng.choice(self.sections), rng.randrange(5)
        line = lines[index]
        changed: tuple[list[str], ...] = (
            [],
            [line, line],
            [line.replace(":", "s:", 1)],
            [f"  {line}"],
            [line.replace("  ", "", 1)],
        )
        lines[index : index + 1] = changed[way]
        return "\n".join(lines).encode()

    def _bytes(self, rng: random.Random) -> bytes:
        return damaged(self.text.encode(), rng)


def _check_message(message: str, path: Path) -> None:
    first, *rest = message.splitlines()
    if str(path) not in first:
        raise WrongError(f"a refusal that does not name the file: {message[:200]}")
    whole = ("cannot be read", "must hold a mapping", "too large", "is not valid YAML", ": not valid YAML")
    for line in rest or ([] if any(each in first for each in whole) else [first]):
        if not re.search(rf"{re.escape(str(path))}:\d+: .+: ", line) and "Field required" not in line:
            raise WrongError(f"a refusal without line and key: {line[:300]}")
    if "u:p@" in message:
        raise WrongError(f"a password is shown: {message[:300]}")


def _compare(read: Any, loaded: Any, key: str) -> None:
    """Compare what DVC reads with what was loaded."""
    if isinstance(read, dict):
        for name, value in read.items():
            if not isinstance(loaded, dict) or name not in loaded:
                raise WrongError(f"{key}.{name} was read and is not there")
            _compare(value, loaded[name], f"{key}.{name}")
    elif isinstance(read, list):
        if not isinstance(loaded, list | tuple) or len(read) != len(loaded):
            raise WrongError(f"{key} is {loaded!r}, read {read!r}")
        for index, value in enumerate(read):
            _compare(value, loaded[index], f"{key}.{index}")
    elif not _same(read, loaded):
        raise WrongError(f"{key} is {loaded!r}, read {read!r}")


def _same(read: Any, loaded: Any) -> bool:
    if isinstance(loaded, float) and not math.isfinite(loaded):
        return False
    if isinstance(read, bool) or isinstance(loaded, bool):
        words = {True: ("yes", "on", "true", "1", "y", "t"), False: ("no", "off", "false", "0", "n", "f")}
        return read is loaded or (isinstance(loaded, bool) and str(read).lower() in words[loaded])
    if isinstance(loaded, float) and isinstance(read, int):
        return float(read) == loaded
    if isinstance(read, str) and isinstance(loaded, int | float):  # a number in quotes
        return float(read.replace("_", "")) == loaded
    return bool(read == loaded)
