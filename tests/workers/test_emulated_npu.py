"""The emulated devices of tests/emulated_npu.py behave as two NPUs and compute what the CPU computes, bit for bit.

The emulation stays in a process once it is installed, so the checks run in a process of their own, in which
tests/emulated is on PYTHONPATH as it is in a worker.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from checkout import ROOT, SOURCES

NPU = [torch.device("npu", 0), torch.device("npu", 1)] if hasattr(torch, "npu") else []


def same_as_on_the_cpu(compute: Callable[..., Any], *tensors: torch.Tensor) -> None:
    """`compute` of the tensors on each emulated device is the CPU's result, and stays on its device."""
    expected = _as_tuple(compute(*tensors))
    for device in NPU:
        found = _as_tuple(compute(*(tensor.to(device) for tensor in tensors)))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.device == device
            assert ours.stride() == theirs.stride()
            assert torch.equal(ours.cpu(), theirs)


def _as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def check_convolution_and_normalisation() -> None:
    images, weight = torch.randn(2, 3, 33, 47), torch.randn(8, 3, 3, 3)
    for stride in (1, 2):
        same_as_on_the_cpu(lambda x, w, s=stride: F.conv2d(x, w, stride=s, padding=1), images, weight)
    same_as_on_the_cpu(lambda x: F.group_norm(x, 2), torch.randn(2, 8, 9, 9))
    same_as_on_the_cpu(
        lambda x, m, v: F.batch_norm(x, m, v), torch.randn(2, 8, 9, 9), torch.randn(8), torch.rand(8) + 0.5
    )
    same_as_on_the_cpu(lambda x: F.max_pool2d(x.relu(), 3, 2, 1), images)
    same_as_on_the_cpu(lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), images)
    same_as_on_the_cpu(lambda x: F.interpolate(x, size=(60, 80), mode="bilinear", align_corners=False), images)
    same_as_on_the_cpu(F.linear, torch.randn(5, 16), torch.randn(7, 16), torch.randn(7))
    same_as_on_the_cpu(torch.matmul, torch.randn(2, 5, 16), torch.randn(2, 16, 4))


def check_selection_and_sampling() -> None:
    scores, cells = torch.rand(4, 500), torch.randint(0, 500, (4, 20))
    same_as_on_the_cpu(lambda x: torch.topk(x, 50, dim=1), scores)
    same_as_on_the_cpu(lambda x: torch.sort(x, descending=True, stable=True), scores)
    same_as_on_the_cpu(lambda x, i: x.gather(1, i), scores, cells)
    same_as_on_the_cpu(lambda x, i: x[:, i[0]], scores, cells)
    same_as_on_the_cpu(lambda x: x[x > 0.5], scores)
    same_as_on_the_cpu(lambda x, g: F.grid_sample(x, g, align_corners=False), torch.randn(2, 3, 9, 9),
                       torch.rand(2, 5, 5, 2) * 2 - 1)
    same_as_on_the_cpu(lambda x: (x.softmax(1), x.sigmoid(), x.cumsum(1), x.std()), scores)
    same_as_on_the_cpu(lambda x: torch.where(x > 0.5, x, x.new_zeros(())).masked_fill(x > 0.9, 1.0), scores)
    same_as_on_the_cpu(lambda x: torch.cat([x, x.flip(1), torch.arange(500.0, device=x.device)[None]]), scores)
    same_as_on_the_cpu(lambda x: torch.einsum("nk,mk->nm", x, x), scores)


