#!/usr/bin/env python3
"""Compare the host's work for an image with Pillow's own; see `--help`."""
import sys

from blendmaskd_workers.commands import benchmark_host

sys.exit(benchmark_host())
