#!/usr/bin/env python3
"""Make CURVE keys for TCP endpoints; see `daemon/blendmaskd/keys.py`, or --help."""
import sys

from blendmaskd.keys import main

sys.exit(main())

