"""What msgspec leaves out when it refuses something: the names and values that there are. Pure."""
from __future__ import annotations

import difflib
import functools
import re
from typing import Any, Literal, get_args, get_origin

import msgspec

OTHERS = {int: "a number", dict: "a map"}  # beside named values


def remedy(refusal: str, kind: Any) -> str:
    """What to add to msgspec's ``reason - at `$.field.of` `` about a value of this type; mostly nothing."""
    reason, _, where = refusal.partition(" - at `")
    if not reason.startswith("Invalid enum value") and "unknown field" not in reason:
        return ""
    for name in re.findall(r"[^$.\[\]`]+", where):
        kind = _fields(kind).get(name)
    if reason.startswith("Invalid enum value"):
        values = _values(kind)
        return f"; expected {', '.join(values)}" if values else ""
    unknown = re.search(r"unknown field `(.{1,80})`", reason)  # a longer one is nobody's slip, and costs time
    close = difflib.get_close_matches(unknown[1], _fields(kind), 1) if unknown else []
    return f"; did you mean {close[0]}?" if close else ""


@functools.lru_cache  # the types are few, and a flood of refusals must stay cheap
def _fields(kind: Any) -> dict[str, Any]:
    structs = [each for each in (kind, *get_args(kind)) if hasattr(each, "__struct_fields__")]
    return {field.name: field.type for struct in structs for field in msgspec.structs.fields(struct)}


def _values(kind: Any) -> list[str]:
    """The values of a type that names some, as they are written."""
    origin = get_origin(kind) or kind
    if origin is Literal:
        return [str(value) for value in get_args(kind)]
    return [OTHERS[origin]] if origin in OTHERS else [word for each in get_args(kind) for word in _values(each)]
