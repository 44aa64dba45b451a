"""The numbers of one BlendMask network, read from AdelaiDet's own YAML keys.

Rules: a key that could change inference is either honoured or refused by name; a key that cannot is on an explicit
allow-list; any other key is unknown and refused (a misspelt key must not pass in silence). Values that a file leaves
out take AdelaiDet's own defaults, which are not always BlendMask's values. Nothing here may import torch.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

SIZE_DIVISOR = 32  # padded heights and widths are multiples of it: the stride of res5 (p6 and p7 do not count)


class ConfigError(ValueError):
    """A configuration file that cannot be read, or asks for something this network does not do."""


# ---- the keys ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Key:
    """A key of a file, and which of its values are honoured."""

    name: str
    default: Any  # AdelaiDet's
    accepts: Callable[[Any], bool]
    supported: str  # in words, for the refusal

    def value(self, path: str | Path, given: Mapping[str, Any]) -> Any:
        """Return its value, from `given` or the default. Raises ConfigError for one that is refused."""
        value = given.get(self.name, self.default)
        if not self.accepts(value):
            raise _refusal(path, self.name, value, given, self.supported)
        return float(value) if isinstance(self.default, float) else value


def keys_of(kind: Any) -> dict[str, Key]:
    """Return the keys that the fields of a dataclass are read from, by the fields' names."""
    return {each.name: each.metadata["key"] for each in fields(kind) if each.metadata}


