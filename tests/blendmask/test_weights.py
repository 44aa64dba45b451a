"""Checkpoints: reading, strict loading with named mismatches, reproducible random weights."""

import gzip
import pickle
import random
from pathlib import Path

import pytest
import torch
from zoo import CONFIGS, GOLDEN, crc32

from blendmaskd_workers.blendmask import WeightsError, build, load_checkpoint, load_config, load_into, random_weights

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


def test_random_weights_with_another_class_bias_are_the_references(small_config):
    """With none, those of every network are checked against the reference's where its outputs are."""
    assert crc32(random_weights(build(small_config), seed=1, class_bias=-2.0)) == 0xB857DD73


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
