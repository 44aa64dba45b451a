"""Asks which CPUs each device would get, and how they are clocked."""
from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from blendmaskd import discovery, topology
from blendmaskd.check.host import read
from blendmaskd.settings import Settings
from blendmaskd.topology import Cpus, HostError

DYNAMIC_DRIVERS = ("intel_pstate", "amd-pstate-epp")  # their powersave raises the clock as needed


def places(settings: Settings, environment: Mapping[str, str]) -> tuple[dict[str, Cpus], dict[str, Cpus], str]:
    """The plan, the CPUs near each device, and what stands in the way of a plan."""
    visible = []
    for device in settings.devices:
        with contextlib.suppress(HostError):  # `devices.device` tells of it
            if not device.startswith("cpu"):
                topology.visible_id(device, environment)
            visible.append(device)
    try:
        return *discovery.places(visible, settings.runtime.placed, environment), ""
    except HostError as error:
        return {}, {}, str(error)


def slow_governors(cpus: Iterable[int]) -> dict[int, str]:
    """CPUs whose governor may keep them at a low clock."""
    slow = {}
    for cpu in cpus:
        folder = discovery.SYSFS / f"devices/system/cpu/cpu{cpu}/cpufreq"
        governor, driver = read(folder / "scaling_governor").strip(), read(folder / "scaling_driver").strip()
        if governor == "powersave" and driver not in DYNAMIC_DRIVERS:
            slow[cpu] = governor
    return slow
