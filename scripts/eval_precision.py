#!/usr/bin/env python3
"""Compare a device with the CPU, value by value and layer by layer; `--help` tells more."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.evaluation.precision import main

sys.exit(main())
