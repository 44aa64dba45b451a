"""Checkpoint files: weights in every form are read, none runs code, and what cannot be read says what it is."""

import argparse
import bz2
import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from blendmaskd_workers.blendmask import WeightsError, checkpoint, load_checkpoint, read_checkpoint

WEIGHTS = {
    "backbone.conv.weight": torch.arange(4096.0).reshape(2, 2, 32, 32) / 7,
    "backbone.conv.norm.num_batches_tracked": torch.tensor(9),
    "head.bias": torch.tensor([0.5, -1e-30, 3e30]),
}
ARRAYS = {key: value.numpy() for key, value in WEIGHTS.items()}


def prefixed(prefix):
    return {prefix + key: value for key, value in WEIGHTS.items()}


def trained():
    """What detectron2 saves in the middle of a training."""
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    return {"model": WEIGHTS, "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "iteration": 5}


FORMS = {
    "AdelaiDet's": lambda: {"model": WEIGHTS},
    "a state dict alone": lambda: WEIGHTS,
    "an ordered one": lambda: OrderedDict(WEIGHTS),
    "parameters": lambda: {key: torch.nn.Parameter(value, requires_grad=value.is_floating_point())
                           for key, value in WEIGHTS.items()},
    "in the middle of a training": trained,
    "NumPy's numbers beside": lambda: {"model": WEIGHTS, "iteration": np.int64(5), "best": np.float32(0.5),
                                       "done": np.bool_(True), "at": np.datetime64("2024-01-01")},
    "NumPy's arrays beside": lambda: {"model": WEIGHTS, "losses": np.arange(3.0), "names": np.array(["a", "bc"]),
                                      "mixed": np.array([1, "a", None], object)},
    "NumPy's arrays": lambda: {"model": ARRAYS, "__author__": "somebody"},
    "of the other byte order": lambda: {key: value.astype(value.dtype.newbyteorder(">"))
                                        for key, value in ARRAYS.items()},
    "under state_dict": lambda: {"state_dict": WEIGHTS, "epoch": 3},
    "beside a name": lambda: {"model": "blendmask", "state_dict": WEIGHTS},
    "a moving average": lambda: {"ema": {"module": WEIGHTS, "decay": 0.999}},
    "the weights before their average": lambda: {"model": WEIGHTS, "ema_state": {"head.bias": torch.zeros(3)}},
    "of DistributedDataParallel": lambda: {"model": prefixed("module.")},
    "of it, alone": lambda: prefixed("module."),
    "compiled": lambda: {"model": prefixed("_orig_mod.")},
    "compiled, then distributed": lambda: prefixed("module._orig_mod."),
    "distributed, then compiled": lambda: prefixed("_orig_mod.module."),
    "Lightning's": lambda: {"state_dict": prefixed("model."), "epoch": 3},
}  # fmt: skip


def check(path):
    found = load_checkpoint(path)
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[key], value) for key, value in WEIGHTS.items())
    assert all(value.device.type == "cpu" for value in found.values())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before zip"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path, form, zipped):
    torch.save(FORMS[form](), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    check(tmp_path / "w.pth")


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("content", [
    {"model": ARRAYS, "__author__": "somebody", "matching_heuristics": True},
    OrderedDict(ARRAYS),
    {"model": ARRAYS, "iteration": np.int64(5)},
], ids=["detectron2's", "alone", "NumPy's number"])  # fmt: skip
def test_pickles_of_the_model_zoo_are_read(tmp_path, content, protocol):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol))
    check(tmp_path / "w.pkl")


