"""Reading AdelaiDet's YAML keys: what is honoured, what is refused by name, what is let through."""

from dataclasses import replace

import pytest
from zoo import CONFIGS, GOLDEN

from blendmaskd_workers.blendmask import ConfigError, load_config
from blendmaskd_workers.blendmask.config import given_keys

R_50 = CONFIGS["R_50_1x"]


@pytest.fixture
def variant(tmp_path):
    """Return a function that loads R_50_1x with some YAML put over it."""
    def load(text: str):
        path = tmp_path / "variant.yaml"
        path.write_text(f"_BASE_: {R_50}\n{text}\n")
        return load_config(path)
    return load


def test_r_50_1x_has_the_papers_numbers():
    config = load_config(R_50)
    assert (config.min_size, config.max_size, config.channel_order) == (800, 1333, "BGR")
    assert config.pixel_mean == (103.53, 116.28, 123.675)
    assert (config.depth, config.fpn_channels, config.num_classes) == (50, 256, 80)
    assert config.strides == (8, 16, 32, 64, 128)
    assert config.threshold_with_centreness
    assert (config.score_threshold, config.nms_threshold) == (0.05, 0.6)
    assert (config.pre_nms_topk, config.post_nms_topk) == (1000, 100)
    assert (config.num_bases, config.attention_size, config.resolution) == (4, 14, 56)
    assert config.semantic_classes == 80


RESOLVED = [path.stem.removeprefix("cfg_") for path in sorted(GOLDEN.glob("cfg_*.yaml"))]


@pytest.mark.parametrize("name", RESOLVED)
def test_the_references_resolved_configuration_means_the_same(name):
    """All 400 keys that the real AdelaiDet ends up with, those of training and of other architectures included."""
    resolved = GOLDEN / f"cfg_{name}.yaml"
    assert load_config(resolved) == load_config(CONFIGS[name])
    reference, ours = given_keys(resolved), given_keys(CONFIGS[name])
    ours["MODEL.WEIGHTS"] = reference["MODEL.WEIGHTS"]  # the reference ran without its pretrained backbone
    assert {key: value for key, value in ours.items() if reference[key] != value} == {}


def test_each_configuration_of_the_zoo_is_compared_or_differs_in_its_training_only():
    assert len(RESOLVED) == 7
    assert load_config(CONFIGS["R_50_3x"]) == load_config(CONFIGS["R_50_1x"])
    assert load_config(CONFIGS["550_R_50_1x"]) == load_config(CONFIGS["550_R_50_3x"])
    small = {"small_R18", "small_R18_scale", "small_R18_naivegn"}
    assert CONFIGS.keys() - small - set(RESOLVED) == {"R_50_3x", "550_R_50_1x"}


def test_the_other_backbones_keys_are_read_by_nobody(variant):
    assert variant("MODEL: {DLA: {NORM: GN}}") == load_config(R_50)
    dla = "MODEL: {BACKBONE: {NAME: build_fcos_dla_fpn_backbone}, FPN: {IN_FEATURES: [level3, level4, level5]}"
    assert variant(f"{dla}, RESNETS: {{DEPTH: 77}}}}") == variant(f"{dla}}}")
    with pytest.raises(ConfigError, match=r"unknown key MODEL\.RESNETS\.DEEP = 77"):
        variant(f"{dla}, RESNETS: {{DEEP: 77}}}}")


def test_values_over_a_base_replace_only_themselves(variant):
    assert variant("MODEL: {FCOS: {NMS_TH: 0.5}}") == replace(load_config(R_50), nms_threshold=0.5)


def test_bases_are_relative_to_the_file_that_names_them(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "top.yaml").write_text("_BASE_: below/middle.yaml\nINPUT: {MIN_SIZE_TEST: 400}")
    (tmp_path / "below/middle.yaml").write_text("_BASE_: bottom.yaml\nINPUT: {MIN_SIZE_TEST: 500, MAX_SIZE_TEST: 900}")
    (tmp_path / "below/bottom.yaml").write_text(f"_BASE_: {R_50}\nINPUT: {{FORMAT: RGB}}")
    config = load_config(tmp_path / "top.yaml")
    assert (config.min_size, config.max_size, config.channel_order) == (400, 900, "RGB")


def test_strings_are_read_as_python_literals_like_detectron2_does(variant):
    text = 'MODEL: {FCOS: {FPN_STRIDES: "(8, 16, 32, 64, 128)", INFERENCE_TH_TEST: 1e-2}}\nSOLVER: {STEPS: "(1,)"}'
    assert variant(text).score_threshold == 0.01


