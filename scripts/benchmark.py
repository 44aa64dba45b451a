#!/usr/bin/env python3
"""Load a daemon and compare it with the bare device; `--help` tells more."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.benchmark.program import main

sys.exit(main())
