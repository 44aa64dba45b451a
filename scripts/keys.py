#!/usr/bin/env python3
"""Make CURVE keys for TCP endpoints; see `daemon/blendmaskd/keys.py`, or --help."""
import sys

from blendmaskd.commands import keys

sys.exit(keys())

