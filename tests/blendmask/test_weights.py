"""Checkpoints: reading, strict loading with named mismatches, reproducible random weights."""

import gzip
import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from zoo import CONFIGS, GOLDEN, crc32

from blendmaskd_workers.blendmask import (
    WeightsError,
    build,
    load_checkpoint,
    load_config,
    load_into,
    load_to_fine_tune,
    load_weights,
    random_weights,
)

# Only the length of their training tells these from the second.
SAME_NETWORK = {"R_50_3x": "R_50_1x", "550_R_50_1x": "550_R_50_3x"}


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_has_the_references_keys_shapes_and_types(name):
    listing = gzip.decompress((GOLDEN / f"state_dict_{SAME_NETWORK.get(name, name)}.tsv.gz").read_bytes()).decode()
    expected = {key: f"{shape} {dtype}" for key, shape, dtype in (row.split("\t") for row in listing.splitlines())}
    with torch.device("meta"):
        model = build(load_config(CONFIGS[name]))
    found = {
        key: f"{','.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"
        for key, value in model.state_dict().items()
    }
    assert sorted(expected.keys() - found.keys()) == []
    assert sorted(found.keys() - expected.keys()) == []
    assert {key: value for key, value in found.items() if expected[key] != value} == {}


def test_a_checkpoint_in_detectron2s_form_is_loaded_unchanged(tmp_path, small_config):
    model = build(small_config)
    weights = random_weights(model, seed=5)
    torch.save({"model": weights, "optimizer": {"lr": 0.1}, "iteration": 90000}, tmp_path / "model_final.pth")
    load_into(model, load_checkpoint(tmp_path / "model_final.pth"))
    assert crc32(model.state_dict()) == crc32(weights)


def test_mismatches_are_named_and_counted_and_nothing_is_loaded(small_config):
    model = build(small_config)
    before = crc32(model.state_dict())
    weights = random_weights(model)
    del weights["top_layer.bias"]
    weights["pixel_mean"] = torch.zeros(3)
    weights["top_layer.weight"] = torch.zeros(784, 64, 3, 3)
    with pytest.raises(WeightsError) as caught:
        load_into(model, weights)
    assert str(caught.value) == (
        "the weights do not fit the network: 1 missing: top_layer.bias; 1 unexpected: pixel_mean; "
        "1 of another shape: top_layer.weight (expected (196, 64, 3, 3), found (784, 64, 3, 3))")
    assert crc32(model.state_dict()) == before


def test_weights_that_fit_in_nothing_or_are_of_other_classes_say_so(tmp_path, small_config):
    model = build(small_config)
    torch.save({"stem.conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "backbone.pth")
    with pytest.raises(WeightsError, match=r"backbone\.pth: the weights do not fit .* of a backbone alone$"):
        load_weights(model, tmp_path / "backbone.pth")
    other = build(replace(small_config, num_classes=5))
    with pytest.raises(WeightsError, match=r"weights are of 5 classes, MODEL\.FCOS\.NUM_CLASSES is 3$"):
        load_into(model, random_weights(other))


def test_integers_are_no_weights(small_config):
    weights = {key: value.to(torch.int8) for key, value in random_weights(build(small_config)).items()}
    with pytest.raises(WeightsError, match=r"of another type: \S+ \(expected float32, found int8\)"):
        load_into(build(small_config), weights)


CLASS_LAYERS = ["proposal_generator.fcos_head.cls_logits.weight", "proposal_generator.fcos_head.cls_logits.bias",
                "basis_module.seg_head.6.weight", "basis_module.seg_head.6.bias"]  # fmt: skip


@pytest.mark.parametrize(("classes", "semantic", "anew"), [
    (5, 5, CLASS_LAYERS), (5, 3, CLASS_LAYERS[:2]), (3, 5, CLASS_LAYERS[2:]), (3, 3, []),
])  # fmt: skip
def test_fine_tuning_takes_all_but_layers_of_other_classes(tmp_path, small_config, classes, semantic, anew):
    source = random_weights(build(replace(small_config, num_classes=classes, semantic_classes=semantic)), seed=4)
    torch.save({"model": source}, tmp_path / "w.pth")
    model = build(small_config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    told = load_to_fine_tune(model, tmp_path / "w.pth")
    assert sorted(told) == sorted(f"{key} {tuple(source[key].shape)}" for key in anew)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in anew else source[key]), key


@pytest.mark.parametrize("change", [{"fpn_channels": 32}, {"attention_size": 14}, {"depth": 34}, {"num_cls_convs": 1}])
def test_fine_tuning_another_architecture_is_refused(tmp_path, small_config, change):
    other = replace(small_config, num_classes=5, semantic_classes=5, **change)
    torch.save({"model": random_weights(build(other))}, tmp_path / "w.pth")
    model = build(small_config)
    before = crc32(model.state_dict())
    with pytest.raises(WeightsError, match=r"w\.pth: the weights do not fit the network: "):
        load_to_fine_tune(model, tmp_path / "w.pth")
    assert crc32(model.state_dict()) == before


def test_class_layers_of_other_features_are_another_architecture(tmp_path, small_config):
    weights = random_weights(build(small_config))
    weights[CLASS_LAYERS[0]] = torch.zeros(5, 32, 3, 3)
    weights[CLASS_LAYERS[1]] = torch.zeros(5)
    torch.save({"model": weights}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 of another shape: \S+cls_logits\.weight \(expected \(3, 64, 3, 3\)"):
        load_to_fine_tune(build(small_config), tmp_path / "w.pth")


def test_many_mismatches_are_counted_after_the_first(small_config):
    model = build(small_config)
    with pytest.raises(WeightsError, match=r"186 missing: backbone\.\S+, .* and 181 more$"):
        load_into(model, {})


@pytest.mark.parametrize(("content", "says"), [
    ({"state_dict": {}}, 'found no "model"'),
    ([1, 2], 'found no "model"'),
    ({"model": torch.zeros(2)}, 'found no "model"'),
    ({"model": {"top_layer.bias": 3}}, "top_layer.bias is a int, not a tensor"),
])
def test_other_contents_are_refused(tmp_path, content, says):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=says):
        load_checkpoint(tmp_path / "w.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"absent\.pth: cannot be read: No such file"):
        load_checkpoint(tmp_path / "absent.pth")


class Touch:
    """Pickles to code that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_never_runs(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Touch(tmp_path / "touched")}, protocol=2))
    with pytest.raises(WeightsError, match="not a PyTorch checkpoint of plain tensors"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "touched").exists()


def test_damaged_files_give_one_kind_of_error(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": {"a": torch.ones(3)}}, path, _use_new_zipfile_serialization=False)
    whole, rng = path.read_bytes(), random.Random(0)
    complaints = []
    for _ in range(200):
        damaged = bytearray(whole[: rng.randrange(len(whole) + 1)])
        for _ in range(min(3, len(damaged))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except WeightsError as error:
            complaints.append(str(error))
    assert len(complaints) > 150
    assert all(complaint.startswith(str(path)) for complaint in complaints)
