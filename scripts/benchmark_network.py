#!/usr/bin/env python3
"""Compare the network as served with the plain one; see `--help`."""
import sys

from blendmaskd_workers.commands import benchmark_network

sys.exit(benchmark_network())