def rewritten(path, old, new):
    """A checkpoint whose pickle has other bytes."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    assert any(old in content for content in records.values())
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


def test_numpys_old_and_new_names_are_known(tmp_path):
    torch.save({"model": WEIGHTS, "iteration": np.int64(5), "losses": np.ones(3)}, tmp_path / "w.pth")
    here, there = b"numpy._core.", b"numpy.core."
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        here, there = there, here
    rewritten(tmp_path / "w.pth", here, there)
    check(tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth")["iteration"] == 5
    pickled = pickle.dumps({"model": ARRAYS}, 2)
    (tmp_path / "w.pkl").write_bytes(pickled.replace(here, there))
    check(tmp_path / "w.pkl")


@pytest.mark.parametrize("device", [b"cuda:1", b"npu:0"])
def test_tensors_of_other_devices_come_to_the_cpu(tmp_path, device):
    torch.save(WEIGHTS, tmp_path / "w.pth")
    rewritten(tmp_path / "w.pth", b"X\3\0\0\0cpu", b"X" + len(device).to_bytes(4, "little") + device)
    check(tmp_path / "w.pth")


def test_half_precision_stays_what_it_is(tmp_path):
    torch.save({"model": {"head.bias": torch.ones(3, dtype=torch.float16)}}, tmp_path / "w.pth")
    assert load_checkpoint(tmp_path / "w.pth")["head.bias"].dtype == torch.float16


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pth")
    assert load_checkpoint(tmp_path / "w.pth").keys() == {"module.a", "b"}


# ---- what cannot be read ----------------------------------------------------------------------------------------


def complaint(path):
    with pytest.raises(WeightsError) as caught:
        load_checkpoint(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert "weights_only" not in text  # PyTorch's advice to run what the file holds
    return text


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def packed(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def tarred(name, content):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def array_file(save, *arrays):
    file = io.BytesIO()
    save(file, *arrays)
    return file.getvalue()


GOOD = saved({"model": WEIGHTS})
OTHERS = {
    "empty": (b"", "is empty"),
    "zeros": (bytes(4096), "begins with zeros"),
    "HTML": (b"\n<!DOCTYPE html>\n<html><title>Sign in</title>", "an HTML page"),
    "HTML that begins with a comment": (b"<!-- saved -->\r\n<HTML lang='en'>\xe9", "an HTML page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "an XML document"),
    "JSON": (b'{"message": "Not Found"}', """text, which begins '{"message": "Not Found"}'"""),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 47234443\n", "`git lfs pull`"),
    "gzip": (gzip.compress(GOOD), "(gzip); unpack it"),
    "bzip2": (bz2.compress(GOOD), "(bzip2); unpack it"),
    "xz": (lzma.compress(GOOD), "(xz); unpack it"),
    "tar": (tarred("w.pth", GOOD), "tar archive; unpack it"),
    "tar that looks like a pickle": (tarred("\udc80\2", GOOD), "tar archive; unpack it"),
    "zip": (packed("run/w.pth", GOOD), "zip archive of something else (run/w.pth)"),
    "safetensors": ((23).to_bytes(8, "little") + b'{"a": {"dtype": "F32"}}', "a safetensors file"),
    "NumPy's array": (array_file(np.save, np.ones(3)), "NumPy"),
    "NumPy's arrays": (array_file(np.savez, np.ones(3)), "zip archive of something else (arr_0.npy)"),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image"),
    "noise": (b"\3\1\4\1\5\x92\x65\x35", "begins with 03 01 04 01 05 92 65 35"),
    "a newer pickle": (saved(WEIGHTS, pickle_protocol=4), "pickled in a way that PyTorch does not read"),
    "a number": (saved(3), 'found no "model" of named tensors, but a int'),
    "one tensor": (saved(torch.ones(3)), 'found no "model" of named tensors, but a Tensor'),
    "nothing named": (saved({}), "an empty mapping"),
    "without weights": (saved({"optimizer": {"state": {}}, "epoch": 3}), "a mapping of 'optimizer', 'epoch'"),
    "numbered": (saved({"model": {0: torch.ones(3)}}), "a mapping of 'model'"),
    "texts": (saved({"model": {"head.bias": "x"}}), "head.bias is a str, not a tensor"),
    "objects": (saved({"model": {"head.bias": np.array([None])}}), "head.bias is a ndarray, not a tensor"),
    "sparse": (saved({"head.bias": torch.ones(3).to_sparse()}), "head.bias is a tensor (of layout torch.sparse_coo)"),
    "without data": (saved({"head.bias": torch.ones(3, device="meta")}), "head.bias is a tensor (without data)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_else_a_file_is_is_said(tmp_path, kind):
    content, says = OTHERS[kind]
    (tmp_path / "w.pth").write_bytes(content)
    assert says in complaint(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_named(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), tmp_path / "w.pth")
    assert "a TorchScript program" in complaint(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_weights_are_named(tmp_path):
    torch.save({"head.bias": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, tmp_path / "w.pth")
    assert "head.bias is a tensor (quantized)" in complaint(tmp_path / "w.pth")


def test_what_is_no_file_is_named(tmp_path):
    assert "cannot be read: Is a directory" in complaint(tmp_path)
    assert "cannot be read: No such file" in complaint(tmp_path / "absent.pth")


DAMAGED = {"zip": GOOD, "before zip": saved({"model": WEIGHTS}, _use_new_zipfile_serialization=False),
           "pickle": pickle.dumps({"model": ARRAYS})}  # fmt: skip


@pytest.mark.parametrize("form", DAMAGED)
def test_truncated_files_say_so(tmp_path, form):
    whole = DAMAGED[form]
    for length in (10, 100, 600, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "w.pth").write_bytes(whole[:length])
        assert "truncated or damaged" in complaint(tmp_path / "w.pth")


def test_flipped_bits_do_not_become_weights(tmp_path):
    place = GOOD.index(WEIGHTS["backbone.conv.weight"].numpy().tobytes()) + 4000
    flipped = bytearray(GOOD)
    flipped[place] ^= 1
    (tmp_path / "w.pth").write_bytes(flipped)
    assert "damaged" in complaint(tmp_path / "w.pth")


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="needs a PyTorch with the option")
def test_checkpoints_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    check(tmp_path / "w.pth")


# ---- code in a checkpoint ---------------------------------------------------------------------------------------


class Touch:
    """Pickles to code that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


WRITERS = {
    "zip": torch.save,
    "before zip": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: Path(path).write_bytes(pickle.dumps(content)),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("place", ["model", "beside"])
def test_code_never_runs_and_is_named(tmp_path, write, place):
    evil = Touch(tmp_path / "touched")
    WRITERS[write]({"model": evil} if place == "model" else {"model": ARRAYS, "x": evil}, tmp_path / "w.pth")
    assert "it holds posix.mkdir, which is no plain data" in complaint(tmp_path / "w.pth")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("write", WRITERS)
def test_classes_are_named_with_what_to_do(tmp_path, write):
    for content, name in (({"model": ARRAYS, "args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"),
                          ({"model": torch.nn.ReLU()}, "torch.nn.modules.activation.ReLU")):  # fmt: skip
        WRITERS[write](content, tmp_path / "w.pth")
        text = complaint(tmp_path / "w.pth")
        assert f"it holds {name}" in text
        assert 'torch.save({"model": model.state_dict()}, "weights.pth")' in text


def test_an_older_pytorch_says_which_reads_numpys_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_CAN_ALLOW", False)
    torch.save({"model": WEIGHTS, "iteration": np.int64(5)}, tmp_path / "w.pth")
    assert "multiarray.scalar, which is no plain data (PyTorch 2.5 and newer read it)" in complaint(tmp_path / "w.pth")
