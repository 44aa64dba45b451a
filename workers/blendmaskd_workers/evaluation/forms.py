"""Lines of text that are written and read back by one and the same form.

`Form("batch={batch:2d}: {median_ms:.2f}ms")` writes a mapping with str.format, and finds such lines in a text and reads
them into mappings: numbers as the format says, anything else as text. Nothing of a particular log belongs here.
"""
from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

NUMBERS: Mapping[type, str] = {int: r"\s*[+-]?\d+", float: r"\s*[+-]?(?:[\d.]+(?:e[+-]?\d+)?|nan|inf)", str: ".+?"}


class Form:
    """One kind of line, or of several lines that belong together."""

    def __init__(self, template: str) -> None:
        self._template = template
        self._types: dict[str, type] = {}
        pattern = ""
        for literal, name, spec, _ in string.Formatter().parse(template):
            pattern += re.escape(literal)
            if name:
                self._types[name] = _type(spec or "")
                pattern += f"(?P<{name}>{NUMBERS[self._types[name]]})"
        self._pattern = re.compile(f"^{pattern}$", re.MULTILINE)

    @property
    def names(self) -> set[str]:
        """The values that it shows."""
        return set(self._types)

    def write(self, values: Mapping[str, Any]) -> str:
        """The text; `values` may hold more than it shows."""
        return self._template.format_map(values)

    def read(self, text: str) -> list[dict[str, Any]]:
        """The values of each place in a text that has this form, in order."""
        return [
            {name: type_(found[name]) for name, type_ in self._types.items()} for found in self._pattern.finditer(text)
        ]


def _type(spec: str) -> type:
    if spec.endswith("d"):
        return int
    return float if spec.endswith(("f", "e")) else str
