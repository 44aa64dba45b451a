#!/usr/bin/env python3
"""Train BlendMask; see `workers/blendmaskd_workers/training/program.py`, or --help."""
import sys

from blendmaskd_workers.commands import train

sys.exit(train())
