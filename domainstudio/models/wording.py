"""What the source model is told where the adapted one is told something: prompts, by their templates."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from domainstudio.config import PromptSettings


@dataclass(frozen=True)
class Wording:
    """The adapted model's texts by patterns, and the source model's text for each.

    Attributes:
        pairs: a regular expression of a whole text, with the groups `caption` and `label`, and the template
            that these fill. The first that fits decides.
    """

    pairs: Sequence[tuple[str, str]] = ()

    @classmethod
    def of(cls, prompts: PromptSettings) -> Wording:
        """Return the wording of an adaptation's prompts.

        >>> Wording.of(PromptSettings()).for_source("a dog in [V] style")
        'a dog'
        """
        pairs = [prompts, *prompts.by_label.values()]
        return cls(tuple((_pattern(pair.target), _template(pair.source, pair.target)) for pair in pairs))

    def for_source(self, text: str) -> str:
        """Return the source model's text for one of the adapted model; without a pair that fits, the same."""
        for pattern, template in self.pairs:
            if text and (match := re.fullmatch(pattern, text, re.DOTALL)):
                return template.format(**match.groupdict())
        return text


def _pattern(template: str) -> str:
    """Return the regular expression of a template's texts; a field seen before repeats itself."""
    parts, seen = [], set[str]()
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(re.escape(literal))
        if name is not None:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>.*)")
            seen.add(name)
    return "".join(parts)


def _template(source: str, target: str) -> str:
    """Return the source's template with nothing in the place of fields that the target's one lacks."""
    known = {name for _, name, _, _ in string.Formatter().parse(target)}
    text = ""
    for literal, name, _, _ in string.Formatter().parse(source):
        text += literal.replace("{", "{{").replace("}", "}}")
        text += f"{{{name}}}" if name is not None and name in known else ""
    return text.strip()
