#!/usr/bin/env python3
"""Inject faults into a daemon under load and account for every job; `--help` tells more."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.chaos.program import main

sys.exit(main())
