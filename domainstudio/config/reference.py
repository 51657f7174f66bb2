"""The reference of `params.yaml`, written from the settings: `python -m domainstudio.config.reference`.

Writes `docs/params.md` for people, and `docs/params.schema.json` for editors.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Mapping
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from domainstudio.config.base import Section
from domainstudio.config.settings import Settings

HEAD = """# Reference of params.yaml

`params.yaml` holds every setting. A key that is misspelt or out of range is an error that names file, line,
key and value. The file is read as DVC reads it, by YAML 1.2: `0600` is 600, `yes` and `10:00` are text.
Editors with YAML support complete and check the file, because its first line names
[its JSON Schema](params.schema.json).

`<name>` stands for a name of your own. "required" means that the key has no default.

This page is written from the settings by `python -m domainstudio.config.reference`.
"""

OVERRIDES = {"finetune": "TrainingSettings", "weights": "Method"}
"""Keys of an adaptation that take any key of another section."""


def schema() -> dict[str, Any]:
    """Return the JSON Schema of `params.yaml`."""
    content = Settings.model_json_schema()
    definitions = content["$defs"]
    for key, section in OVERRIDES.items():
        partial = {name: value for name, value in definitions[section].items() if name != "required"}
        definitions[f"{section}Overrides"] = {**partial, "title": f"{section}Overrides"}
        entry = definitions["AdaptationSettings"]["properties"][key]
        definitions["AdaptationSettings"]["properties"][key] = {
            "$ref": f"#/$defs/{section}Overrides",
            "description": entry["description"],
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **content}


def markdown() -> str:
    """Return the reference as Markdown: a table per section."""
    parts, first = [HEAD], dict[type[Section], str]()
    sections = [(path, model) for path, model in _sections("", Settings) if path]
    for path, model in sorted(sections, key=lambda section: section[0].startswith("pretrain")):
        parts.append(f"## `{path}`\n")
        if model in first:
            anchor = re.sub(r"[^a-z_-]", "", first[model])
            parts.append(f"The keys of [`{first[model]}`](#{anchor}).\n")
            continue
        first[model] = path
        rows = [_row(name, field) for name, field in model.model_fields.items() if not _nested(field)]
        parts.append(f"{cleandoc(model.__doc__ or '')}\n")
        if rows:
            parts.append("| key | values | default | |\n|---|---|---|---|\n" + "".join(rows))
    return "\n".join(parts)


def _sections(path: str, model: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """Yield a section and all sections inside it, with their dotted keys."""
    yield path, model
    for name, field in model.model_fields.items():
        found = _nested(field)
        for inner, is_mapping in found:
            key = ".".join(part for part in (path, name, "<name>" if is_mapping else "") if part)
            yield from _sections(f"{key}: {_mode(inner)}" if len(found) > 1 else key, inner)


def _nested(field: FieldInfo) -> list[tuple[type[Section], bool]]:
    """Return the sections that a field can hold, and whether under names; none for a plain value."""
    found = []
    for option in _options(field.annotation):
        if get_origin(option) is dict and _is_section(get_args(option)[1]):
            found.append((get_args(option)[1], True))
        elif _is_section(option):
            found.append((option, False))
    return found


def _options(annotation: Any) -> list[Any]:
    """Return the members of a union, also of one inside it; of any other type itself."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation]
    return [option for member in get_args(annotation) for option in _options(member)]


def _mode(section: type[Section]) -> str:
    """Return the word by which one of several sections is chosen."""
    return str(get_args(section.model_fields["mode"].annotation)[0])


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _row(name: str, field: FieldInfo) -> str:
    description = " ".join((field.description or "").split())
    value = None if field.is_required() else field.get_default(call_default_factory=True)
    default = "required" if field.is_required() else f"`{_value(value)}`"
    cells = (f"`{name}`", _type(field.annotation) + _bounds(field), default, description)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _type(annotation: Any) -> str:
    """Return a type in the words of YAML."""
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{_value(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(each) for each in arguments))
    if origin is tuple:
        return f"list of {_type(arguments[0])}s".replace("falses", "false")
    if origin is dict or origin is Mapping:
        return f"mapping to {_type(arguments[1])}"
    return names.get(annotation, "any value")


def _bounds(field: FieldInfo) -> str:
    """Return a field's limits, such as ` (≥ 1)`."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}
    found = [
        f"{sign} {_number(getattr(limit, name))}"
        for limit in field.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def _number(limit: float) -> str:
    return "2⁶³" if limit == 2**63 else f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def main(folder: Path = Path("docs")) -> None:
    """Write both files."""
    (folder / "params.md").write_text(markdown(), encoding="utf-8")
    text = json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
    (folder / "params.schema.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
