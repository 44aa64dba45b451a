#!/usr/bin/env python3
"""Segment a folder or Parquet files on a Ray cluster; see `workers/blendmaskd_workers/cluster/program.py`, or
--help."""
import sys

from blendmaskd_workers.commands import segment_dataset

sys.exit(segment_dataset())
