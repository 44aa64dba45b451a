"""What Ray is told of a worker, by the settings; no cluster."""
from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the extra ray: pip install -e '.[ray]'")

from blendmaskd import settings
from blendmaskd.topology import HostError

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's and its libraries' own


def loaded(**tree: Any) -> settings.Settings:
    return settings.from_tree({"runtime": {"preload": "off"}, **tree})


def test_a_worker_takes_one_accelerator_or_cpus() -> None:
    from blendmaskd_workers.cluster import placement

    npu = placement.actor_options(loaded(devices=["npu:0", "npu:1"]))
    assert (npu["resources"], npu["num_cpus"]) == ({"NPU": 1}, 1)
    assert placement.actor_options(loaded(devices=["cuda:0"]))["num_gpus"] == 1
    cpu = loaded(devices=["cpu:0"], runtime={"preload": "off", "threads": 4})
    assert placement.actor_options(cpu)["num_cpus"] == 4
    assert placement.capacity(cpu, {"CPU": 11.0, "NPU": 2.0}) == 2
    assert placement.capacity(loaded(devices=["npu:0"]), {"CPU": 11.0, "NPU": 2.0}) == 2
    assert placement.capacity(loaded(devices=["cuda:0"]), {"CPU": 11.0}) == 0


def test_the_environment_has_what_is_the_same_on_all_nodes() -> None:
    from blendmaskd_workers.cluster import placement

    runtime = {"preload": "off", "task_queue": 1, "threads": 3}
    options = placement.actor_options(loaded(devices=["npu:0"], runtime=runtime, worker_env={"MINE": "1"}))
    variables = options["runtime_env"]["env_vars"]
    assert variables["TASK_QUEUE_ENABLE"] == "1"
    assert variables["MINE"] == "1"
    assert variables["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    assert not {"ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LD_PRELOAD"} & set(variables)


def test_devices_of_two_kinds_and_a_missing_library_are_refused() -> None:
    from blendmaskd_workers.cluster import placement

    with pytest.raises(placement.PlacementError, match="of one kind"):
        placement.actor_options(loaded(devices=["npu:0", "cpu:0"]))
    with pytest.raises(HostError, match=r"runtime\.preload"):
        placement.actor_options(loaded(devices=["npu:0"], runtime={"preload": "/nowhere/libmalloc.so"}))


def test_the_window_bounds_what_a_worker_is_given_and_load_decides_how_many_there_are() -> None:
    from blendmaskd_workers.cluster import serve
    from blendmaskd_workers.cluster.segmenter import leases_at_once

    assert leases_at_once(loaded(batch=4)) == 8
    assert leases_at_once(loaded(engine="timed", timed={"latency_ms": {1: 20, 2: 30}})) == 4
    assert leases_at_once(loaded(model={"exact": True})) == 2
    assert leases_at_once(loaded()) == 32, "nothing is known yet: the largest batch that is tried unasked"
    options = serve.worker_options(loaded(batch=4, drain_s=7.0, queue={"max_jobs": 9}), serve.Replicas(1, 3))
    assert options["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 8}
    assert options["max_ongoing_requests"] == 8
    assert options["max_queued_requests"] == 9
    assert options["graceful_shutdown_timeout_s"] == 7.0


def test_nodes_of_one_name_are_told_apart() -> None:
    from blendmaskd_workers.cluster import placement

    nodes = [{"NodeName": "10.0.0.1", "NodeID": "abcdef99"}, {"NodeName": "10.0.0.1", "NodeID": "123456ff"},
             {"NodeName": "10.0.0.2", "NodeID": "777777ff"}]  # fmt: skip
    assert [placement.node_name(node, nodes) for node in nodes] == ["10.0.0.1-abcdef", "10.0.0.1-123456", "10.0.0.2"]
