#!/usr/bin/env python3
"""Write docs/wire.md from the docstring of daemon/blendmaskd/protocol.py: `python scripts/wire_reference.py`; a test
compares."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
from blendmaskd import protocol  # noqa: E402

PAGE = ROOT / "docs" / "wire.md"
HEAD = """# The wire protocol

*Written by `scripts/wire_reference.py` from `daemon/blendmaskd/protocol.py`; edit it there.*

The [README](../README.md#a-client-in-ten-lines) has a client in ten lines of pyzmq; [client.md](client.md#any-language)
has one that uses shared memory, and the [error codes](client.md#errors).
"""
TAIL = f"""
In the text above, `MEMORY_SUFFIX` is `{protocol.MEMORY_SUFFIX}`, and `Code` is the table of error codes. A
client's header has at most {protocol.MAX_HEADER_BYTES} bytes.
"""


def page() -> str:
    """The whole text of docs/wire.md."""
    _, _, *paragraphs = (protocol.__doc__ or "").strip().split("\n\n")  # the first two say what the module is
    return "\n\n".join([HEAD.strip(), *map(_markdown, paragraphs), TAIL.strip()]) + "\n"


def _markdown(paragraph: str) -> str:
    """A paragraph; definitions (a name in a line, indented text below) become list items."""
    items = re.split(r"^(``[\w-]+``(?:, ``[\w-]+``)*)\n(?=    )", paragraph, flags=re.MULTILINE)
    text = items[0]
    for name, meaning in zip(items[1::2], items[2::2], strict=True):
        text += f"- {name}: " + re.sub(r"^    ", "  ", meaning, flags=re.MULTILINE).strip() + "\n"
    return text.strip().replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
