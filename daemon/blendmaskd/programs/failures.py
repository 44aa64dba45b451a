"""The images that a program could not do, and the list of them at its end."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from blendmaskd import files
from blendmaskd.output import in_a_line


@dataclass(frozen=True, slots=True)
class Failure:
    """An image without a result or without an overlay."""

    path: Path
    code: str  # of `blendmaskd.protocol.Code`, or `overlay`, or `no-answer`
    reason: str


def tell_failures(console: Console, failures: Iterable[Failure]) -> None:
    """A line for each, whatever its file is called."""
    listed = [
        f"  {escape(in_a_line(files.text_of(each.path)))}: [red]{each.code}[/]: {escape(in_a_line(each.reason))}"
        for each in failures
    ]
    if listed:
        console.print("\n".join([f"[red]{len(listed)} failed:", *listed]))
