"""Whether each device gets CPUs of its own, near it and at full clock."""
from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

from blendmaskd import discovery, topology
from blendmaskd.check.finding import Finding, error, ok, warning
from blendmaskd.settings import Settings
from blendmaskd.topology import Cpus, HostError, format_cpus

DYNAMIC_DRIVERS = ("intel_pstate", "amd-pstate-epp")  # their powersave raises the clock as needed


def places(settings: Settings, environment: Mapping[str, str]) -> tuple[dict[str, Cpus], Mapping[str, Cpus], str]:
    """The plan, the CPUs near each device, and what stands in the way of a plan."""
    visible = []
    for device in settings.devices:
        with contextlib.suppress(HostError):  # `devices.ask` tells of it
            if not device.startswith("cpu"):
                topology.visible_id(device, environment)
            visible.append(device)
    try:
        return *discovery.places(visible, settings.runtime.placed, environment), ""
    except HostError as problem:
        return {}, {}, str(problem)


def may_be_slow(cpu: int) -> bool:
    """Whether its governor may keep it at a low clock."""
    folder = discovery.SYSFS / f"devices/system/cpu/cpu{cpu}/cpufreq"
    governor, driver = discovery.read(folder / "scaling_governor"), discovery.read(folder / "scaling_driver")
    return governor == "powersave" and driver not in DYNAMIC_DRIVERS


def judge_complaint(complaint: str) -> list[Finding]:
    """`complaint`: what stands in the way of a plan; empty: nothing."""
    return [error("cpus", complaint, "set runtime.cpus to auto, or to CPUs in this list")] if complaint else []


def judge(plan: Mapping[str, Cpus], near: Mapping[str, Cpus], placed: Iterable[str], hinted: bool) -> list[Finding]:
    """The CPU set of each device. `placed`: by the settings; `hinted`: the host's tool answers at all."""
    findings = []
    for name, own in plan.items():
        shared = sorted(other for other, theirs in plan.items() if other != name and set(theirs) & set(own))
        text = f"{name}: CPUs {format_cpus(own)}"
        by_place = set(near.get(name, ())) & set(own)
        if shared:
            findings.append(warning("cpus", f"{text}, shared with {', '.join(shared)}",
                                    "use fewer devices or more CPUs, or set runtime.cpus"))  # fmt: skip
        elif name.startswith("npu") and hinted and name not in placed and not by_place:
            findings.append(warning("cpus", f"{text}; unknown which are near it",
                                    "run npu-smi info -t topo, then set runtime.cpus"))  # fmt: skip
        else:
            why = "by runtime.cpus" if name in placed else "near it" if by_place else "an even share"
            findings.append(ok("cpus", f"{text}, {why}"))
    return findings


def judge_governors(slow: Sequence[int]) -> list[Finding]:
    """CPUs of the plan that a fixed low clock may hold back."""
    if not slow:
        return []
    return [warning("cpus", f"governor powersave on CPUs {format_cpus(slow)}: they may run at a low clock",
                    "cpupower frequency-set --governor performance")]  # fmt: skip
