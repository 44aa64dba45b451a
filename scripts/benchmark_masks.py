#!/usr/bin/env python3
"""Compare mask encoding with pasting; see `--help`."""
import sys

from blendmaskd_workers.commands import benchmark_masks

sys.exit(benchmark_masks())
