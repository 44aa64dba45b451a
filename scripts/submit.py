#!/usr/bin/env python3
"""Submit images to a running daemon; see `daemon/submit.py`, or --help."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from daemon.submit import main

sys.exit(main())
