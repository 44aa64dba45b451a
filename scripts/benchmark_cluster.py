#!/usr/bin/env python3
"""One node against two under Ray, with the timed engine; see `workers/cluster/benchmark.py`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.cluster.benchmark import main

sys.exit(main())
