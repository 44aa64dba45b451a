#!/usr/bin/env python3
"""Time devices: latency, batches, data types, several at once, runtime options; `--help` tells more."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.evaluation.performance import main

sys.exit(main())
