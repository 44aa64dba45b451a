#!/usr/bin/env python3
"""Load a daemon and compare it with the bare device; `--help` tells more."""
import sys

from blendmaskd_workers.benchmark.program import main

sys.exit(main())
