#!/usr/bin/env python3
"""Submit images to a running daemon; see `daemon/blendmaskd/programs/submit.py`, or --help."""
import sys

from blendmaskd.commands import submit

sys.exit(submit())
