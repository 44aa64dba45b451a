"""The numbers of targets and losses. Must never import torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LossConfig:
    """The defaults are AdelaiDet's."""

    size_bounds: tuple[float, ...] = (64, 128, 256, 512)  # pixels: farthest sides that p3, p4, ... are for
    centre_radius: float = 1.5  # strides: how far from a box's centre its positive locations lie
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    class_weight: float = 1.0
    mask_weight: float = 1.0
    semantic_weight: float = 0.3
