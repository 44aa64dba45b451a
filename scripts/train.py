#!/usr/bin/env python3
"""Train BlendMask; see `workers/training/program.py`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.training.program import main

sys.exit(main())
