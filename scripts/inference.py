#!/usr/bin/env python3
"""Segment photographs from a clone, with nothing installed but the extra serve.

    python scripts/inference.py --config configs/BlendMask/R_50_1x.yaml --weights model_final.pth \
        --input photo.jpg --output result.jpg --device npu
"""
import sys

from blendmaskd_workers.commands import inference

if __name__ == "__main__":
    sys.exit(inference())
