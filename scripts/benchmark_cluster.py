#!/usr/bin/env python3
"""One node against two under Ray, with the timed engine; see `tests/cluster_benchmark.py`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # what only a checkout has

from cluster_benchmark import main

sys.exit(main())
