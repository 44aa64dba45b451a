#!/usr/bin/env python3
"""Measure the average precision of a running daemon; see `daemon/blendmaskd/programs/evaluate_coco.py`, or --help."""
import sys

from blendmaskd.programs.evaluate_coco import main

sys.exit(main())
