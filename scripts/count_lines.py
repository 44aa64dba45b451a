#!/usr/bin/env python3
"""Count the source: lines and functions of the packages, and of what moved from them into tests/.

    python scripts/count_lines.py                 # this checkout
    python scripts/count_lines.py HEAD~20 HEAD    # commits, a row each, with their difference

Lines are physical lines of Python; a function's are its own, with its signature and docstring.
"""
from __future__ import annotations

import argparse
import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("daemon/", "workers/", "tests/chaos/", "tests/fuzz/", "tests/shapes", "tests/cluster_")


@dataclass(frozen=True, slots=True)
class Count:
    lines: int
    functions: list[int]  # the lines of each
    largest: tuple[int, str]  # lines of the largest file, and its path


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def sources(commit: str | None) -> Iterator[tuple[str, str]]:
    """Path and text of each source file."""
    listed = git("ls-files") if commit is None else git("ls-tree", "-r", "--name-only", commit)
    for path in listed.split():
        if path.endswith(".py") and path.startswith(SOURCES):
            yield path, (ROOT / path).read_text("utf-8") if commit is None else git("show", f"{commit}:{path}")


def count(commit: str | None) -> Count:
    files = dict(sources(commit))
    nodes = (node for text in files.values() for node in ast.walk(ast.parse(text)))
    functions = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {path: text.count("\n") for path, text in files.items()}
    return Count(sum(lengths.values()), functions, max((length, path) for path, length in lengths.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="default: the checkout as it is")
    first: int | None = None
    for commit in parser.parse_args().commits or [None]:
        counted = count(commit)
        first = first or counted.lines
        print(f"{commit or 'checkout':14} {counted.lines:6} lines {counted.lines / first - 1:+7.1%}  "
              f"{len(counted.functions)} functions, median {statistics.median(counted.functions):g}, longest "
              f"{max(counted.functions)}  largest file {counted.largest[0]} ({counted.largest[1]})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
