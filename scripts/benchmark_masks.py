#!/usr/bin/env python3
"""Compare mask encoding with pasting; `--help` tells more."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers.benchmark_masks import main

sys.exit(main())
