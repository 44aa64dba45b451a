#!/usr/bin/env python3
"""Compare a device with the CPU, value by value and layer by layer; see `--help`."""
import sys

from blendmaskd_workers.commands import eval_precision

sys.exit(eval_precision())
