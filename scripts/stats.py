#!/usr/bin/env python3
"""Show what a running daemon does; see `daemon/show_stats.py`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from daemon.show_stats import main

sys.exit(main())
