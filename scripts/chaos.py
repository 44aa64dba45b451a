#!/usr/bin/env python3
"""Inject faults into a daemon under load and account for every job; see `--help`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # what only a checkout has

from chaos.program import main

sys.exit(main())
