#!/usr/bin/env python3
"""Make a checkpoint of random weights; see `workers/random_weights.py`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.random_weights import main

sys.exit(main())
