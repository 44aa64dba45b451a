"""The engines' own rules; what the native one computes is tests/blendmask's subject."""
from __future__ import annotations

import importlib.util
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from blendmaskd import settings
from blendmaskd.assignment import EXIT_CANNOT_BOOT
from blendmaskd.protocol import Options
from blendmaskd_workers import __main__ as program
from blendmaskd_workers import blendmask, engines
from blendmaskd_workers.benchmark import replay as recording
from blendmaskd_workers.engines import EngineError, timed

GOLDEN = Path(__file__).parents[1] / "golden"


def make(*overrides: str) -> engines.Engine:
    return engines.make(settings.load(None, None, overrides), "cpu")


def test_the_timed_engine_sleeps_its_table_in_full_and_answers_with_a_checksum() -> None:
    engine = make("engine=timed", "timed.latency_ms={1: 20, 4: 50}")
    images = [np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8) for seed in range(3)]
    prepared = [engine.prepare(image) for image in images]
    start = time.perf_counter()
    outputs = engines.segment(engine, prepared)
    assert time.perf_counter() - start >= 0.040, "between the entries 1 and 4"
    for image, item, output in zip(images, prepared, outputs, strict=True):
        [found] = engine.finish(output, item, Options())
        assert found["checksum"] == zlib.crc32(image.tobytes())
        assert found["bbox"] == [0, 0, 8, 6]
        assert found["segmentation"]["size"] == [6, 8]
    assert "segmentation" not in engine.finish(outputs[0], prepared[0], Options(mask_format="none"))[0]


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["engine=timed"], 2),
        (["engine=timed", "timed.latency_ms={1: 10, 8: 90}"], 1),
        (["engine=timed", "batch=4"], 4),
        (["engine=native"], 1),
        (["engine=native", "batch=3"], 3),
        (["engine=native", "batch_latency_ms={1: 10, 2: 11}"], 2),
        (["engine=native", "batch_latency_ms={1: 10, 2: 11}", "model.exact=true"], 1),
    ],
    ids=["the record's table", "a table without gain", "timed, set", "native", "native, set", "a table", "exact"],
)
def test_the_batch_to_aim_at(overrides: list[str], size: int) -> None:
    assert engines.best_batch(settings.load(None, None, overrides)) == size


@pytest.mark.skipif(importlib.util.find_spec("adet") is not None, reason="needs a Python without AdelaiDet")
def test_without_adelaidet_its_engine_says_what_it_needs() -> None:
    with pytest.raises(EngineError, match=r"needs detectron2 and AdelaiDet.*engine native"):
        make("engine=adelaidet", "model.weights=some.pth").load()


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ([], "model.weights is not set"),
        (["model.weights=/nowhere.pth"], "/nowhere.pth"),
        (["model.weights=/nowhere.pth", "model.config=/nowhere.yaml"], "/nowhere.yaml"),
    ],
    ids=["no weights", "missing weights", "missing config"],
)
def test_a_network_that_cannot_be_loaded_is_not_tried_again(overrides: list[str], complaint: str) -> None:
    with pytest.raises(EngineError, match=complaint) as raised:
        make(*overrides).load()
    assert raised.value.exit_code == EXIT_CANNOT_BOOT


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="needs a host without torch_npu")
def test_an_npu_without_torch_npu_is_not_tried_again_but_a_device_that_is_not_there(tmp_path: Path) -> None:
    config = GOLDEN / "small_R18.yaml"
    torch.save({"model": blendmask.build(blendmask.load_config(config)).state_dict()}, tmp_path / "w")
    tree = {"model": {"config": str(config), "weights": str(tmp_path / "w")}}
    for device, code in (("npu:0", EXIT_CANNOT_BOOT), ("cuda:99", 1)):
        with pytest.raises(EngineError) as raised:
            engines.make(settings.from_tree({"devices": [device], **tree}), device).load()
        assert raised.value.exit_code == code


@pytest.mark.parametrize(("device", "says"), [("npu:0", ""), ("cpu:0", "model.precision = fp16: cpu: float16")])
def test_a_reload_is_checked_on_the_cpu_but_for_the_arithmetic_of_other_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str, says: str
) -> None:
    config = GOLDEN / "small_R18.yaml"
    torch.save({"model": blendmask.build(blendmask.load_config(config)).state_dict()}, tmp_path / "weights.pth")
    model = {"config": str(config), "weights": str(tmp_path / "weights.pth"), "precision": "fp16"}
    code = program._check(settings.from_tree({"devices": [device], "model": model}))
    assert code == (EXIT_CANNOT_BOOT if says else 0)
    assert says in capsys.readouterr().err


def test_the_timed_engine_with_outputs_does_the_native_engines_work_on_the_host(tmp_path: Path) -> None:
    config_path = GOLDEN / "small_R18.yaml"
    network = blendmask.build(blendmask.load_config(config_path))
    blendmask.load_into(network, blendmask.random_weights(network))
    torch.save({"model": network.state_dict()}, tmp_path / "weights.pth")
    native = make(f"model.config={config_path}", f"model.weights={tmp_path}/weights.pth")
    native.load()
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    prepared = native.prepare(image)
    [output] = engines.segment(native, [prepared])
    recording.record(network, image, tmp_path / "outputs.npz")

    replay = make("engine=timed", f"timed.outputs={tmp_path}/outputs.npz", f"model.config={config_path}")
    replay.load()
    start = time.perf_counter()
    [replayed] = engines.segment(replay, [replay.prepare(image)])
    assert time.perf_counter() - start >= 0.02179
    found = replay.finish(replayed, replay.prepare(image), Options())
    assert found == native.finish(output, prepared, Options())
    assert len(found) > 1


@pytest.mark.parametrize("content", [None, b"no arrays"])
def test_outputs_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "outputs.npz").write_bytes(content)
    with pytest.raises(EngineError, match=r"timed\.outputs"):
        make("engine=timed", f"timed.outputs={tmp_path}/outputs.npz").load()


def test_a_large_image_is_known_by_a_part_of_its_rows() -> None:
    image = np.random.default_rng(0).integers(0, 256, (800, 800, 3), np.uint8)
    rows = {row for row in range(0, 800, 7) if timed.checksum(changed(image, row)) != timed.checksum(image)}
    assert 0 in rows
    assert timed.checksum(image[:20]) == zlib.crc32(image[:20].data), "a small one by all"


def changed(image: np.ndarray, row: int) -> np.ndarray:
    other = image.copy()
    other[row] += 1
    return other
