#!/usr/bin/env python3
"""Check an accelerator with one command, from a checkout that need not be installed; see `--help`."""
import os
import sys
from pathlib import Path

SOURCES = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("daemon", "workers")]
sys.path[:0] = SOURCES
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*SOURCES, os.environ.get("PYTHONPATH")]))  # of all processes

from blendmaskd_workers.commands import accelerator_check  # noqa: E402

sys.exit(accelerator_check())
