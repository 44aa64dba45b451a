#!/usr/bin/env python3
"""Time devices: latency, batches, data types, several at once, runtime options; see `--help`."""
import sys

from blendmaskd_workers.commands import eval_performance

sys.exit(eval_performance())
