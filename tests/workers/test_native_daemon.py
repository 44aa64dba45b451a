"""The whole daemon with the native engine, on CPUs and on emulated NPUs: its answers are the bare network's."""
from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blendmaskd.coco import categories
from blendmaskd.protocol import Options
from blendmaskd_workers import blendmask, results
from checkout import ROOT, SOURCES

GOLDEN = ROOT / "tests" / "golden"
CONFIG = GOLDEN / "small_R18.yaml"
EMULATED = {"PYTHONPATH": f"{ROOT / 'tests' / 'emulated'}:{SOURCES}"}
PHOTOGRAPHS = ["chelsea.png", "coffee.png", "rocket.png"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small_R18.pth"
    network = blendmask.build(blendmask.load_config(CONFIG))
    torch.save({"model": blendmask.random_weights(network)}, path)
    return path


def expected(weights: Path, photograph: str, kind: str, exact: bool = False) -> list[dict[str, Any]]:
    """What the network itself says, without any daemon, in the memory format of the kind of device.

    `exact`: as it was trained, with each mask pasted over the whole image.
    """
    config = blendmask.load_config(CONFIG)
    network = blendmask.build(config)
    blendmask.load_into(network, blendmask.load_checkpoint(weights))
    if not exact:
        network = blendmask.for_inference(network, channels_last=kind == "cpu")
    pixels = np.asarray(Image.open(GOLDEN / "images" / photograph).convert("RGB"))[:, :, ::-1]
    prepared = blendmask.prepare(np.ascontiguousarray(pixels), config)
    [instances] = blendmask.segment(network, [prepared])
    found = blendmask.finish(instances, prepared)
    pasted = list(found.masks())
    masks: results.Masks = results.Stretched(found.probabilities, found.boxes, found.image_size)
    if exact:
        masks = results.Pasted(lambda index: (pasted[index], (0, 0)), found.image_size)
    classes = categories.resolve(config.num_classes)
    return results.to_coco(found.boxes, found.scores, found.classes, masks, classes, Options())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads would sum in another order than the workers' one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["cpu", pytest.param("npu", marks=pytest.mark.slow)])
def test_two_devices_answer_as_the_bare_network(daemon, weights, kind) -> None:
    server = daemon(
        devices=[f"{kind}:0", f"{kind}:1"],
        engine="native",
        model={"config": str(CONFIG), "weights": str(weights)},
        warm_up=[[64, 96]],
        runtime={"threads": 1},
        worker_env=EMULATED if kind == "npu" else {},
    )
    wanted = {name: expected(weights, name, kind) for name in PHOTOGRAPHS}
    jobs = PHOTOGRAPHS * 2
    answers = list(server.client.map([GOLDEN / "images" / name for name in jobs], window=4))
    for name, answer in zip(jobs, answers):
        assert answer.detections == wanted[name]
    assert {answer.device for answer in answers} == {f"{kind}:0", f"{kind}:1"}
    devices = server.devices()
    assert not any(device["restarts"] for device in devices.values())
    if kind == "npu":
        names = {name: device["actual"]["device_name"] for name, device in devices.items()}
        assert names == {"npu:0": "Ascend910-emulated physical 0", "npu:1": "Ascend910-emulated physical 1"}
        assert {device["actual"]["task_queue"] for device in devices.values()} == {2}


@pytest.mark.slow
@pytest.mark.slow
def test_a_model_that_was_replaced_beneath_the_daemon_is_told(daemon, weights, tmp_path, wait_until) -> None:
    """By a link, as deployments do; then a worker dies. The reload that was forgotten makes them one again."""
    other, current = tmp_path / "other.pth", tmp_path / "current.pth"
    network = blendmask.build(blendmask.load_config(CONFIG))
    torch.save({"model": blendmask.random_weights(network, seed=1)}, other)
    current.symlink_to(weights)
    model = {"config": str(CONFIG), "weights": str(current)}
    server = daemon(engine="native", model=model, warm_up=[[64, 64]], runtime={"threads": 1}, batch=1)

    def models() -> list[str]:
        return [device["actual"].get("model", "") for device in server.devices().values()]

    first, same = models()
    assert first == same
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert "blendmaskd_models 1.0" in server.get("/metrics")[1]
    current.unlink()
    current.symlink_to(other)
    os.kill(server.pids()["cpu:1"], signal.SIGKILL)
    wait_until(lambda: len({*models(), ""}) == 3, 60)
    second = next(model for model in models() if model != first)
    assert f"different models are served, a file was replaced: {first} on cpu:0; {second} on cpu:1" in server.log
    wait_until(lambda: "blendmaskd_models 2.0" in server.get("/metrics")[1])
    assert f'blendmaskd_device_model{{device="cpu:1",model="{second}"}} 1.0' in server.get("/metrics")[1]
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: models() == [second] * 2, 60)
    assert server.log.count("different models are served") == 1, "a reload's own difference is none"


def test_a_reload_asks_for_exact_answers_and_they_do_not_depend_on_company(daemon, weights, wait_until) -> None:
    """Eight jobs of one size, there at once, would make a batch, which is summed in another order."""
    model = {"config": str(CONFIG), "weights": str(weights)}
    table = {1: 100.0, 2: 101.0, 4: 102.0}  # by which a batch of four is best
    server = daemon(devices=["cpu:0"], engine="native", model=model, batch_latency_ms=table, warm_up=[[64, 96]],
                    runtime={"threads": 1})  # fmt: skip
    photograph = GOLDEN / "images" / "chelsea.png"
    served, exact = (expected(weights, photograph.name, "cpu", exact) for exact in (False, True))
    assert served != exact, "in the last digits"
    assert server.client.segment(photograph).detections == served
    assert server.devices()["cpu:0"]["actual"]["exact"] is False
    server.rewrite(model={**model, "exact": True})
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.devices()["cpu:0"]["actual"].get("exact"), 60)
    server.wait_ready()
    for answer in server.client.map([photograph] * 8, window=8):
        assert answer.detections == exact
    batches = wait_until(lambda: {batch for batch, *_ in server.devices()["cpu:0"]["shapes"]})
    assert batches == {1}
