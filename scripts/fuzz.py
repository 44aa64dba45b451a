#!/usr/bin/env python3
"""Throw malformed input at blendmaskd; see `workers/fuzz/`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.fuzz.program import main

sys.exit(main())
