#!/usr/bin/env python3
"""Make a checkpoint of random weights; see `workers/blendmaskd_workers/programs/random_weights.py`, or --help."""
import sys

from blendmaskd_workers.programs.random_weights import main

sys.exit(main())
