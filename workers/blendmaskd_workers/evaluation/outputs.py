"""What an evaluation program leaves in its output folder."""
from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blendmaskd.programs.errors import UsageError

NO_PICTURES = "no pictures: matplotlib is not installed; pip install 'blendmaskd[plots]'"


def make(folder: Path) -> None:
    """The folder, before hours are spent on what is to lie there. Raises `UsageError` where no file can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"--output-dir {folder}: {error.strerror}") from None


def write(folder: Path, program: str, report: Mapping[str, Any], log: str) -> None:
    """``PROGRAM_eval.log`` and ``.json``, and pictures where matplotlib is installed; the log is also printed.

    Raises OSError.
    """
    try:
        (folder / f"{program}_eval.log").write_text(log, encoding="utf-8")
        (folder / f"{program}_eval.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    finally:  # even if the disk is full
        print(log, end="")
    try:
        plots = importlib.import_module("blendmaskd_workers.evaluation.plots")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        print(NO_PICTURES, file=sys.stderr)
        return
    for name, figure in getattr(plots, program)(report).items():
        figure.savefig(folder / f"{name}.png", dpi=110)