def check_writes_through_views_reach_their_base() -> None:
    def write(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[1].fill_(7)
        x[:, 0] = torch.arange(4.0, device=x.device)
        x.view(-1)[5:7].mul_(2)
        return x

    same_as_on_the_cpu(write, torch.randn(4, 5))


def check_inference_mode() -> None:
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    image = torch.randn(1, 3, 9, 9)
    with torch.inference_mode():
        expected = layer(image)
        for device in NPU:
            assert torch.equal(layer.to(device)(image.to(device)).cpu(), expected)
    normal = torch.ones(4, device="npu:0")
    with torch.inference_mode():
        assert not normal.view(2, 2).is_inference()
        assert (normal + 1).is_inference()


def check_in_place_and_out_return_their_tensor() -> None:
    for inference in (False, True):
        with torch.inference_mode(inference):
            x, out = torch.ones(4, device="npu:0"), torch.empty(4, device="npu:0")
            assert x.add_(1) is x
            assert torch.add(x, x, out=out) is out
            assert out.tolist() == [4.0] * 4


def check_autocast_lowers_precision_as_on_the_cpu() -> None:
    x, weight = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.conv2d(x, weight)
    with torch.autocast("npu", dtype=torch.bfloat16):
        found = F.conv2d(x.to("npu:1"), weight.to("npu:1"))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.cpu(), expected)


def check_devices_are_kept_apart() -> None:
    here, there = torch.ones(3, device="npu:0"), torch.ones(3, device="npu:1")
    for bad in (
        lambda: here + there,
        lambda: here + torch.ones(3),
        lambda: torch.cat([here, there]),
        lambda: F.conv2d(torch.ones(1, 1, 3, 3, device="npu:0"), torch.ones(1, 1, 1, 1)),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            bad()
    assert (here + there.to("npu:0")).device == here.device
    assert (here + torch.tensor(1.0)).device == here.device
    with pytest.raises(TypeError, match="numpy"):
        here.numpy()
    with pytest.raises(RuntimeError, match="invalid npu device ordinal 2"):
        torch.ones(3, device="npu:2")
    with pytest.raises(RuntimeError, match="invalid npu device ordinal 2"):
        torch.npu.set_device(2)


def check_each_thread_has_its_own_current_device() -> None:
    torch.npu.set_device(1)
    assert torch.ones(3, device="npu").device == NPU[1]
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: torch.ones(3, device="npu").device).result() == NPU[0]
    with torch.npu.device(0):
        assert torch.npu.current_device() == 0
    assert torch.npu.current_device() == 1
    torch.npu.set_device(0)


def check_threads_compute_side_by_side() -> None:
    x, weight = torch.randn(1, 8, 24, 24), torch.randn(8, 8, 3, 3)
    expected = F.conv2d(x, weight, padding=1)
    start = threading.Barrier(4)

    def compute(number: int) -> bool:
        device = NPU[number % 2]
        torch.npu.set_device(device)
        start.wait(10)
        return all(torch.equal(F.conv2d(x.to(device), weight.to(device), padding=1).cpu(), expected) for _ in range(30))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(compute, range(4)))


def check_what_a_host_waits_for_is_counted() -> None:
    import emulated_npu

    x = torch.rand(8, device="npu:0")
    emulated_npu.host_waits.clear()
    torch.topk(x * 2, 3)[0][torch.tensor([0, 1], device="npu:0")]
    assert not emulated_npu.host_waits
    x.cpu()
    x[x > 0.5]
    x.max().item()
    x.nonzero()
    torch.empty(8).copy_(x)
    assert emulated_npu.host_waits == {
        "copy to host": 2,
        "aten::index.Tensor": 1,
        "aten::_local_scalar_dense": 1,
        "aten::nonzero": 1,
    }


def check_workers_devices_opens_them() -> None:
    from blendmaskd_workers import devices

    device = devices.open_device("npu:1", "fp32")
    assert device.name() == "Ascend910-emulated physical 1"
    assert (torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32) == (False, False)
    assert device.memory().total > 0
    image = torch.randn(3, 4)
    on_device = device.upload(image)
    device.synchronize()
    assert on_device.device == NPU[1]
    assert torch.equal(on_device.cpu(), image)
    with pytest.raises(devices.DeviceError, match="2 npu devices are visible"):
        devices.open_device("npu:2")
    devices.open_device("npu:0", "hf32")
    assert (torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32) == (True, True)


