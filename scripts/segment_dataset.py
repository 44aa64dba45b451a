#!/usr/bin/env python3
"""Segment a folder or Parquet files on a Ray cluster; see `workers/cluster/program.py`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.cluster.program import main

sys.exit(main())
