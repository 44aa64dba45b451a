#!/usr/bin/env python3
"""Make a checkpoint of random weights; see `workers/blendmaskd_workers/programs/random_weights.py`, or --help."""
import sys

from blendmaskd_workers.commands import random_weights

sys.exit(random_weights())
