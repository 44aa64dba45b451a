"""The numbers of one BlendMask network, read from AdelaiDet's own YAML keys.

Rules: a key that could change inference is either honoured or refused by name; a key that cannot is on an explicit
allow-list; any other key is unknown and refused (a misspelt key must not pass in silence). Values that a file leaves
out take AdelaiDet's own defaults, which are not always BlendMask's values. Nothing here may import torch.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SIZE_DIVISOR = 32  # padded heights and widths are multiples of it: the stride of res5 (p6 and p7 do not count)


class ConfigError(ValueError):
    """A configuration file that cannot be read, or asks for something this network does not do."""


@dataclass(frozen=True)
class Config:
    """All numbers of the network and of its pre- and post-processing. Sizes are in pixels."""

    # image
    min_size: int  # shorter side after resizing
    max_size: int  # longer side at most
    channel_order: str  # "BGR" or "RGB": what the network was trained on
    pixel_mean: tuple[float, ...]  # in channel_order, 0..255
    pixel_std: tuple[float, ...]
    # backbone
    depth: int  # 18, 34, 50, 101 or 152
    stride_in_1x1: bool  # bottleneck blocks: stride in the first 1x1 convolution instead of the 3x3
    fpn_channels: int
    # FCOS head
    num_classes: int
    num_cls_convs: int
    num_box_convs: int
    strides: tuple[int, ...]  # of p3..p7
    # selection of boxes
    threshold_with_centreness: bool  # threshold class score times centre-ness instead of the class score alone
    score_threshold: float
    pre_nms_topk: int  # per level and image
    nms_threshold: float
    post_nms_topk: int  # per image
    # bases and blender
    num_bases: int
    basis_channels: int
    basis_convs: int
    semantic_classes: int | None  # of the training-only semantic head; None: the network has no such head
    attention_size: int
    resolution: int  # side of an instance's mask before it is pasted


def load_config(path: str | Path) -> Config:
    """Read a YAML file in AdelaiDet's form, with `_BASE_` files merged below it.

    Raises ConfigError naming the key, its value and what is supported.
    """
    given = dict(_flatten(_load_yaml(Path(path), ())))
    for key in given:
        if key not in _READ and key not in _FIXED and not _cannot_change_inference(key):
            raise ConfigError(f"{path}: unknown key {key} = {given[key]!r}: BlendMask inference does not know it")
    for key, fixed in _FIXED.items():
        value = given.get(key, fixed.default)
        if not _is_among(value, fixed.supported):
            raise _refusal(path, key, value, given, " or ".join(repr(v) for v in fixed.supported))
    fields = {}
    for key, read in _READ.items():
        value = given.get(key, read.default)
        if not read.accepts(value):
            raise _refusal(path, key, value, given, read.supported)
        fields[read.field] = float(value) if isinstance(read.default, float) else value
    return _assemble(path, given, fields)


def _assemble(path: str | Path, given: Mapping[str, Any], fields: dict[str, Any]) -> Config:
    """Check what involves two keys and build the Config."""
    bottleneck = fields["depth"] >= 50
    res2, wanted = fields.pop("res2_channels"), 256 if bottleneck else 64
    if res2 != wanted:
        raise _refusal(path, "MODEL.RESNETS.RES2_OUT_CHANNELS", res2, given,
                       f"{wanted} with MODEL.RESNETS.DEPTH {fields['depth']}")
    if not fields.pop("loss_on"):
        fields["semantic_classes"] = None
    return Config(**fields)


def _refusal(path: str | Path, key: str, value: object, given: Mapping[str, Any], supported: str) -> ConfigError:
    origin = "" if key in given else " (AdelaiDet's default)"
    return ConfigError(f"{path}: {key} = {value!r}{origin} is not supported; supported: {supported}")


# ---- reading YAML as detectron2 does ---------------------------------------------------------------------------

def _load_yaml(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """Load one file and, under it, its `_BASE_` (relative to the file that names it)."""
    path = path.expanduser().resolve()
    if path in below:
        raise ConfigError(f"{path}: _BASE_ leads back to this file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(content).__name__}")
    base = content.pop("_BASE_", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise ConfigError(f"{path}: _BASE_ = {base!r} is not supported; supported: one file name")
    return _merge(_load_yaml(path.parent / Path(base).expanduser(), (*below, path)), content)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their decoded values."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _decode(value)


def _decode(value: Any) -> Any:
    """detectron2 evaluates strings as Python literals ("(256,)", "1e-4"); lists and tuples are interchangeable."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return value
    return tuple(_decode(item) for item in value) if isinstance(value, (list, tuple)) else value


