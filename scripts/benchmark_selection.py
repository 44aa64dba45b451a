#!/usr/bin/env python3
"""Selection against one survivor at a time; see `tests/blendmask/selection_benchmark.py`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "blendmask"))  # what only a checkout has

from selection_benchmark import main

sys.exit(main())
