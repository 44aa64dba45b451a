#!/usr/bin/env python3
"""Show what a running daemon does; see `daemon/blendmaskd/programs/stats.py`, or --help."""
import sys

from blendmaskd.commands import stats

sys.exit(stats())
