"""What a program has printed reaches its reader, or the program says why not: quietly into a pipe that was closed, with
the reason on a full disk."""
from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import textwrap
from typing import IO

EXIT_CLOSED, EXIT_OUTPUT, EXIT_INTERRUPTED = 1, 4, 130


class Help(argparse.RawDescriptionHelpFormatter):
    """A description as it stands, but for paragraphs that the terminal is too narrow for; not examples and tables."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(self._filled(paragraph, width) for paragraph in text.strip("\n").split("\n\n"))

    def _filled(self, paragraph: str, width: int) -> str:
        fits = all(len(line) <= width for line in paragraph.splitlines())
        as_it_stands = fits or re.search(r"(?m)^ |\S  ", paragraph)
        return paragraph if as_it_stands else textwrap.fill(paragraph, width, break_on_hyphens=False)


def print_anything() -> None:
    """From now on all text can be printed: what the terminal's encoding lacks is escaped, as on Python's stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def complete(name: str, code: int) -> int:
    """The exit code of a program that ends with this one, when all that it printed is out."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        return lost(name, error)
    return code


def lost(name: str, error: OSError) -> int:
    """The exit code of a program whose output cannot be written; the reason is said on stderr."""
    _discard(sys.stdout)
    if isinstance(error, BrokenPipeError):
        return EXIT_CLOSED
    complain(f"{name}: cannot write its output: {error.strerror}")
    return EXIT_OUTPUT


def complain(text: str) -> None:
    """Say it on stderr, if anybody can read that. What it quotes of others has no power over a terminal."""
    try:
        print("\n".join(map(in_a_line, text.split("\n"))), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def in_a_line(text: str) -> str:
    """Without line ends and control characters, which a client or a file's name may have."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _discard(stream: IO[str]) -> None:
    """What is left in it must not be tried again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
