#!/usr/bin/env python3
"""Compare the network as served with the plain one; `--help` tells more."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.benchmark_network import main

sys.exit(main())
