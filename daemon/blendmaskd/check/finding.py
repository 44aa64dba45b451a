"""A line of the report of `blendmaskd check`, and what programs read of all of them."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """A line of the report."""

    area: str  # device, versions, permissions, …
    level: Literal["ok", "warning", "error"]
    text: str
    remedy: str = ""  # what to do; empty for ok


def ok(area: str, text: str) -> Finding:
    return Finding(area, "ok", text)


def warning(area: str, text: str, remedy: str) -> Finding:
    return Finding(area, "warning", text, remedy)


def error(area: str, text: str, remedy: str) -> Finding:
    return Finding(area, "error", text, remedy)


def as_tree(findings: Sequence[Finding]) -> dict[str, Any]:
    """For ``--json``."""
    counts = {level: sum(finding.level == level for finding in findings) for level in ("ok", "warning", "error")}
    return {**counts, "findings": msgspec.to_builtins(findings)}
