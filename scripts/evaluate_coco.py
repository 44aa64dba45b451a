#!/usr/bin/env python3
"""Measure the average precision of a running daemon; see `daemon/evaluate_coco.py`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from daemon.evaluate_coco import main

sys.exit(main())