# ---- the keys ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Read:
    """A key whose value becomes a field of Config."""

    field: str
    default: Any  # AdelaiDet's
    accepts: Callable[[Any], bool]
    supported: str  # in words, for the refusal


@dataclass(frozen=True)
class _Fixed:
    """A key that this network honours only at the values listed."""

    default: Any  # AdelaiDet's
    supported: tuple[Any, ...]


def _is_among(value: Any, choices: tuple[Any, ...]) -> bool:
    """Like `in`, but True is not 1 and 2.0 is not 2: a value of another type is a mistake."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _positive(field: str, default: int) -> _Read:
    return _Read(field, default, lambda v: _is_int(v, 1), "a whole number from 1")


def _flag(field: str, default: bool) -> _Read:
    return _Read(field, default, lambda v: isinstance(v, bool), "True or False")


def _one_of(field: str, default: Any, choices: tuple[Any, ...]) -> _Read:
    return _Read(field, default, lambda v: _is_among(v, choices), " or ".join(repr(c) for c in choices))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _share(field: str, default: float) -> _Read:
    return _Read(field, default, lambda v: _is_number(v) and 0 < v < 1, "a number between 0 and 1, exclusive")


def _is_triple(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(_is_number(v) for v in value)


_READ: dict[str, _Read] = {
    "INPUT.MIN_SIZE_TEST": _positive("min_size", 800),
    "INPUT.MAX_SIZE_TEST": _positive("max_size", 1333),
    "INPUT.FORMAT": _one_of("channel_order", "BGR", ("BGR", "RGB")),
    "MODEL.PIXEL_MEAN": _Read("pixel_mean", (103.53, 116.28, 123.675), _is_triple, "three numbers"),
    "MODEL.PIXEL_STD": _Read("pixel_std", (1.0, 1.0, 1.0), lambda v: _is_triple(v) and min(v) > 0,
                             "three positive numbers"),
    "MODEL.RESNETS.DEPTH": _one_of("depth", 50, (18, 34, 50, 101, 152)),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _positive("res2_channels", 256),
    "MODEL.RESNETS.STRIDE_IN_1X1": _flag("stride_in_1x1", True),
    "MODEL.FPN.OUT_CHANNELS": _Read("fpn_channels", 256, lambda v: _is_int(v, 32) and v % 32 == 0,
                                    "a multiple of 32 (the groups of GroupNorm)"),
    "MODEL.FCOS.NUM_CLASSES": _positive("num_classes", 80),
    "MODEL.FCOS.NUM_CLS_CONVS": _Read("num_cls_convs", 4, lambda v: _is_int(v, 0), "a whole number from 0"),
    "MODEL.FCOS.NUM_BOX_CONVS": _Read("num_box_convs", 4, lambda v: _is_int(v, 0), "a whole number from 0"),
    "MODEL.FCOS.FPN_STRIDES": _one_of("strides", (8, 16, 32, 64, 128), ((8, 16, 32, 64, 128),)),
    "MODEL.FCOS.THRESH_WITH_CTR": _flag("threshold_with_centreness", False),
    "MODEL.FCOS.INFERENCE_TH_TEST": _share("score_threshold", 0.05),
    "MODEL.FCOS.PRE_NMS_TOPK_TEST": _positive("pre_nms_topk", 1000),
    "MODEL.FCOS.NMS_TH": _share("nms_threshold", 0.6),
    "MODEL.FCOS.POST_NMS_TOPK_TEST": _positive("post_nms_topk", 100),
    "MODEL.BASIS_MODULE.NUM_BASES": _positive("num_bases", 4),
    "MODEL.BASIS_MODULE.CONVS_DIM": _positive("basis_channels", 128),
    "MODEL.BASIS_MODULE.NUM_CONVS": _positive("basis_convs", 3),
    "MODEL.BASIS_MODULE.LOSS_ON": _flag("loss_on", False),
    "MODEL.BASIS_MODULE.NUM_CLASSES": _positive("semantic_classes", 80),
    "MODEL.BLENDMASK.ATTN_SIZE": _positive("attention_size", 14),
    "MODEL.BLENDMASK.BOTTOM_RESOLUTION": _positive("resolution", 56),
}

_FIXED: dict[str, _Fixed] = {
    "VERSION": _Fixed(2, (2,)),
    "FLOAT32_PRECISION": _Fixed("", ("",)),
    "TEST.AUG.ENABLED": _Fixed(False, (False,)),
    "MODEL.META_ARCHITECTURE": _Fixed("GeneralizedRCNN", ("BlendMask",)),
    "MODEL.MOBILENET": _Fixed(False, (False,)),
    "MODEL.BACKBONE.NAME": _Fixed("build_resnet_backbone", ("build_fcos_resnet_fpn_backbone",)),
    "MODEL.BACKBONE.ANTI_ALIAS": _Fixed(False, (False,)),
    "MODEL.RESNETS.NORM": _Fixed("FrozenBN", ("FrozenBN",)),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _Fixed(64, (64,)),
    "MODEL.RESNETS.NUM_GROUPS": _Fixed(1, (1,)),
    "MODEL.RESNETS.WIDTH_PER_GROUP": _Fixed(64, (64,)),
    "MODEL.RESNETS.RES5_DILATION": _Fixed(1, (1,)),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": _Fixed((False,) * 4, ((False,) * 4,)),
    "MODEL.RESNETS.OUT_FEATURES": _Fixed(("res4",), (("res3", "res4", "res5"),)),
    "MODEL.FPN.IN_FEATURES": _Fixed((), (("res3", "res4", "res5"),)),
    "MODEL.FPN.NORM": _Fixed("", ("",)),
    "MODEL.FPN.FUSE_TYPE": _Fixed("sum", ("sum",)),
    "MODEL.PROPOSAL_GENERATOR.NAME": _Fixed("RPN", ("FCOS",)),
    "MODEL.FCOS.IN_FEATURES": _Fixed(("p3", "p4", "p5", "p6", "p7"), (("p3", "p4", "p5", "p6", "p7"),)),
    "MODEL.FCOS.TOP_LEVELS": _Fixed(2, (2,)),
    "MODEL.FCOS.NUM_SHARE_CONVS": _Fixed(0, (0,)),
    "MODEL.FCOS.NORM": _Fixed("GN", ("GN",)),
    "MODEL.FCOS.USE_SCALE": _Fixed(True, (False,)),
    "MODEL.FCOS.USE_DEFORMABLE": _Fixed(False, (False,)),
    "MODEL.FCOS.BOX_QUALITY": _Fixed("ctrness", ("ctrness",)),
    "MODEL.FCOS.YIELD_PROPOSAL": _Fixed(False, (False,)),
    "MODEL.FCOS.YIELD_BOX_FEATURES": _Fixed(False, (False,)),
    "MODEL.BASIS_MODULE.NAME": _Fixed("ProtoNet", ("ProtoNet",)),
    "MODEL.BASIS_MODULE.IN_FEATURES": _Fixed(("p3", "p4", "p5"), (("p3", "p4", "p5"),)),
    "MODEL.BASIS_MODULE.NORM": _Fixed("SyncBN", ("SyncBN", "BN")),  # the same arithmetic in inference
    "MODEL.BLENDMASK.TOP_INTERP": _Fixed("bilinear", ("bilinear",)),
    "MODEL.BLENDMASK.POOLER_TYPE": _Fixed("ROIAlignV2", ("ROIAlignV2",)),
    "MODEL.BLENDMASK.POOLER_SAMPLING_RATIO": _Fixed(1, (1,)),
    "MODEL.BLENDMASK.POOLER_SCALES": _Fixed((0.25,), ((0.25,),)),
    "MODEL.BLENDMASK.VISUALIZE": _Fixed(False, (False,)),
    "MODEL.PANOPTIC_FPN.COMBINE.ENABLED": _Fixed(True, (False,)),
}

# Keys of training, of data sets and of other architectures: BlendMask inference reads none of them.
# A name ending in a dot stands for everything below it.
_WITHOUT_EFFECT = (
    "SOLVER.", "DATASETS.", "DATALOADER.", "GLOBAL.", "OUTPUT_DIR", "SEED", "CUDNN_BENCHMARK", "VIS_PERIOD",
    "TEST.EVAL_PERIOD", "TEST.EXPECTED_RESULTS", "TEST.KEYPOINT_OKS_SIGMAS", "TEST.DETECTIONS_PER_IMAGE", "TEST.AUG.",
    "TEST.PRECISE_BN.", "INPUT.CROP.", "INPUT.HFLIP_TRAIN", "INPUT.IS_ROTATE", "INPUT.MASK_FORMAT",
    "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.RANDOM_FLIP",
    "MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS", "MODEL.FCPOSE_ON",
    "MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.DEFORM_INTERVAL", "MODEL.RESNETS.DEFORM_MODULATED",
    "MODEL.RESNETS.DEFORM_NUM_GROUPS", "MODEL.PROPOSAL_GENERATOR.MIN_SIZE",
    "MODEL.FCOS.CENTER_SAMPLE", "MODEL.FCOS.INFERENCE_TH_TRAIN", "MODEL.FCOS.LOC_LOSS_TYPE", "MODEL.FCOS.LOSS_ALPHA",
    "MODEL.FCOS.LOSS_GAMMA", "MODEL.FCOS.LOSS_NORMALIZER_CLS", "MODEL.FCOS.LOSS_WEIGHT_CLS", "MODEL.FCOS.POS_RADIUS",
    "MODEL.FCOS.POST_NMS_TOPK_TRAIN", "MODEL.FCOS.PRE_NMS_TOPK_TRAIN", "MODEL.FCOS.PRIOR_PROB",
    "MODEL.FCOS.SIZES_OF_INTEREST", "MODEL.FCOS.USE_RELU",
    "MODEL.BASIS_MODULE.ANN_SET", "MODEL.BASIS_MODULE.COMMON_STRIDE", "MODEL.BASIS_MODULE.LOSS_WEIGHT",
    "MODEL.BLENDMASK.INSTANCE_LOSS_WEIGHT",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH",
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT",
    "MODEL.ANCHOR_GENERATOR.", "MODEL.BATEXT.", "MODEL.BOXINST.", "MODEL.BiFPN.", "MODEL.CONDINST.", "MODEL.DLA.",
    "MODEL.FCPOSE.", "MODEL.MEInst.", "MODEL.RETINANET.", "MODEL.ROI_BOX_CASCADE_HEAD.", "MODEL.ROI_BOX_HEAD.",
    "MODEL.ROI_HEADS.", "MODEL.ROI_KEYPOINT_HEAD.", "MODEL.ROI_MASK_HEAD.", "MODEL.RPN.", "MODEL.SEM_SEG_HEAD.",
    "MODEL.SOLOV2.", "MODEL.TOP_MODULE.", "MODEL.VOVNET.",
)


def _cannot_change_inference(key: str) -> bool:
    return any(key.startswith(name) if name.endswith(".") else key == name for name in _WITHOUT_EFFECT)
