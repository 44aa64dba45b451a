#!/usr/bin/env python3
"""Render the data set of textured shapes; see `tests/shapes.py`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # what only a checkout has

from shapes import main

if __name__ == "__main__":  # the rendering processes import this file
    sys.exit(main())
