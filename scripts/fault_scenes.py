#!/usr/bin/env python3
"""Six scenes in which other servers were measured, on this one; see `--help`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # what only a checkout has

from chaos.fault_scenes import main

sys.exit(main())
