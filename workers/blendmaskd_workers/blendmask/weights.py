"""Checkpoints: reading them, loading them strictly, and reproducible pseudo-random weights.

Rules: a file is unpickled as weights only, so that it cannot run code; every key and shape must agree, and what does
not is named; random weights exist only when somebody asks for them with a seed.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

NAMED_AT_MOST = 5  # mismatches of one kind spelt out in an error; the others are counted


class WeightsError(ValueError):
    """A checkpoint that cannot be read or does not fit the network."""


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint in detectron2's form, `{"model": {key: tensor}, ...}`, onto the CPU.

    Raises WeightsError if the file cannot be read, is not of that form, or would need code to be unpickled.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged file makes torch.load raise a dozen kinds, AssertionError among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: is not a PyTorch checkpoint of plain tensors: {reason}") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise WeightsError(f'{path}: expected {{"model": state dict}} as AdelaiDet saves it, found no "model" in it')
    for key, value in model.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"{path}: {key} is a {type(value).__name__}, not a tensor")
    return model


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
    ]
    found = [complaint for complaint in complaints if complaint]
    if found:
        raise WeightsError(f"the weights do not fit the network: {'; '.join(found)}")
    model.load_state_dict(weights, strict=True)


def _complaint(kind: str, names: Sequence[str]) -> str:
    """Return `2 missing: a, b`, or nothing when there are none."""
    if not names:
        return ""
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return f"{len(names)} {kind}: {', '.join(names[:NAMED_AT_MOST])}{more}"


# ---- pseudo-random weights --------------------------------------------------------------------------------------

def random_weights(model: nn.Module, seed: int = 0, class_bias: float | None = None) -> dict[str, Tensor]:
    """Return reproducible weights for every key of `model`: the network then finds many boxes, all of them nonsense.

    Each tensor depends on its key, its shape and `seed` only, and is drawn in float64 so that every machine gets the
    same float32 values. The spreads are chosen so that activations keep their size through the network and scores
    cross the threshold. `class_bias` replaces the mean of the class scores' bias.
    """
    return {key: _draw(key, value, seed, class_bias) for key, value in model.state_dict().items()}


def _draw(key: str, like: Tensor, seed: int, class_bias: float | None) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) ^ seed)
    normal = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    if key.endswith("running_var"):
        return ((1 + 0.2 * normal.abs()) * _shared_tower_variance(key)).to(torch.float32)
    mean, spread = _spread(key, like.shape)
    if class_bias is not None and key.endswith("cls_logits.bias"):
        mean = class_bias
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