def check_an_upload_beside_the_computation_arrives_when_it_is_taken() -> None:
    import emulated_npu
    from blendmaskd_workers import devices

    device = devices.open_device("npu:1")
    image = torch.randint(0, 200, (3, 8, 8), dtype=torch.uint8)
    with ThreadPoolExecutor(1) as host:
        staged = host.submit(device.stage, image).result()
    assert staged.tensor.device == NPU[1]
    assert (staged.tensor.twin == emulated_npu.UNARRIVED).all(), "nobody has waited yet"
    emulated_npu.kept_for_streams.clear()
    for _ in range(2):
        assert torch.equal(staged.take().cpu(), image)
    assert emulated_npu.kept_for_streams[0] is staged.tensor
    assert torch.equal(devices.open_device("cpu").stage(image).take(), image)


def check_a_graph_computes_again_what_was_recorded() -> None:
    from blendmaskd_workers import blendmask, devices

    network = blendmask.build(blendmask.load_config(ROOT / "tests/golden/small_R18.yaml"))
    blendmask.load_into(network, blendmask.random_weights(network))
    device = devices.open_device("npu:0")
    network.to(device.torch_device)
    first, second = torch.randn(2, 1, 3, 96, 64).mul(60).to(device.torch_device)
    with torch.inference_mode():
        begin, complete, captured = blendmask.capture(network, device.graph, first)
        fewest = blendmask.places(network, 1)
        for images in (second, first):
            found, expected = complete(begin(images)), network.propose(images)
            kept = blendmask.choose(network, expected, expected.packed.cpu().numpy())
            masks = blendmask.blend(network, found, kept, device.upload, fewest, captured)
            alone = blendmask.blend(network, expected, kept, device.upload, fewest)
            assert masks is not None
            assert alone is not None
            assert masks.shape[0] == alone.shape[0] == fewest
            assert torch.equal(masks.cpu(), alone.cpu())
            assert torch.equal(found.packed.cpu(), expected.packed.cpu())
            assert torch.equal(found.bases.cpu(), expected.bases.cpu())
            for ours, theirs in zip(found.box_features, expected.box_features, strict=True):
                assert torch.equal(ours.cpu(), theirs.cpu())
    with pytest.raises(RuntimeError, match="not permitted while a graph is recorded"):
        device.graph(lambda x: x.max().item(), first)
    with pytest.raises(devices.UnsupportedError, match="cpu: graphs need an npu or cuda device"):
        devices.open_device("cpu").graph(network.propose, first)


def check_the_engine_serves_what_the_network_says() -> None:
    """With uploads beside the computation, with graphs for the size of warm-up and without for another, in half too."""
    import tempfile

    import numpy as np

    from blendmaskd import settings
    from blendmaskd.protocol import Options
    from blendmaskd_workers import blendmask, engines

    config = blendmask.load_config(ROOT / "tests/golden/small_R18.yaml")
    network = blendmask.build(config)
    blendmask.load_into(network, blendmask.random_weights(network))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size, np.uint8) for size in ((64, 96, 3), (64, 96, 3), (96, 64, 3))]
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({"model": network.state_dict()}, file)
        file.flush()
        for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": torch.float32}.items():
            model = {"config": str(ROOT / "tests/golden/small_R18.yaml"), "weights": file.name}
            chosen = settings.from_tree(
                {"devices": ["npu:0"], "model": {**model, "precision": precision, "graphs": precision == "fp32"}})
            engine = engines.make(chosen, "npu:0")
            engine.load()
            engine.warm_up([(64, 96)], 2)
            assert len(engine._graphs) == 2 * (precision == "fp32")  # type: ignore[attr-defined]
            bare = blendmask.for_inference(network, dtype)
            prepared = [engine.prepare(image) for image in images]
            first, second, other = prepared
            batches = [[first, second], [second, first], [first, second], [other], [other]]
            outputs = two_runs_in_flight(engine, batches)
            for ours, swapped in zip(outputs[0] + outputs[2], 2 * outputs[1][::-1], strict=True):
                np.testing.assert_allclose(ours.probabilities, swapped.probabilities, rtol=1e-4)
            expected = [blendmask.segment(bare, [blendmask.prepare(image, config)]) for image in images]
            for output, item, [instances] in zip(outputs[0] + outputs[3], prepared, expected, strict=True):
                assert len(output.scores) > 10
                np.testing.assert_allclose(output.scores, instances.scores, rtol=1e-4)
                assert engine.finish(output, item, Options())


