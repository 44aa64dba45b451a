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
    backbone: str  # "resnet" or "dla"
    backbone_norm: str  # "FrozenBN", or "BN" and "SyncBN", which a training changes
    depth: int  # of a ResNet, like the next seven: 18, 34, 50, 101 or 152
    stem_channels: int
    res2_channels: int  # out of res2; each later stage doubles them
    res2_width: int  # of the 3x3 convolutions of res2's bottlenecks, doubling too
    stride_in_1x1: bool  # bottleneck blocks: stride in the first 1x1 convolution instead of the 3x3
    deformable: tuple[bool, ...]  # which of res2..res5 have blocks with a deformable convolution
    deformable_interval: int  # which blocks of these stages: the first and every so manieth after it
    fpn_channels: int
    # FCOS head
    num_classes: int
    num_share_convs: int  # of the tower that comes before the other two
    num_cls_convs: int
    num_box_convs: int
    head_norm: str  # "GN", "NaiveGN", or "BN" and "SyncBN", which have weights for each level
    use_scale: bool  # a factor for each level on its distances
    strides: tuple[int, ...]  # of p3 to p5, p6 or p7
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
    given = given_keys(path)
    for key in given:
        if key not in _READ and key not in _FIXED and not _cannot_change_inference(key):
            raise ConfigError(f"{path}: unknown key {key} = {given[key]!r}: BlendMask inference does not know it")
    # Nothing reads the keys of the backbone that is not built.
    other = "MODEL.RESNETS." if given.get("MODEL.BACKBONE.NAME") == _DLA else "MODEL.DLA."
    given = {key: value for key, value in given.items() if not key.startswith(other)}
    return _assemble(path, given, read_keys(path, given, _READ, _FIXED))


def given_keys(path: str | Path) -> dict[str, Any]:
    """Return the dotted keys that a file and its bases give, with their values. Raises ConfigError."""
    return dict(_flatten(_load_yaml(Path(path), ())))


def read_keys(path: str | Path, given: Mapping[str, Any], keys: Mapping[str, "Key"],
              fixed_keys: Mapping[str, "FixedKey"]) -> dict[str, Any]:
    """Return the fields that `keys` name, from `given` or the defaults. Raises ConfigError for a refused value."""
    for key, fixed in fixed_keys.items():
        value = given.get(key, fixed.default)
        if not _is_among(value, fixed.supported):
            raise _refusal(path, key, value, given, " or ".join(repr(v) for v in fixed.supported))
    fields = {}
    for key, read in keys.items():
        value = given.get(key, read.default)
        if not read.accepts(value):
            raise _refusal(path, key, value, given, read.supported)
        fields[read.field] = float(value) if isinstance(read.default, float) else value
    return fields


def _assemble(path: str | Path, given: Mapping[str, Any], fields: dict[str, Any]) -> Config:
    """Check what involves two keys and build the Config."""
    for key, value, wanted, because in _agreements(fields):
        if value != wanted:
            raise _refusal(path, key, value, given, f"{wanted!r} with {because}")
    dla = fields.pop("builder") == _DLA
    resnet_norm, dla_norm = fields.pop("resnet_norm"), fields.pop("dla_norm")
    fields |= {"backbone": "dla", "backbone_norm": dla_norm} if dla else {
        "backbone": "resnet", "backbone_norm": resnet_norm}
    if not fields.pop("loss_on"):
        fields["semantic_classes"] = None
    of_config = {name: value for name, value in fields.items() if name in Config.__dataclass_fields__}
    return Config(**of_config)  # the others were there to agree


