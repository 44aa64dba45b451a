#!/usr/bin/env python3
"""Segment photographs from a clone, without installing anything but the requirements.

    python scripts/inference.py --config configs/BlendMask/R_50_1x.yaml --weights model_final.pth \
        --input photo.jpg --output result.jpg --device npu
"""
import sys

from blendmaskd_workers.programs.inference import main

if __name__ == "__main__":
    sys.exit(main())