def two_runs_in_flight(engine: Any, batches: list[list[Any]]) -> list[list[Any]]:
    """The outputs of each batch; the next is launched before the candidates of the last are waited for."""
    runs, outputs = [engine.launch(batches[0])], []
    runs[0].complete()
    for batch in batches[1:]:
        runs.append(engine.launch(batch))
        runs[-2].choose()
        runs[-1].complete()
        if len(runs) > 2:
            outputs.append(runs[-3].collect())
    runs[-1].choose()
    outputs += [run.collect() for run in runs[-2:]]
    assert all(run.arrived() and run.times().busy_s >= 0 for run in runs)
    return outputs


def check_a_copy_is_late_and_the_host_leaves_it_alone() -> None:
    on_device = torch.ones(3, device=NPU[0])
    on_host = torch.empty(3, pin_memory=True).copy_(on_device, non_blocking=True)
    arrived = torch.npu.Event()
    arrived.record()
    on_device.zero_()  # later work of the same stream
    assert on_host.isnan().all()
    assert not arrived.query()
    arrived.synchronize()
    assert on_host.tolist() == [1, 1, 1]
    source = torch.ones(3)
    source.to(NPU[0], non_blocking=True)
    source += 1
    with pytest.raises(RuntimeError, match="the host wrote what a copy to the device still read"):
        torch.npu.current_stream().synchronize()


