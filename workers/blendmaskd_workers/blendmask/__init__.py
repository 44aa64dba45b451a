"""The BlendMask network: PyTorch, numpy, Pillow and PyYAML only; it knows nothing of daemons and workers.

`load_config`, `build`, `load_weights` make a network, `for_inference` makes it fast; `prepare`, `segment`,
`finish` use it.
"""

from blendmaskd_workers.blendmask.checkpoint import WeightsError, load_checkpoint, read_checkpoint
from blendmaskd_workers.blendmask.config import Config, ConfigError, load_config
from blendmaskd_workers.blendmask.inference import begin, blend, capture, choose, complete, instances, places, segment
from blendmaskd_workers.blendmask.model import BlendMask, Proposals, build
from blendmaskd_workers.blendmask.optimise import for_inference
from blendmaskd_workers.blendmask.postprocess import Detections, Instances, finish, paste_one, paste_window
from blendmaskd_workers.blendmask.preprocess import Prepared, collate, prepare
from blendmaskd_workers.blendmask.selection import select
from blendmaskd_workers.blendmask.weights import load_into, load_to_fine_tune, load_weights, random_weights

__all__ = [
    "BlendMask", "Config", "ConfigError", "Detections", "Instances", "Prepared", "Proposals",
    "WeightsError", "begin", "blend", "build", "capture", "choose", "collate", "complete", "finish", "for_inference",
    "instances", "load_checkpoint", "load_config", "load_into", "load_to_fine_tune", "load_weights", "paste_one",
    "paste_window", "places", "prepare", "random_weights", "read_checkpoint", "segment", "select",
]
