"""What a worker's process was to be, what it is, and where the two differ.

Both are in the statistics of each device, `Actual` also in the worker's `Ready`.
"""
from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from blendmaskd.topology import format_cpus, parse_cpus


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a launch plan sets."""

    cpus: str  # a list such as 0-3,8
    threads: int | None  # OMP_NUM_THREADS; None, here and below: it is no number
    task_queue: int | None  # TASK_QUEUE_ENABLE; None also where the device has none
    preload: str | None  # the allocator's path; None: ld.so preloads none of ours
    env: dict[str, str]  # the variables that the plan set, `worker_env` among them


class Actual(Wanted, frozen=True, kw_only=True, omit_defaults=True):
    """The same, as the process found it, of `env` what is set; and what only a device can tell."""

    thread_cpus: dict[str, str]  # by name/tid, the CPU lists of threads with another than `cpus`, the main thread's
    device_name: str | None = None  # its model, such as Ascend910B3; None, here and below: the engine uses no device
    exact: bool | None = None  # whether the network runs as it was trained; None: it is none of ours
    dtype: str | None = None  # that the network computes in, such as bfloat16
    model: str | None = None  # a digest of the configuration, categories and weights that were loaded; None: none were
    dtype_reason: str | None = None  # why model.precision = auto chose it; None: it did not choose


W = TypeVar("W", bound=Wanted)
HIDDEN = "(hidden)"


def masked(found: W, names: Container[str], wanted: Mapping[str, str]) -> W:
    """Without the values of these variables, which may be secrets: only whether they are those of `wanted`."""
    env = {
        name: value if name not in names else HIDDEN if value == wanted.get(name) else f"{HIDDEN}, another"
        for name, value in found.env.items()
    }
    return msgspec.structs.replace(found, env=env)


def number(environment: Mapping[str, str], variable: str) -> int | None:
    text = environment.get(variable, "")
    return int(text) if text.isdigit() else None


def differences(wanted: Wanted, actual: Actual, secret: Container[str]) -> list[str]:
    """Where a worker's process is not what its plan wanted, a sentence each, without values of `secret` variables."""
    actual, wanted = masked(actual, secret, wanted.env), masked(wanted, secret, wanted.env)
    texts = [
        f"{name}: wanted {value}, is {getattr(actual, name)}"
        for name in ("threads", "task_queue", "preload")
        if (value := getattr(wanted, name)) is not None and value != getattr(actual, name)
    ]
    texts += [
        f"{name}: wanted {value!r}, is {actual.env.get(name)!r}"
        for name, value in wanted.env.items()
        if actual.env.get(name) != value
    ]
    allowed = set(parse_cpus(wanted.cpus))
    texts += [
        f"thread {thread} runs on CPUs {mask}, outside {wanted.cpus}"
        for thread, mask in {"main": actual.cpus, **actual.thread_cpus}.items()
        if not allowed.issuperset(parse_cpus(mask))
    ]
    unused = format_cpus(allowed.difference(parse_cpus(actual.cpus)))
    if unused and "CPU_AFFINITY_CONF" not in wanted.env:  # with it torch_npu narrows its threads on purpose
        texts.append(f"CPUs {unused} of {wanted.cpus} are not used")
    return texts


def models_shown(devices: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Of a snapshot's devices: what ready ones have loaded, by its digest, and which ones. Unless a reload is under way
    more than one means that a file was replaced beneath the daemon.
    """
    models: dict[str, list[str]] = {}
    for device in devices:
        if device["state"] == "ready" and (model := device["actual"].get("model")):
            models.setdefault(model, []).append(device["device"])
    return models


def differences_shown(device: Mapping[str, Any]) -> list[str]:
    """The same of a device in a snapshot; none until its worker is up."""
    if not device["actual"]:
        return []
    return differences(msgspec.convert(device["wanted"], Wanted), msgspec.convert(device["actual"], Actual), ())