def _agreements(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield key, its value, the one value that the value of another key leaves, and that other key."""
    dla, depth, levels = fields["builder"] == _DLA, fields["depth"], 3 + fields["top_levels"]
    stages = ("level3", "level4", "level5") if dla else ("res3", "res4", "res5")
    builder = f"MODEL.BACKBONE.NAME {fields['builder']}"
    yield "MODEL.FPN.IN_FEATURES", fields["pyramid_stages"], stages, builder
    if not dla:
        yield "MODEL.RESNETS.OUT_FEATURES", fields["resnet_stages"], stages, builder
    top_levels = f"MODEL.FCOS.TOP_LEVELS {fields['top_levels']}"
    yield "MODEL.FCOS.IN_FEATURES", fields["level_names"], ("p3", "p4", "p5", "p6", "p7")[:levels], top_levels
    yield "MODEL.FCOS.FPN_STRIDES", fields["strides"], (8, 16, 32, 64, 128)[:levels], top_levels
    if depth < 50:
        yield "MODEL.RESNETS.RES2_OUT_CHANNELS", fields["res2_channels"], 64, f"MODEL.RESNETS.DEPTH {depth}"
        yield "MODEL.RESNETS.DEFORM_ON_PER_STAGE", fields["deformable"], (False,) * 4, f"MODEL.RESNETS.DEPTH {depth}"
    if any(fields["deformable"]):
        deformable = f"MODEL.RESNETS.DEFORM_ON_PER_STAGE {fields['deformable']}"
        yield "MODEL.RESNETS.DEFORM_MODULATED", fields["deform_modulated"], True, deformable
        yield "MODEL.RESNETS.DEFORM_NUM_GROUPS", fields["deform_groups"], 1, deformable


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
class Key:
    """A key whose value becomes a field of Config."""

    field: str
    default: Any  # AdelaiDet's
    accepts: Callable[[Any], bool]
    supported: str  # in words, for the refusal


@dataclass(frozen=True)
class FixedKey:
    """A key that this network honours only at the values listed."""

    default: Any  # AdelaiDet's
    supported: tuple[Any, ...]


def _is_among(value: Any, choices: tuple[Any, ...]) -> bool:
    """Like `in`, but True is not 1 and 2.0 is not 2: a value of another type is a mistake."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def positive(field: str, default: int) -> Key:
    return Key(field, default, lambda v: is_int(v, 1), "a whole number from 1")


def flag(field: str, default: bool) -> Key:
    return Key(field, default, lambda v: isinstance(v, bool), "True or False")


def _count(field: str, default: int) -> Key:
    return Key(field, default, lambda v: is_int(v, 0), "a whole number from 0")


def _names(field: str, default: tuple[str, ...]) -> Key:
    return Key(field, default, lambda v: isinstance(v, tuple), "a list of names")


def one_of(field: str, default: Any, choices: tuple[Any, ...]) -> Key:
    return Key(field, default, lambda v: _is_among(v, choices), " or ".join(repr(c) for c in choices))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def share(field: str, default: float) -> Key:
    return Key(field, default, lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1, exclusive")


def _is_triple(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(is_number(v) for v in value)


def _is_flags(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 4 and all(isinstance(v, bool) for v in value)


_RESNET, _DLA = "build_fcos_resnet_fpn_backbone", "build_fcos_dla_fpn_backbone"

_READ: dict[str, Key] = {
    "INPUT.MIN_SIZE_TEST": positive("min_size", 800),
    "INPUT.MAX_SIZE_TEST": positive("max_size", 1333),
    "INPUT.FORMAT": one_of("channel_order", "BGR", ("BGR", "RGB")),
    "MODEL.PIXEL_MEAN": Key("pixel_mean", (103.53, 116.28, 123.675), _is_triple, "three numbers"),
    "MODEL.PIXEL_STD": Key("pixel_std", (1.0, 1.0, 1.0), lambda v: _is_triple(v) and min(v) > 0,
                             "three positive numbers"),
    "MODEL.BACKBONE.NAME": one_of("builder", "build_resnet_backbone", (_RESNET, _DLA)),
    "MODEL.RESNETS.DEPTH": one_of("depth", 50, (18, 34, 50, 101, 152)),
    "MODEL.RESNETS.NORM": one_of("resnet_norm", "FrozenBN", ("FrozenBN", "BN", "SyncBN")),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": positive("stem_channels", 64),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": positive("res2_channels", 256),
    "MODEL.RESNETS.WIDTH_PER_GROUP": positive("res2_width", 64),
    "MODEL.RESNETS.STRIDE_IN_1X1": flag("stride_in_1x1", True),
    "MODEL.RESNETS.OUT_FEATURES": _names("resnet_stages", ("res4",)),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": Key("deformable", (False,) * 4, _is_flags, "four times True or False"),
    "MODEL.RESNETS.DEFORM_INTERVAL": positive("deformable_interval", 1),
    "MODEL.RESNETS.DEFORM_MODULATED": flag("deform_modulated", False),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": positive("deform_groups", 1),
    "MODEL.DLA.NORM": one_of("dla_norm", "FrozenBN", ("FrozenBN", "BN", "SyncBN")),
    "MODEL.FPN.IN_FEATURES": _names("pyramid_stages", ()),
    "MODEL.FPN.OUT_CHANNELS": Key("fpn_channels", 256, lambda v: is_int(v, 32) and v % 32 == 0,
                                    "a multiple of 32 (the groups of GroupNorm)"),
    "MODEL.FCOS.NUM_CLASSES": positive("num_classes", 80),
    "MODEL.FCOS.NUM_SHARE_CONVS": _count("num_share_convs", 0),
    "MODEL.FCOS.NUM_CLS_CONVS": _count("num_cls_convs", 4),
    "MODEL.FCOS.NUM_BOX_CONVS": _count("num_box_convs", 4),
    "MODEL.FCOS.NORM": one_of("head_norm", "GN", ("GN", "NaiveGN", "BN", "SyncBN")),
    "MODEL.FCOS.USE_SCALE": flag("use_scale", True),
    "MODEL.FCOS.TOP_LEVELS": one_of("top_levels", 2, (0, 1, 2)),
    "MODEL.FCOS.IN_FEATURES": _names("level_names", ("p3", "p4", "p5", "p6", "p7")),
    "MODEL.FCOS.FPN_STRIDES": Key("strides", (8, 16, 32, 64, 128), lambda v: isinstance(v, tuple), "a list of numbers"),
    "MODEL.FCOS.THRESH_WITH_CTR": flag("threshold_with_centreness", False),
    "MODEL.FCOS.INFERENCE_TH_TEST": share("score_threshold", 0.05),
    "MODEL.FCOS.PRE_NMS_TOPK_TEST": positive("pre_nms_topk", 1000),
    "MODEL.FCOS.NMS_TH": share("nms_threshold", 0.6),
    "MODEL.FCOS.POST_NMS_TOPK_TEST": positive("post_nms_topk", 100),
    "MODEL.BASIS_MODULE.NUM_BASES": positive("num_bases", 4),
    "MODEL.BASIS_MODULE.CONVS_DIM": positive("basis_channels", 128),
    "MODEL.BASIS_MODULE.NUM_CONVS": positive("basis_convs", 3),
    "MODEL.BASIS_MODULE.LOSS_ON": flag("loss_on", False),
    "MODEL.BASIS_MODULE.NUM_CLASSES": positive("semantic_classes", 80),
    "MODEL.BLENDMASK.ATTN_SIZE": positive("attention_size", 14),
    "MODEL.BLENDMASK.BOTTOM_RESOLUTION": positive("resolution", 56),
}

_FIXED: dict[str, FixedKey] = {
    "VERSION": FixedKey(2, (2,)),
    "FLOAT32_PRECISION": FixedKey("", ("",)),
    "TEST.AUG.ENABLED": FixedKey(False, (False,)),
    "MODEL.META_ARCHITECTURE": FixedKey("GeneralizedRCNN", ("BlendMask",)),
    "MODEL.MOBILENET": FixedKey(False, (False,)),
    "MODEL.BACKBONE.ANTI_ALIAS": FixedKey(False, (False,)),
    "MODEL.RESNETS.NUM_GROUPS": FixedKey(1, (1,)),
    "MODEL.RESNETS.RES5_DILATION": FixedKey(1, (1,)),
    "MODEL.DLA.CONV_BODY": FixedKey("DLA34", ("DLA34",)),
    "MODEL.FPN.NORM": FixedKey("", ("",)),
    "MODEL.FPN.FUSE_TYPE": FixedKey("sum", ("sum",)),
    "MODEL.PROPOSAL_GENERATOR.NAME": FixedKey("RPN", ("FCOS",)),
    "MODEL.FCOS.USE_DEFORMABLE": FixedKey(False, (False,)),
    "MODEL.FCOS.BOX_QUALITY": FixedKey("ctrness", ("ctrness",)),
    "MODEL.FCOS.YIELD_PROPOSAL": FixedKey(False, (False,)),
    "MODEL.FCOS.YIELD_BOX_FEATURES": FixedKey(False, (False,)),
    "MODEL.BASIS_MODULE.NAME": FixedKey("ProtoNet", ("ProtoNet",)),
    "MODEL.BASIS_MODULE.IN_FEATURES": FixedKey(("p3", "p4", "p5"), (("p3", "p4", "p5"),)),
    "MODEL.BASIS_MODULE.NORM": FixedKey("SyncBN", ("SyncBN", "BN")),  # the same arithmetic in inference
    "MODEL.BLENDMASK.TOP_INTERP": FixedKey("bilinear", ("bilinear",)),
    "MODEL.BLENDMASK.POOLER_TYPE": FixedKey("ROIAlignV2", ("ROIAlignV2",)),
    "MODEL.BLENDMASK.POOLER_SAMPLING_RATIO": FixedKey(1, (1,)),
    "MODEL.BLENDMASK.POOLER_SCALES": FixedKey((0.25,), ((0.25,),)),
    "MODEL.BLENDMASK.VISUALIZE": FixedKey(False, (False,)),
    "MODEL.PANOPTIC_FPN.COMBINE.ENABLED": FixedKey(True, (False,)),
}

# Keys of training, of data sets and of other architectures: BlendMask inference reads none of them.
# A name ending in a dot stands for everything below it.
_WITHOUT_EFFECT = (
    "SOLVER.", "DATASETS.", "DATALOADER.", "GLOBAL.", "OUTPUT_DIR", "SEED", "CUDNN_BENCHMARK", "VIS_PERIOD",
    "TEST.EVAL_PERIOD", "TEST.EXPECTED_RESULTS", "TEST.KEYPOINT_OKS_SIGMAS", "TEST.DETECTIONS_PER_IMAGE", "TEST.AUG.",
    "TEST.PRECISE_BN.", "INPUT.CROP.", "INPUT.HFLIP_TRAIN", "INPUT.IS_ROTATE", "INPUT.MASK_FORMAT",
    "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.RANDOM_FLIP",
    "MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS", "MODEL.FCPOSE_ON",
    "MODEL.BACKBONE.FREEZE_AT",
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE",
    "MODEL.FCOS.CENTER_SAMPLE", "MODEL.FCOS.INFERENCE_TH_TRAIN", "MODEL.FCOS.LOC_LOSS_TYPE", "MODEL.FCOS.LOSS_ALPHA",
    "MODEL.FCOS.LOSS_GAMMA", "MODEL.FCOS.LOSS_NORMALIZER_CLS", "MODEL.FCOS.LOSS_WEIGHT_CLS", "MODEL.FCOS.POS_RADIUS",
    "MODEL.FCOS.POST_NMS_TOPK_TRAIN", "MODEL.FCOS.PRE_NMS_TOPK_TRAIN", "MODEL.FCOS.PRIOR_PROB",
    "MODEL.FCOS.SIZES_OF_INTEREST", "MODEL.FCOS.USE_RELU",
    "MODEL.BASIS_MODULE.ANN_SET", "MODEL.BASIS_MODULE.COMMON_STRIDE", "MODEL.BASIS_MODULE.LOSS_WEIGHT",
    "MODEL.BLENDMASK.INSTANCE_LOSS_WEIGHT",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH",
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT",
    "MODEL.ANCHOR_GENERATOR.", "MODEL.BATEXT.", "MODEL.BOXINST.", "MODEL.BiFPN.", "MODEL.CONDINST.",
    "MODEL.DLA.OUT_FEATURES",
    "MODEL.FCPOSE.", "MODEL.MEInst.", "MODEL.RETINANET.", "MODEL.ROI_BOX_CASCADE_HEAD.", "MODEL.ROI_BOX_HEAD.",
    "MODEL.ROI_HEADS.", "MODEL.ROI_KEYPOINT_HEAD.", "MODEL.ROI_MASK_HEAD.", "MODEL.RPN.", "MODEL.SEM_SEG_HEAD.",
    "MODEL.SOLOV2.", "MODEL.TOP_MODULE.", "MODEL.VOVNET.",
)


def _cannot_change_inference(key: str) -> bool:
    return any(key.startswith(name) if name.endswith(".") else key == name for name in _WITHOUT_EFFECT)