def test_keys_that_cannot_change_inference_pass(variant):
    text = """
SOLVER: {BASE_LR: 1, ANYTHING: 2}
DATASETS: {TRAIN: [mine]}
DATALOADER: {NUM_WORKERS: 9}
OUTPUT_DIR: elsewhere
TEST: {EVAL_PERIOD: 5000}
INPUT: {MIN_SIZE_TRAIN: "(256,)", CROP: {ENABLED: True}}
MODEL: {WEIGHTS: model.pth, FCOS: {LOSS_ALPHA: 0.5, POS_RADIUS: 2.0}, BASIS_MODULE: {LOSS_WEIGHT: 1.0, NORM: BN}}
"""
    assert variant(text) == load_config(R_50)


def test_without_the_semantic_loss_there_is_no_semantic_head(variant):
    assert variant("MODEL: {BASIS_MODULE: {LOSS_ON: False}}").semantic_classes is None


@pytest.mark.parametrize(("text", "says"), [
    ("MODEL: {FCOS: {NUM_SHARE_CONVS: -1}}", r"MODEL\.FCOS\.NUM_SHARE_CONVS = -1 .*whole number from 0"),
    ("MODEL: {FCOS: {NORM: FrozenBN}}", r"MODEL\.FCOS\.NORM = 'FrozenBN' .*'GN' or 'NaiveGN' or 'BN' or 'SyncBN'"),
    ("MODEL: {FCOS: {NORM: none}}", r"MODEL\.FCOS\.NORM = 'none'"),
    ("MODEL: {FCOS: {USE_DEFORMABLE: True}}", r"MODEL\.FCOS\.USE_DEFORMABLE = True"),
    ("MODEL: {FCOS: {USE_SCALE: 0}}", r"MODEL\.FCOS\.USE_SCALE = 0"),
    ("MODEL: {FCOS: {TOP_LEVELS: 3}}", r"MODEL\.FCOS\.TOP_LEVELS = 3 .*0 or 1 or 2"),
    ("MODEL: {FCOS: {TOP_LEVELS: 1}}",
     r"MODEL\.FCOS\.IN_FEATURES = \('p3', .*'p7'\) \(AdelaiDet's default\).*'p6'\) with MODEL\.FCOS\.TOP_LEVELS 1"),
    ("MODEL: {FCOS: {NMS_TH: 0}}", r"MODEL\.FCOS\.NMS_TH = 0 .*between 0 and 1"),
    ("MODEL: {FCOS: {NMS_TH: high}}", r"MODEL\.FCOS\.NMS_TH = 'high'"),
    ("MODEL: {FCOS: {POST_NMS_TOPK_TEST: 0}}", r"MODEL\.FCOS\.POST_NMS_TOPK_TEST = 0 .*whole number from 1"),
    ("MODEL: {FCOS: {NUM_CLASSES: True}}", r"MODEL\.FCOS\.NUM_CLASSES = True"),
    ("MODEL: {FCOS: {FPN_STRIDES: [8, 16]}}", r"MODEL\.FCOS\.FPN_STRIDES = \(8, 16\)"),
    ("MODEL: {RESNETS: {DEPTH: 51}}", r"MODEL\.RESNETS\.DEPTH = 51 .*18 or 34 or 50"),
    ("MODEL: {RESNETS: {DEPTH: 18}}", r"MODEL\.RESNETS\.RES2_OUT_CHANNELS = 256 \(AdelaiDet's default\).*64 with"),
    ("MODEL: {RESNETS: {DEFORM_ON_PER_STAGE: [False, True, True, True]}}",
     r"MODEL\.RESNETS\.DEFORM_MODULATED = False \(AdelaiDet's default\).*True with MODEL\.RESNETS\.DEFORM_ON"),
    ("MODEL: {RESNETS: {DEFORM_ON_PER_STAGE: [True], DEFORM_MODULATED: True}}", r"MODEL\.RESNETS\.DEFORM_ON_PER_STAGE"),
    ("MODEL: {RESNETS: {DEFORM_ON_PER_STAGE: [False, True, True, True], DEFORM_MODULATED: True, DEFORM_NUM_GROUPS: 2}}",
     r"MODEL\.RESNETS\.DEFORM_NUM_GROUPS = 2"),
    ("MODEL: {RESNETS: {DEPTH: 34, RES2_OUT_CHANNELS: 64, DEFORM_ON_PER_STAGE: [False, True, True, True]}}",
     r"MODEL\.RESNETS\.DEFORM_ON_PER_STAGE = .* with MODEL\.RESNETS\.DEPTH 34"),
    ("MODEL: {RESNETS: {NORM: GN}}", r"MODEL\.RESNETS\.NORM = 'GN'"),
    ("MODEL: {RESNETS: {OUT_FEATURES: [res2, res3, res4, res5]}}", r"MODEL\.RESNETS\.OUT_FEATURES = \('res2'"),
    ("MODEL: {BACKBONE: {NAME: build_resnet_fpn_backbone}}", r"MODEL\.BACKBONE\.NAME = 'build_resnet_fpn_backbone'"),
    ("MODEL: {BACKBONE: {NAME: build_fcos_dla_fpn_backbone}}",
     r"MODEL\.FPN\.IN_FEATURES = \('res3'.*'level3'.* with MODEL\.BACKBONE\.NAME build_fcos_dla_fpn_backbone"),
    ("MODEL: {BACKBONE: {NAME: build_fcos_dla_fpn_backbone}, DLA: {CONV_BODY: DLA60}}", r"MODEL\.DLA\.CONV_BODY"),
    ("MODEL: {FPN: {OUT_CHANNELS: 100}}", r"MODEL\.FPN\.OUT_CHANNELS = 100 .*multiple of 32"),
    ("MODEL: {PIXEL_STD: [1, 1, 0]}", r"MODEL\.PIXEL_STD = \(1, 1, 0\)"),
    ("MODEL: {PANOPTIC_FPN: {COMBINE: {ENABLED: True}}}", r"MODEL\.PANOPTIC_FPN\.COMBINE\.ENABLED = True"),
    ("MODEL: {BLENDMASK: {POOLER_SAMPLING_RATIO: 2}}", r"MODEL\.BLENDMASK\.POOLER_SAMPLING_RATIO = 2"),
    ("MODEL: {META_ARCHITECTURE: CondInst}", r"MODEL\.META_ARCHITECTURE = 'CondInst'"),
    ("INPUT: {FORMAT: YUV-BT.601}", r"INPUT\.FORMAT = 'YUV-BT\.601' .*'BGR' or 'RGB'"),
    ("TEST: {AUG: {ENABLED: True}}", r"TEST\.AUG\.ENABLED = True"),
    ("MODEL: {FCOS: {NMS_THRESH: 0.5}}", r"unknown key MODEL\.FCOS\.NMS_THRESH = 0\.5"),
    ("MODEL: {FCOS: 3}", r"unknown key MODEL\.FCOS = 3"),
])
def test_what_is_not_supported_is_refused_by_name(variant, text, says):
    with pytest.raises(ConfigError, match=says):
        variant(text)


