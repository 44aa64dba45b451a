"""What msgspec leaves out when it refuses something: the names and values that there are. Pure."""
from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

OTHERS = {int: "a number", dict: "a map"}  # beside named values


def choices(kind: Any) -> list[str]:
    """The values of a type that names some, as they are written."""
    origin = get_origin(kind) or kind
    if origin is Literal:
        return [str(value) for value in get_args(kind)]
    return [OTHERS[origin]] if origin in OTHERS else [word for each in get_args(kind) for word in choices(each)]


def instead(unknown: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(unknown, known, 1)
    return f"; did you mean {close[0]}?" if close else ""
