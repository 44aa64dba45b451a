#!/usr/bin/env python3
"""Compare the network as served with the plain one; `--help` tells more."""
import sys

from blendmaskd_workers.programs.benchmark_network import main

sys.exit(main())
