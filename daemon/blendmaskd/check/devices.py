"""Asks the tools, the environment and /dev for the devices, and who may use them."""
from __future__ import annotations

import contextlib
import grp
import os
import pwd
from collections.abc import Iterable, Mapping
from pathlib import Path

from blendmaskd import ascend, discovery, topology
from blendmaskd.ascend import Card, Chip
from blendmaskd.check.device_findings import DeviceFacts, NodeFacts, Probe
from blendmaskd.check.endpoint_findings import Holder
from blendmaskd.check.host import is_ours
from blendmaskd.settings import Settings
from blendmaskd.topology import HostError

NODES = ("davinci_manager", "devmm_svm", "hisi_hdc")  # beside davinciN
SERVICE_USER = "blendmaskd"


class Npus:
    """What npu-smi tells of this host's cards."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        text = discovery.ask_tool(["npu-smi", "info"], environment)
        self.answers = bool(text)
        self.cards = ascend.parse_npu_cards(text)
        self._users = ascend.parse_npu_processes(text)
        self._chips = topology.parse_npu_map(discovery.ask_tool(["npu-smi", "info", "-m"], environment))

    def chip(self, host_id: str) -> Chip | None:
        """By logic id; cards in their order where npu-smi has no map."""
        chips = self._chips or dict(enumerate(sorted(self.cards)))
        return chips.get(int(host_id)) if host_id.isdigit() else None

    def users(self, chip: Chip) -> tuple[tuple[int, str], ...]:
        """Processes on a card, without those of a daemon of ours."""
        return tuple((pid, name) for pid, name in self._users.get(chip, ()) if not is_ours(pid))


def device(
    device: str,
    settings: Settings,
    npus: Npus | None,
    environment: Mapping[str, str],
    probe: Probe | None,
    serving: Holder | None,
) -> DeviceFacts:
    untried = f"it is in use by {serving}" if serving else f"the engine {settings.engine} does not use it"
    kind = device.partition(":")[0]
    if kind == "cpu" or settings.engine == "timed":
        return DeviceFacts(device=device, probe=probe, untried=untried)
    try:
        host_id = topology.visible_id(device, environment)
    except HostError as error:
        return DeviceFacts(device=device, hidden=str(error))
    if kind == "npu" and npus is not None:
        chip = npus.chip(host_id)
        return DeviceFacts(
            device=device, tool="npu-smi", cards=len(npus.cards) if npus.answers else None,
            card=npus.cards.get(chip) if chip else None, users=npus.users(chip) if chip else (),
            probe=probe, untried=untried,
        )  # fmt: skip
    gpus = _gpus(environment)
    return DeviceFacts(
        device=device, tool="nvidia-smi", cards=len(gpus) // 2 or None,
        card=Card(gpus[host_id], "") if host_id in gpus else None, probe=probe, untried=untried,
    )  # fmt: skip


def _gpus(environment: Mapping[str, str]) -> dict[str, str]:
    """Names by index and by UUID."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    lines = discovery.ask_tool(query, environment).splitlines()
    rows = [[cell.strip() for cell in line.split(",", 2)] for line in lines]
    return {key: row[2] for row in rows if len(row) == 3 for key in row[:2]}


def nodes(npus: Iterable[str], environment: Mapping[str, str]) -> list[NodeFacts]:
    names = list(NODES)
    for device in npus:
        with contextlib.suppress(HostError):
            names.append(f"davinci{topology.visible_id(device, environment)}")
    return [_node(Path("/dev") / name) for name in names]


def _node(path: Path) -> NodeFacts:
    try:
        group_id = path.stat().st_gid
    except OSError:
        return NodeFacts(path=str(path), there=False)
    try:
        group = grp.getgrgid(group_id).gr_name
    except KeyError:
        group = str(group_id)
    user = pwd.getpwuid(os.geteuid())
    service = service_groups()
    return NodeFacts(
        path=str(path),
        there=True,
        usable=os.access(path, os.R_OK | os.W_OK),
        group=group,
        member=group_id in os.getgrouplist(user.pw_name, user.pw_gid),
        service_may=None if service is None else group_id in service,
    )


def service_groups() -> set[int] | None:
    """The groups of the service's user, where that exists."""
    try:
        user = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return None
    return set(os.getgrouplist(SERVICE_USER, user.pw_gid))
