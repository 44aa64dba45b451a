#!/usr/bin/env python3
"""Throw malformed input at blendmaskd; see `tests/fuzz/`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # what only a checkout has

from fuzz.program import main

sys.exit(main())
