#!/usr/bin/env python3
"""Write a BlendMask as ONNX; see `workers/blendmaskd_workers/programs/export_onnx.py`, or --help."""
import sys

from blendmaskd_workers.commands import export_onnx

sys.exit(export_onnx())
