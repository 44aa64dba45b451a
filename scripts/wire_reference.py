#!/usr/bin/env python3
"""Write docs/wire.md from the docstrings of blendmaskd.protocol and blendmaskd.core.stats: `python
scripts/wire_reference.py`; a test compares."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
from blendmaskd import protocol  # noqa: E402
from blendmaskd.core import stats  # noqa: E402

PAGE = ROOT / "docs" / "wire.md"
HEAD = """# The wire protocol

*Written by `scripts/wire_reference.py` from `daemon/blendmaskd/protocol.py`; edit it there.*

There is a client in [Node](examples/client.mjs), in [C](examples/client.c), in
[ten lines of Python](../README.md#a-client-in-ten-lines), and [one that uses shared memory](client.md#any-language).
"""
BOUNDS = ", ".join(f"{bound:g}" for bound in protocol.STAGE_BOUNDS_S)
STATISTICS = f"""## Statistics

The snapshot in `stats` is taken once a second; it is an empty map before the first. [statistics.md](statistics.md) says
what the figures mean. Counts, bytes, `seq` and `pid` are integers; times, rates and shares are numbers with a fraction;
`degraded` and `draining` are true or false; what is not said otherwise is text. `STAGE_BOUNDS_S` are
{BOUNDS} s; one more bucket counts what is above.
"""


def page() -> str:
    """The whole text of docs/wire.md."""
    _, _, *paragraphs = (protocol.__doc__ or "").rstrip().split("\n\n")  # the first two say what the module is
    _, _, snapshot = (stats.__doc__ or "").rstrip().partition("::\n\n")
    snapshot = snapshot.replace("None", "null").replace("`blendmaskd.wanted`", '"wanted and actual" there')
    return "\n\n".join([HEAD.strip(), *map(_markdown, paragraphs), STATISTICS.strip(), snapshot]) + "\n"


def _markdown(paragraph: str) -> str:
    """A paragraph; definitions (a name in a line, indented text below) become list items."""
    items = re.split(r"^(``[\w-]+``(?:, ``[\w-]+``)*)\n(?=    )", paragraph, flags=re.MULTILINE)
    text = items[0]
    for name, meaning in zip(items[1::2], items[2::2], strict=True):
        text += f"- {name}: " + re.sub(r"^    ", "  ", meaning, flags=re.MULTILINE).strip() + "\n"
    return text.strip("\n").replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
