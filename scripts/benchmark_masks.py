#!/usr/bin/env python3
"""Compare mask encoding with pasting; `--help` tells more."""
import sys

from blendmaskd_workers.programs.benchmark_masks import main

sys.exit(main())
