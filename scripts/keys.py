#!/usr/bin/env python3
"""Make CURVE keys for TCP endpoints; see `daemon/keys.py`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from daemon.keys import main

sys.exit(main())

