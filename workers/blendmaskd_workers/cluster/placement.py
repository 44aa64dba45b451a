"""What a worker asks of Ray, and what it makes of its process, as `blendmaskd.shell.processes` does on one host.

`actor_options` is for whoever starts workers: resources, and by the runtime environment what must be there before the
process starts. `occupy` is for the worker itself, before anything imports torch: it learns from Ray on which node and
device it is, plans as the daemon does, and applies what depends on the node: visible devices, threads, CPU set. What
took effect is then compared with what was wanted, as everywhere.
"""
from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from blendmaskd import topology
from blendmaskd.core import launch_plan
from blendmaskd.core.launch_plan import Basis, LaunchPlan
from blendmaskd.settings import Settings
from blendmaskd.shell import launch
from blendmaskd_workers import process

VISIBLE_DEVICES = frozenset(topology.VISIBLE_DEVICES.values())
RESOURCES = {"npu": "NPU", "cuda": "GPU"}  # Ray's own names; a CPU worker takes CPUs
# Differ from node to node; a worker sets them itself, before torch reads them.
OF_THE_NODE = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "CPU_AFFINITY_CONF", "CUDA_DEVICE_ORDER"}
ROUNDS = 20  # of giving threads their CPUs, while other threads start more


class PlacementError(RuntimeError):
    """Settings that cannot be met under Ray, or a node that is not what they ask for; the text says what to change."""


def device_kind(settings: Settings) -> str:
    """npu, cuda or cpu. Raises `PlacementError` for devices of several kinds: all workers of a deployment are alike."""
    kinds = {device.partition(":")[0] for device in settings.devices}
    if len(kinds) > 1:
        raise PlacementError(f"devices = {settings.devices}: under Ray all of a deployment's are of one kind; "
                             "deploy one application for each kind")  # fmt: skip
    return kinds.pop()


def actor_options(settings: Settings) -> dict[str, Any]:
    """What Ray is told of each worker: `num_cpus`, `num_gpus` or `resources`, and `runtime_env`."""
    kind = device_kind(settings)
    options: dict[str, Any] = {"num_cpus": 1, "runtime_env": {"env_vars": _environment(settings, kind)}}
    if kind == "npu":
        options["resources"] = {"NPU": 1}
    elif kind == "cuda":
        options["num_gpus"] = 1
    elif settings.runtime.threads != "auto":
        options["num_cpus"] = settings.runtime.threads
    return options


def capacity(settings: Settings, resources: Mapping[str, float]) -> int:
    """How many workers `resources`, a node's or the cluster's, have room for."""
    kind = device_kind(settings)
    needed = 1 if kind in RESOURCES else actor_options(settings)["num_cpus"]
    return int(resources.get(RESOURCES.get(kind, "CPU"), 0) // needed)


def occupy(settings: Settings) -> tuple[str, LaunchPlan]:
    """Take the place that Ray has given this worker's process. Once in a process, before torch is imported.

    Returns the node's name in metrics and results, and the plan that the process now follows. Raises `PlacementError`
    or `HostError` where the node is not what settings demand.
    """
    context = ray.get_runtime_context()
    node, name = own_node()
    kind = device_kind(settings)
    number = _number(kind, context.get_accelerator_ids())
    base = _base_environment(context.runtime_env.get("env_vars") or {})
    siblings = [f"{kind}:{i}" for i in range(max(capacity(settings, node["Resources"]), number + 1))]
    plan = launch_plan.plan(f"{kind}:{number}", launch.basis(settings, base, siblings), base)
    _apply(plan)
    return name, plan


def own_node() -> tuple[dict[str, Any], str]:
    """This process's node, and its name."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    own = ray.get_runtime_context().get_node_id()
    node = next(node for node in nodes if node["NodeID"] == own)
    return node, node_name(node, nodes)


def node_name(node: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> str:
    """Ray's name of a node, its address unless it was given one; made unique among `nodes` where it is not."""
    names = Counter(each["NodeName"] for each in nodes)
    name: str = node["NodeName"]
    return name if names[name] == 1 else f"{name}-{node['NodeID'][:6]}"


def _environment(settings: Settings, kind: str) -> dict[str, str]:
    """What must be in a worker's environment when its process starts, as far as it is the same on all nodes."""
    basis = Basis(settings, {}, launch.resolve_preload(settings.runtime.preload), available=(0,), quota=math.inf)
    own = launch_plan.plan(f"{kind}:0", basis, {}).assignment.wanted.env
    kept = {name: value for name, value in own.items() if name not in OF_THE_NODE | VISIBLE_DEVICES}
    return kept | settings.worker_env


def _number(kind: str, accelerators: Mapping[str, Sequence[str]]) -> int:
    """The device's number on its node: an accelerator's is Ray's, a CPU worker's the first that is free on the host."""
    if kind == "cpu":
        return _free_number()
    ids = accelerators.get(RESOURCES[kind], [])
    if len(ids) != 1 or not ids[0].isdigit():
        raise PlacementError(f"Ray gave this worker the {RESOURCES[kind]}s {ids}: expected one, by its number")
    return int(ids[0])


def _free_number() -> int:
    """The lowest number that no CPU worker of this host has. A socket's name holds it, and ends with the process."""
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for number in itertools.count():
        try:
            held.bind(f"\0blendmaskd-{os.getuid()}-cpu-{number}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        _held.append(held)
        return number
    raise AssertionError("numbers do not end")


_held: list[socket.socket] = []  # for as long as this process lives


def _base_environment(given: Mapping[str, str]) -> dict[str, str]:
    """This process's environment as the node had it: without the device that Ray chose and our allocator."""
    hidden = set(VISIBLE_DEVICES)
    if os.environ.get("LD_PRELOAD") == given.get("LD_PRELOAD"):
        hidden.add("LD_PRELOAD")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def _apply(plan: LaunchPlan) -> None:
    """What can still be changed in a running process. LD_PRELOAD cannot: if it is missing, `process.observe` tells."""
    for name in ("CPU_AFFINITY_CONF", *VISIBLE_DEVICES):
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in plan.assignment.wanted.env.items() if name != "LD_PRELOAD"})
    wanted = topology.format_cpus(plan.cpus)
    for _ in range(ROUNDS):
        others = [int(thread.rpartition("/")[2]) for thread, mask in process.thread_masks().items() if mask != wanted]
        for thread in others:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.sched_setaffinity(thread, plan.cpus)
        if not others:
            return