def check_the_network_equals_the_cpus_on_a_chip_that_rounds_scores() -> None:
    """Whose topk gives values of float16, and which does not divide int64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMULATED_CHIP", "Ascend910A")
        score = torch.tensor([0.1001, 0.1])
        assert score.to(NPU[0]).topk(1).values.item() == score[0].half().item() != score[0].item()
        with pytest.raises(RuntimeError, match="int64 runs on the AI CPU"):
            torch.arange(4).to(NPU[0]) // 3
        check_the_network_equals_the_cpus()


def check_each_chip_gets_the_arithmetic_that_it_has() -> None:
    from blendmaskd_workers import devices

    with pytest.MonkeyPatch.context() as patch:
        for chip in ("Ascend910A", "Ascend910ProB", "Ascend910B", "Ascend310P3"):
            patch.setenv("EMULATED_CHIP", chip)
            for precision in ("fp32", "hf32", "bf16"):
                refusal = f"npu:0: {chip}-.*no float32.*set model.precision to native.*, fp16 or auto"
                with pytest.raises(devices.UnsupportedError, match=refusal) as refused:
                    devices.open_device("npu:0", precision)
                assert refused.value.cause == "precision"
            chosen = devices.open_device("npu:0", "auto")
            assert (chosen.dtype, chosen.why) == (torch.float32, f"native: {chosen.name()} multiplies float16 alone")
            assert devices.open_device("npu:0", "native").why is None
            assert devices.open_device("npu:0", "fp16").dtype == torch.float16
            with pytest.raises(devices.UnsupportedError, match="no graph can record"):
                chosen.graph(lambda x: x + 1, torch.zeros(1, device=NPU[0]))
        for chip in ("Ascend910B1", "Ascend910B4-1", "Ascend910_9391", "Ascend310B1"):
            patch.setenv("EMULATED_CHIP", chip)
            for precision, hf32 in {"fp32": (False, False), "native": (True, False), "hf32": (True, True)}.items():
                devices.open_device("npu:0", precision)
                assert (torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32) == hf32
            assert (devices.open_device("npu:0", "auto").why, torch.npu.conv.allow_hf32) == (None, False)


def check_no_graph_is_recorded_at_the_highest_level_of_the_task_queue() -> None:
    from blendmaskd_workers import devices

    device, image = devices.open_device("npu:0"), torch.zeros(2, device=NPU[0])
    torch.npu.set_task_queue_enable(2)
    with pytest.raises(RuntimeError, match="TASK_QUEUE_ENABLE = 2"), torch.npu.graph(torch.npu.NPUGraph()):
        pass
    assert device.graph(lambda x: x + 1, image)(image).tolist() == [1, 1]
    assert device.task_queue() == 1
    torch.npu.config.allow_internal_format = True
    with pytest.raises(RuntimeError, match="allow_internal_format = False"):
        device.graph(lambda x: x + 1, image)
    opened = devices.open_device("npu:0")
    assert opened.graph(lambda x: x + 1, image)(image).tolist() == [1, 1]


def check_the_network_equals_the_cpus() -> None:
    import emulated_npu
    from blendmaskd_workers.blendmask import config, inference, model, preprocess

    small = config.load_config(ROOT / "tests/golden/small_R18.yaml")
    torch.manual_seed(0)
    network = model.build(small)
    torch.nn.init.constant_(network.proposal_generator.fcos_head.cls_logits.bias, -1.0)  # or nothing would be found
    batch = [preprocess.prepare(torch.randint(0, 256, (120, 160, 3), dtype=torch.uint8).numpy(), small)] * 2
    expected = inference.segment(network, batch)
    assert len(expected[0].scores) > 10
    for device in NPU:
        network.to(device)
        emulated_npu.host_waits.clear()
        found = inference.segment(network, batch, lambda tensor, device=device: tensor.to(device))
        assert emulated_npu.host_waits == {"copy to host": 2}  # the candidates, and the masks
        for ours, theirs in zip(found, expected, strict=True):
            for field in type(theirs).__dataclass_fields__:
                assert (getattr(ours, field) == getattr(theirs, field)).all(), (device, field)


def check_visible_devices_are_renumbered() -> None:
    cases = {"0": [0], "1": [1], "0,1": [0, 1], "1,5": [1], "1,0": [], "": []}
    for visible, physical in cases.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
            names = [torch.npu.get_device_name(index) for index in range(torch.npu.device_count())]
            assert names == [f"Ascend910-emulated physical {number}" for number in physical], visible
            assert torch.npu.is_available() == bool(physical)


CHECKS = [name for name in list(globals()) if name.startswith("check_")]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Each check's traceback, empty where it passed."""
    return json.loads(_python(str(Path(__file__))))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_emulation(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "", outcomes[name]


def test_a_process_sees_the_device_that_it_was_given() -> None:
    program = "import torch; print(torch.npu.device_count(), torch.npu.get_device_name('npu:0'))"
    assert _python("-c", program, ASCEND_RT_VISIBLE_DEVICES="1").strip() == "1 Ascend910-emulated physical 1"


def test_a_process_without_torch_does_not_load_it() -> None:
    assert _python("-c", "import sys; print('torch' in sys.modules)").strip() == "False"


def _python(*arguments: str, **variables: str) -> str:
    """What Python prints where the emulated devices are."""
    environment = {name: value for name, value in os.environ.items() if name != "ASCEND_RT_VISIBLE_DEVICES"}
    path = f"{ROOT / 'tests' / 'emulated'}:{ROOT / 'tests'}:{SOURCES}"
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(
        [sys.executable, "-W", "error", *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _outcome(name: str) -> str:
    try:
        globals()[name]()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({name: _outcome(name) for name in CHECKS}))
