"""Weights: loading them strictly, or to fine-tune, and reproducible pseudo-random ones.

Rules: every key and shape must agree, and what does not is named; only a training may begin with weights of another
number of classes, and is told which layers start anew; random weights exist only when somebody asks for them with a
seed.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from blendmaskd_workers.blendmask.checkpoint import WeightsError, load_checkpoint, naming

NAMED_AT_MOST = 5  # mismatches of one kind spelt out in an error; the others are counted
CLASSES = "proposal_generator.fcos_head.cls_logits.bias"  # has one value for each class


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the checkpoint at `path` into `model`; raises WeightsError, changing nothing, unless all of it fits."""
    weights = load_checkpoint(path)
    with naming(path):
        load_into(model, weights)


def load_to_fine_tune(model: nn.Module, path: str | Path) -> list[str]:
    """As `load_weights`, but layers as wide as there are classes may be of another number of classes.

    Those keep what `model` has, and are returned, each with the checkpoint's shape: "layer.weight (80, 256, 3, 3)".
    """
    weights, own = load_checkpoint(path), model.state_dict()
    anew = {key: own[key] for key, value in weights.items() if key in own and _differs_in_classes(key, value, own[key])}
    with naming(path):
        load_into(model, {**weights, **anew})
    return [f"{key} {tuple(weights[key].shape)}" for key in anew]


def _differs_in_classes(key: str, found: Tensor, own: Tensor) -> bool:
    return bool(_OF_CLASSES.fullmatch(key)) and found.shape != own.shape and found.shape[1:] == own.shape[1:]


_OF_CLASSES = re.compile(r"(?:proposal_generator\.fcos_head\.cls_logits|basis_module\.seg_head\.6)\.(?:weight|bias)")


def load_into(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into `model`; raises WeightsError, changing nothing, unless all keys and shapes agree."""
    wanted = model.state_dict()
    complaints = [
        _complaint("missing", [key for key in wanted if key not in weights]),
        _complaint("unexpected", [key for key in weights if key not in wanted]),
        _complaint("of another shape", [
            f"{key} (expected {tuple(wanted[key].shape)}, found {tuple(value.shape)})"
            for key, value in weights.items() if key in wanted and wanted[key].shape != value.shape
        ]),
        _complaint("of another type", [
            f"{key} (expected {_type(wanted[key])}, found {_type(value)})"
            for key, value in weights.items()
            if key in wanted and wanted[key].is_floating_point() and not value.is_floating_point()
        ]),
    ]
    if found := list(filter(None, complaints)):
        raise WeightsError(f"the weights do not fit the network: {'; '.join(found)}{_hint(wanted, weights)}")
    model.load_state_dict(weights, strict=True)


def _hint(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    if weights and not weights.keys() & wanted.keys():
        return "; no name is the network's: these are weights of another program, or of a backbone alone"
    own, found = wanted.get(CLASSES), weights.get(CLASSES)
    if own is not None and found is not None and found.shape != own.shape:
        return f"; the weights are of {len(found)} classes, MODEL.FCOS.NUM_CLASSES is {len(own)}"
    return ""


def _type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _complaint(kind: str, names: Sequence[str]) -> str:
    """Return `2 missing: a, b`, or nothing when there are none."""
    if not names:
        return ""
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return f"{len(names)} {kind}: {', '.join(names[:NAMED_AT_MOST])}{more}"


# ---- pseudo-random weights --------------------------------------------------------------------------------------

def random_weights(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Return reproducible weights for every key of `model`: the network then finds many boxes, all of them nonsense.

    Each tensor depends on its key, its shape and `seed` only, and is drawn in float64 so that every machine gets the
    same float32 values. The spreads are chosen so that activations keep their size through the network and scores
    cross the threshold.
    """
    return {key: _draw(key, value, seed) for key, value in model.state_dict().items()}


def _draw(key: str, like: Tensor, seed: int) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) ^ seed)
    normal = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    if key.endswith("running_var"):
        return ((1 + 0.2 * normal.abs()) * _shared_tower_variance(key)).to(torch.float32)
    mean, spread = _spread(key, like.shape)
    value = mean + spread * normal
    if re.fullmatch(_LAST_BASIS_CONV + "weight", key):
        value = value - value.mean(dim=1, keepdim=True)  # so that masks get both signs
    return value.to(torch.float32)


def _shared_tower_variance(key: str) -> float:
    """Return the factor on a running variance; the first norms of a shared tower tame the levels of the pyramid."""
    match = re.search(r"share_tower\.1\.(\d)\.running_var$", key)
    return (4.0, 1.8, 0.9, 1.0, 1.0)[int(match[1])] if match else 1.0


def _spread(key: str, shape: Sequence[int]) -> tuple[float, float]:
    """Return mean and standard deviation of the draw for `key`."""
    if len(shape) == 4:
        fan_in = shape[1] * shape[2] * shape[3]
        return 0.0, math.sqrt(2.0 / fan_in) * _gain(key, shape)
    for pattern, mean, spread in _VECTORS:
        if re.search(pattern, key):
            return (-3.0 if key.endswith("cls_logits.bias") and shape[0] < 20 else mean), spread
    raise WeightsError(f"no rule for random weights of {key}")


def _gain(key: str, shape: Sequence[int]) -> float:
    """Return the factor on He's standard deviation for a convolution."""
    if key.endswith("cls_logits.weight") and shape[0] < 20:
        return 1.0
    return next((gain for pattern, gain in _CONVOLUTIONS if re.search(pattern, key)), 1.0)


# The basis tower's last convolution in networks with two or three convolutions before the upsampling.
_LAST_BASIS_CONV = r"basis_module\.tower\.[45]\."

_CONVOLUTIONS = (  # the first match counts
    (r"bottom_up\.(?:stem\.conv1|base_layer\.0)\.weight$", 1 / 64),  # pixels are about +-64
    (r"conv2_offset\.weight$", 0.7),
    (r"bottom_up\.level.*\.conv2\.weight$", 0.5),  # residual sums of DLA, and its roots
    (r"bottom_up\.level.*\.root\.conv\.weight$", 1.3),
    (r"\.res4\.(?:[6-9]|[1-9]\d)\.conv3\.weight$", 0.2),  # deep stages would grow
    (r"\.fpn_lateral", 0.15),
    (r"\.conv3\.weight$", 0.5),  # keeps residual sums tame
    (r"cls_logits\.weight$", 0.70),
    (r"bbox_pred\.weight$", 1.5),
    (r"top_layer\.weight$", 1.5),
    (_LAST_BASIS_CONV + "weight$", 5.0),
)

_VECTORS = (  # pattern, mean, standard deviation; the first match counts
    (r"\.(?:weight|scale)$", 1.0, 0.1),  # of a norm, of a level
    (r"\.running_mean$", 0.0, 0.05),
    (r"conv2_offset\.bias$", 0.0, 0.5),
    (r"cls_logits\.bias$", -4.6, 0.1),
    (r"bbox_pred\.bias$", 4.0, 0.5),
    (r"basis_module\.tower\.4\.bias$", 5.0, 0.5),
    (r"basis_module\.tower\.5\.bias$", -4.5, 0.5),
    (r"\.bias$", 0.0, 0.05),
)
