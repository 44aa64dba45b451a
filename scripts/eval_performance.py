#!/usr/bin/env python3
"""Time devices: latency, batches, data types, several at once, runtime options; `--help` tells more."""
import sys

from blendmaskd_workers.evaluation.performance import main

sys.exit(main())
