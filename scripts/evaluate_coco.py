#!/usr/bin/env python3
"""Measure the average precision of a running daemon; see `daemon/blendmaskd/programs/evaluate_coco.py`, or --help."""
import sys

from blendmaskd.commands import evaluate_coco

sys.exit(evaluate_coco())