def read(kind: Any, path: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass that have a key. Raises ConfigError for a refused value."""
    return {name: key.value(path, given) for name, key in keys_of(kind).items()}


def fixed(name: str, default: Any, *supported: Any) -> Key:
    """A key that is honoured only at the values listed, which are the default where there are none."""
    choices = supported or (default,)

    def is_among(value: Any) -> bool:  # unlike `in`: True is not 1 and 2.0 is not 2, but mistakes
        return any(type(value) is type(choice) and value == choice for choice in choices)
    return Key(name, default, is_among, " or ".join(map(repr, choices)))


def of_key(key: Key) -> Any:
    """A field of a dataclass that is read from a key."""
    return field(default=key.default, metadata={"key": key})


def one_of(name: str, default: Any, choices: tuple[Any, ...]) -> Any:
    return of_key(fixed(name, default, *choices))


def whole(name: str, default: int, low: int = 1) -> Any:
    return of_key(Key(name, default, lambda v: is_int(v, low), f"a whole number from {low}"))


def share(name: str, default: float) -> Any:
    return of_key(Key(name, default, lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1, exclusive"))


def flag(name: str, default: bool) -> Any:
    return of_key(Key(name, default, is_bool, "True or False"))


def many(name: str, default: tuple[Any, ...], supported: str, item: Callable[[Any], bool] = lambda value: True,
         count: int = 0) -> Any:
    """A list of `count` items, or of any number."""
    def accepts(value: Any) -> bool:
        return isinstance(value, tuple) and count in (0, len(value)) and all(map(item, value))
    return of_key(Key(name, default, accepts, supported))


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_RESNET, _DLA = "build_fcos_resnet_fpn_backbone", "build_fcos_dla_fpn_backbone"
_NORMS = ("FrozenBN", "BN", "SyncBN")


@dataclass(frozen=True)
class Config:
    """All numbers of the network and of its pre- and post-processing. Sizes are in pixels."""

    # image
    min_size: int = whole("INPUT.MIN_SIZE_TEST", 800)  # shorter side after resizing
    max_size: int = whole("INPUT.MAX_SIZE_TEST", 1333)  # longer side at most
    channel_order: str = one_of("INPUT.FORMAT", "BGR", ("BGR", "RGB"))  # what the network was trained on
    # in channel_order, 0..255
    pixel_mean: tuple[float, ...] = many("MODEL.PIXEL_MEAN", (103.53, 116.28, 123.675), "three numbers", is_number, 3)
    pixel_std: tuple[float, ...] = many("MODEL.PIXEL_STD", (1.0, 1.0, 1.0), "three positive numbers",
                                        lambda value: is_number(value) and value > 0, 3)
    # backbone
    backbone: str = one_of("MODEL.BACKBONE.NAME", "build_resnet_backbone", (_RESNET, _DLA))  # here "resnet" or "dla"
    backbone_norm: str = one_of("MODEL.RESNETS.NORM", "FrozenBN", _NORMS)  # BN and SyncBN: a training changes them
    depth: int = one_of("MODEL.RESNETS.DEPTH", 50, (18, 34, 50, 101, 152))  # of a ResNet, like the next seven
    stem_channels: int = whole("MODEL.RESNETS.STEM_OUT_CHANNELS", 64)
    res2_channels: int = whole("MODEL.RESNETS.RES2_OUT_CHANNELS", 256)  # out of res2; each later stage doubles them
    res2_width: int = whole("MODEL.RESNETS.WIDTH_PER_GROUP", 64)  # of the 3x3 of res2's bottlenecks, doubling too
    stride_in_1x1: bool = flag("MODEL.RESNETS.STRIDE_IN_1X1", True)  # of bottlenecks: in the first, not in the 3x3
    # which of res2..res5 have deformable convolutions, and in which blocks: the first and every so manieth after it
    deformable: tuple[bool, ...] = many("MODEL.RESNETS.DEFORM_ON_PER_STAGE", (False,) * 4,
                                        "four times True or False", is_bool, 4)
    deformable_interval: int = whole("MODEL.RESNETS.DEFORM_INTERVAL", 1)
    fpn_channels: int = of_key(Key("MODEL.FPN.OUT_CHANNELS", 256, lambda v: is_int(v, 32) and v % 32 == 0,
                                   "a multiple of 32 (the groups of GroupNorm)"))
    # FCOS head
    num_classes: int = whole("MODEL.FCOS.NUM_CLASSES", 80)
    num_share_convs: int = whole("MODEL.FCOS.NUM_SHARE_CONVS", 0, 0)  # of the tower that comes before the other two
    num_cls_convs: int = whole("MODEL.FCOS.NUM_CLS_CONVS", 4, 0)
    num_box_convs: int = whole("MODEL.FCOS.NUM_BOX_CONVS", 4, 0)
    head_norm: str = one_of("MODEL.FCOS.NORM", "GN", ("GN", "NaiveGN", "BN", "SyncBN"))  # BN: one for each level
    use_scale: bool = flag("MODEL.FCOS.USE_SCALE", True)  # a factor for each level on its distances
    # of p3 to p5, p6 or p7
    strides: tuple[int, ...] = many("MODEL.FCOS.FPN_STRIDES", (8, 16, 32, 64, 128), "a list of numbers")
    # selection of boxes; the threshold is of class score times centre-ness, or of the class score alone
    threshold_with_centreness: bool = flag("MODEL.FCOS.THRESH_WITH_CTR", False)
    score_threshold: float = share("MODEL.FCOS.INFERENCE_TH_TEST", 0.05)
    pre_nms_topk: int = whole("MODEL.FCOS.PRE_NMS_TOPK_TEST", 1000)  # per level and image
    nms_threshold: float = share("MODEL.FCOS.NMS_TH", 0.6)
    post_nms_topk: int = whole("MODEL.FCOS.POST_NMS_TOPK_TEST", 100)  # per image
    # bases and blender
    num_bases: int = whole("MODEL.BASIS_MODULE.NUM_BASES", 4)
    basis_channels: int = whole("MODEL.BASIS_MODULE.CONVS_DIM", 128)
    basis_convs: int = whole("MODEL.BASIS_MODULE.NUM_CONVS", 3)
    semantic_classes: int | None = whole("MODEL.BASIS_MODULE.NUM_CLASSES", 80)  # of the head for training, if any
    attention_size: int = whole("MODEL.BLENDMASK.ATTN_SIZE", 14)
    resolution: int = whole("MODEL.BLENDMASK.BOTTOM_RESOLUTION", 56)  # side of a mask before it is pasted


@dataclass(frozen=True)
class _Beside:
    """What is read beside the numbers, because it decides on some of them or has to agree with them."""

    dla_norm: str = one_of("MODEL.DLA.NORM", "FrozenBN", _NORMS)
    resnet_stages: tuple[str, ...] = many("MODEL.RESNETS.OUT_FEATURES", ("res4",), "a list of names")
    pyramid_stages: tuple[str, ...] = many("MODEL.FPN.IN_FEATURES", (), "a list of names")
    deform_modulated: bool = flag("MODEL.RESNETS.DEFORM_MODULATED", False)
    deform_groups: int = whole("MODEL.RESNETS.DEFORM_NUM_GROUPS", 1)
    top_levels: int = one_of("MODEL.FCOS.TOP_LEVELS", 2, (0, 1, 2))
    level_names: tuple[str, ...] = many("MODEL.FCOS.IN_FEATURES", ("p3", "p4", "p5", "p6", "p7"), "a list of names")
    loss_on: bool = flag("MODEL.BASIS_MODULE.LOSS_ON", False)


_FIXED = (
    fixed("VERSION", 2),
    fixed("FLOAT32_PRECISION", ""),
    fixed("TEST.AUG.ENABLED", False),
    fixed("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "BlendMask"),
    fixed("MODEL.MOBILENET", False),
    fixed("MODEL.BACKBONE.ANTI_ALIAS", False),
    fixed("MODEL.RESNETS.NUM_GROUPS", 1),
    fixed("MODEL.RESNETS.RES5_DILATION", 1),
    fixed("MODEL.DLA.CONV_BODY", "DLA34"),
    fixed("MODEL.FPN.NORM", ""),
    fixed("MODEL.FPN.FUSE_TYPE", "sum"),
    fixed("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "FCOS"),
    fixed("MODEL.FCOS.USE_DEFORMABLE", False),
    fixed("MODEL.FCOS.BOX_QUALITY", "ctrness"),
    fixed("MODEL.FCOS.YIELD_PROPOSAL", False),
    fixed("MODEL.FCOS.YIELD_BOX_FEATURES", False),
    fixed("MODEL.BASIS_MODULE.NAME", "ProtoNet"),
    fixed("MODEL.BASIS_MODULE.IN_FEATURES", ("p3", "p4", "p5")),
    fixed("MODEL.BASIS_MODULE.NORM", "SyncBN", "SyncBN", "BN"),  # the same arithmetic in inference
    fixed("MODEL.BLENDMASK.TOP_INTERP", "bilinear"),
    fixed("MODEL.BLENDMASK.POOLER_TYPE", "ROIAlignV2"),
    fixed("MODEL.BLENDMASK.POOLER_SAMPLING_RATIO", 1),
    fixed("MODEL.BLENDMASK.POOLER_SCALES", (0.25,)),
    fixed("MODEL.BLENDMASK.VISUALIZE", False),
    fixed("MODEL.PANOPTIC_FPN.COMBINE.ENABLED", True, False),
)

# Keys of training, of data sets and of other architectures: BlendMask inference reads none of them.
_WITHOUT_EFFECT = (
    "OUTPUT_DIR", "SEED", "CUDNN_BENCHMARK", "VIS_PERIOD", "TEST.EVAL_PERIOD", "TEST.EXPECTED_RESULTS",
    "TEST.KEYPOINT_OKS_SIGMAS", "TEST.DETECTIONS_PER_IMAGE", "INPUT.HFLIP_TRAIN", "INPUT.IS_ROTATE",
    "INPUT.MASK_FORMAT", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING",
    "INPUT.RANDOM_FLIP", "MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS",
    "MODEL.FCPOSE_ON", "MODEL.BACKBONE.FREEZE_AT", "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", "MODEL.FCOS.CENTER_SAMPLE",
    "MODEL.FCOS.INFERENCE_TH_TRAIN", "MODEL.FCOS.LOC_LOSS_TYPE", "MODEL.FCOS.LOSS_ALPHA", "MODEL.FCOS.LOSS_GAMMA",
    "MODEL.FCOS.LOSS_NORMALIZER_CLS", "MODEL.FCOS.LOSS_WEIGHT_CLS", "MODEL.FCOS.POS_RADIUS",
    "MODEL.FCOS.POST_NMS_TOPK_TRAIN", "MODEL.FCOS.PRE_NMS_TOPK_TRAIN", "MODEL.FCOS.PRIOR_PROB",
    "MODEL.FCOS.SIZES_OF_INTEREST", "MODEL.FCOS.USE_RELU", "MODEL.BASIS_MODULE.ANN_SET",
    "MODEL.BASIS_MODULE.COMMON_STRIDE", "MODEL.BASIS_MODULE.LOSS_WEIGHT", "MODEL.BLENDMASK.INSTANCE_LOSS_WEIGHT",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH",
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", "MODEL.DLA.OUT_FEATURES",
)
_SECTIONS_WITHOUT_EFFECT = (
    "SOLVER.", "DATASETS.", "DATALOADER.", "GLOBAL.", "TEST.AUG.", "TEST.PRECISE_BN.", "INPUT.CROP.",
    "MODEL.ANCHOR_GENERATOR.", "MODEL.BATEXT.", "MODEL.BOXINST.", "MODEL.BiFPN.", "MODEL.CONDINST.", "MODEL.FCPOSE.",
    "MODEL.MEInst.", "MODEL.RETINANET.", "MODEL.ROI_BOX_CASCADE_HEAD.", "MODEL.ROI_BOX_HEAD.", "MODEL.ROI_HEADS.",
    "MODEL.ROI_KEYPOINT_HEAD.", "MODEL.ROI_MASK_HEAD.", "MODEL.RPN.", "MODEL.SEM_SEG_HEAD.", "MODEL.SOLOV2.",
    "MODEL.TOP_MODULE.", "MODEL.VOVNET.",
)


# ---- from a file ------------------------------------------------------------------------------------------------

def load_config(path: str | Path) -> Config:
    """Read a YAML file in AdelaiDet's form, with `_BASE_` files merged below it.

    Raises ConfigError naming the key, its value and what is supported.
    """
    given = given_keys(path)
    known = {key.name for key in (*_FIXED, *keys_of(Config).values(), *keys_of(_Beside).values())}
    for key in given:
        if key not in known and key not in _WITHOUT_EFFECT and not key.startswith(_SECTIONS_WITHOUT_EFFECT):
            raise ConfigError(f"{path}: unknown key {key} = {given[key]!r}: BlendMask inference does not know it")
    # Nothing reads the keys of the backbone that is not built.
    other = "MODEL.RESNETS." if given.get("MODEL.BACKBONE.NAME") == _DLA else "MODEL.DLA."
    return _assemble(path, {key: value for key, value in given.items() if not key.startswith(other)})


def given_keys(path: str | Path) -> dict[str, Any]:
    """Return the dotted keys that a file and its bases give, with their values. Raises ConfigError."""
    return dict(_flatten(_load_yaml(Path(path), ())))


def _assemble(path: str | Path, given: Mapping[str, Any]) -> Config:
    """Check every key, then what involves two, and build the Config."""
    for key in _FIXED:
        key.value(path, given)
    values, beside = read(Config, path, given), _Beside(**read(_Beside, path, given))
    for name, value, wanted, because in _agreements(values, beside):
        if value != wanted:
            raise _refusal(path, name, value, given, f"{wanted!r} with {because}")
    dla = {"backbone": "dla", "backbone_norm": beside.dla_norm}
    values |= dla if values["backbone"] == _DLA else {"backbone": "resnet"}
    if not beside.loss_on:
        values["semantic_classes"] = None
    return Config(**values)


def _agreements(values: Mapping[str, Any], beside: _Beside) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield key, its value, the one value that the value of another key leaves, and that other key."""
    dla, depth, levels = values["backbone"] == _DLA, values["depth"], 3 + beside.top_levels
    stages = ("level3", "level4", "level5") if dla else ("res3", "res4", "res5")
    builder = f"MODEL.BACKBONE.NAME {values['backbone']}"
    yield "MODEL.FPN.IN_FEATURES", beside.pyramid_stages, stages, builder
    if not dla:
        yield "MODEL.RESNETS.OUT_FEATURES", beside.resnet_stages, stages, builder
    top_levels = f"MODEL.FCOS.TOP_LEVELS {beside.top_levels}"
    yield "MODEL.FCOS.IN_FEATURES", beside.level_names, ("p3", "p4", "p5", "p6", "p7")[:levels], top_levels
    yield "MODEL.FCOS.FPN_STRIDES", values["strides"], (8, 16, 32, 64, 128)[:levels], top_levels
    if depth < 50:
        yield "MODEL.RESNETS.RES2_OUT_CHANNELS", values["res2_channels"], 64, f"MODEL.RESNETS.DEPTH {depth}"
        yield "MODEL.RESNETS.DEFORM_ON_PER_STAGE", values["deformable"], (False,) * 4, f"MODEL.RESNETS.DEPTH {depth}"
    if any(values["deformable"]):
        deformable = f"MODEL.RESNETS.DEFORM_ON_PER_STAGE {values['deformable']}"
        yield "MODEL.RESNETS.DEFORM_MODULATED", beside.deform_modulated, True, deformable
        yield "MODEL.RESNETS.DEFORM_NUM_GROUPS", beside.deform_groups, 1, deformable


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
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
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