def test_a_panoptic_configuration_is_refused_for_being_panoptic(variant):
    with pytest.raises(ConfigError, match=r"MODEL\.PANOPTIC_FPN\.COMBINE\.ENABLED = True is not supported"):
        variant("""
MODEL:
  RESNETS: {OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5]}
  SEM_SEG_HEAD: {LOSS_WEIGHT: 0.5}
  PANOPTIC_FPN: {COMBINE: {ENABLED: True, INSTANCES_CONFIDENCE_THRESH: 0.45, OVERLAP_THRESH: 0.4}}
""")


def test_a_refused_default_is_called_a_default(tmp_path):
    path = tmp_path / "bare.yaml"
    path.write_text("MODEL: {META_ARCHITECTURE: BlendMask}")
    with pytest.raises(ConfigError, match=r"bare\.yaml: MODEL\.\S+ = .* \(AdelaiDet's default\) is not supported"):
        load_config(path)


@pytest.mark.parametrize(("text", "says"), [
    ("_BASE_: absent.yaml", r"absent\.yaml: cannot be read: No such file"),
    ("_BASE_: broken.yaml", "_BASE_ leads back to this file"),
    ("_BASE_: [one.yaml, two.yaml]", "_BASE_ = .*supported: one file name"),
    ("[1, 2]", "expected a mapping of keys, found list"),
    ("", "expected a mapping of keys, found NoneType"),
    ("MODEL: {FCOS: [", "is not YAML"),
])
def test_files_that_cannot_be_read(tmp_path, text, says):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_config(path)
