#!/usr/bin/env python3
"""Load a daemon and compare it with the bare device; see `--help`."""
import sys

from blendmaskd_workers.commands import benchmark

sys.exit(benchmark())
