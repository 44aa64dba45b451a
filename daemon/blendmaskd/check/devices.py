"""Whether the devices are there, healthy and free, open as a worker needs them, and to whom."""
from __future__ import annotations

import contextlib
import grp
import os
import pwd
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from blendmaskd import ascend, discovery, topology
from blendmaskd.ascend import Card, Chip
from blendmaskd.check.endpoints import Holder
from blendmaskd.check.finding import Finding, error, ok, warning
from blendmaskd.check.host import is_ours, own_user
from blendmaskd.probe import Cause, Probe
from blendmaskd.settings import Settings
from blendmaskd.topology import VISIBLE_DEVICES, HostError

NODES = ("davinci_manager", "devmm_svm", "hisi_hdc")  # beside davinciN
SERVICE_USER = "blendmaskd"
GIB = 1 << 30
REMEDIES = {
    None: "docs/troubleshooting.md",
    Cause.NO_PACKAGE: "pip install 'blendmaskd[serve]'",
    Cause.NO_TORCH_NPU: "pip install the torch_npu that matches your CANN and torch: docs/deployment.md",
    Cause.NO_CANN: "source CANN's set_env.sh in this shell; see versions and permissions in this report",
    Cause.NOT_VISIBLE: "see permissions in this report; is the driver loaded?",
    Cause.PRECISION: "set model.precision to auto",
}  # of what a process complained of that tried to open a device


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One configured npu or cuda device, and cpu ones of engines that compute."""

    device: str
    hidden: str = ""  # why the daemon's environment does not show it
    tool: str = ""  # npu-smi, nvidia-smi; empty for a CPU
    cards: int | None = None  # how many the tool lists; None: it does not answer
    card: Card | None = None
    users: tuple[tuple[int, str], ...] = ()  # pid and name of processes on it, ours left out
    probe: Probe | None = None  # None: not tried
    untried: str = ""  # why not

    @property
    def chip(self) -> str:
        """By the device itself, or else by the tool; empty where neither tells."""
        return (self.probe and self.probe.name) or (self.card.name if self.card else "")


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A device node of the Ascend driver."""

    path: str
    there: bool
    usable: bool = False  # for reading and writing by this user
    group: str = ""
    member: bool = False  # this user is, or becomes at the next login
    service_may: bool | None = None  # whether the service's user is in the group; None: there is no such user


class Npus:
    """What npu-smi tells of this host's cards."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        text = discovery.ask_tool(["npu-smi", "info"], environment)
        self.answers = bool(text)
        self.cards = ascend.parse_npu_cards(text)
        self._users = ascend.parse_npu_processes(text)
        listed = topology.parse_npu_map(discovery.ask_tool(["npu-smi", "info", "-m"], environment))
        self.chips = ascend.chips_by_logic_id(listed, self.cards)  # by what `visible_id` tells

    def users(self, chip: Chip) -> tuple[tuple[int, str], ...]:
        """Processes on a card, without those of a daemon of ours."""
        return tuple((pid, name) for pid, name in self._users.get(chip, ()) if not is_ours(pid))


def ask(
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
    except HostError as problem:
        return DeviceFacts(device=device, hidden=str(problem))
    if kind == "npu" and npus is not None:
        chip = npus.chips.get(host_id)
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


def ask_nodes(npus: Iterable[str], environment: Mapping[str, str]) -> list[NodeFacts]:
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
    _, groups = own_user()
    service = service_groups()
    return NodeFacts(
        path=str(path),
        there=True,
        usable=os.access(path, os.R_OK | os.W_OK),
        group=group,
        member=group_id in groups,
        service_may=None if service is None else group_id in service,
    )


def service_groups() -> set[int] | None:
    """The groups of the service's user, where that exists."""
    try:
        user = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return None
    return set(os.getgrouplist(SERVICE_USER, user.pw_gid))


def judge(facts: DeviceFacts, precision: str, exact: bool = False) -> list[Finding]:
    """Whether it is there, healthy, free, and opens with this precision; `exact` is told beside it."""
    name = facts.device
    if facts.hidden:
        variable = VISIBLE_DEVICES[name.partition(":")[0]]
        return [error("device", facts.hidden, f"change {variable} or the setting devices")]
    if facts.probe and facts.probe.error:
        return [*_card(facts), error("device", f"{name}: {facts.probe.error}", REMEDIES[facts.probe.cause])]
    return [*_card(facts), *_users(facts), *_opened(facts, precision, exact)]


def judge_plans(warnings: Iterable[str]) -> list[Finding]:
    """What a launch plan says of settings that will not do what they seem to say."""
    return [warning("device", text, "docs/settings.md, runtime") for text in warnings]


def _card(facts: DeviceFacts) -> list[Finding]:
    name = facts.device
    if not facts.tool:
        return []
    if facts.cards is None:
        return [warning("device", f"{name}: {facts.tool} does not answer: health and other users are unknown",
                        f"is the driver installed, and {facts.tool} on PATH? It may need root")]  # fmt: skip
    if facts.card is None:
        return [error("device", f"{name}: {facts.tool} lists {facts.cards} devices, not this one",
                      "change devices, or look for the card with lspci")]  # fmt: skip
    if facts.card.health in ("OK", ""):
        return []
    text = f"{name}: {facts.card.name}, health {facts.card.health}"
    if facts.card.health == "Warning":
        return [warning("device", text, "run npu-smi info -t health; dmesg has the driver's log")]
    return [error("device", text, "run npu-smi info -t health; the card may need a reset or a reboot")]


def _users(facts: DeviceFacts) -> list[Finding]:
    if not facts.users:
        return []
    who = ", ".join(f"pid {pid} ({name})" for pid, name in facts.users)
    return [warning("device", f"{facts.device}: in use by {who}", "stop it, or share the device's memory and time")]


def _opened(facts: DeviceFacts, precision: str, exact: bool) -> list[Finding]:
    probe, name = facts.probe, facts.device
    if probe is None:
        return [ok("device", f"{name}: not opened, {facts.untried}")]
    findings = [
        warning("device", f"{name}: {difference}", "docs/troubleshooting.md") for difference in probe.differences
    ]
    if precision == "bf16" and probe.bf16 is False:
        findings.append(error("device", f"{name}: {probe.name} does not compute in bfloat16",
                              "set model.precision to fp16 or fp32"))  # fmt: skip
    if not findings:
        health = f", health {facts.card.health}" if facts.card and facts.card.health else ""
        arithmetic = f"{precision}, exact" if exact else precision + (f" ({probe.chosen})" if probe.chosen else "")
        findings = [ok("device", f"{name}: {probe.name}, {probe.memory_bytes / GIB:.0f} GiB{health}, {arithmetic}")]
    return findings


def judge_nodes(facts: Sequence[NodeFacts], opened: bool, user: str) -> list[Finding]:
    """Whether this user, and the service's, may use the driver's device nodes. `opened`: every device was opened."""
    if opened:
        return _shut_out(facts)
    missing = [node.path for node in facts if not node.there]
    findings = [_shut(node, user) for node in facts if node.there and not node.usable]
    if missing:
        findings.append(error("permissions", f"missing: {', '.join(missing)}",
                              "install or load the driver; in a container: --device"))  # fmt: skip
    return findings


def _shut_out(facts: Sequence[NodeFacts]) -> list[Finding]:
    """This user may use the nodes: may the service's?"""
    groups = sorted({node.group for node in facts if node.there and node.service_may is False})
    findings = []
    for group in groups:
        text = f"the service's user blendmaskd is not in the group {group} of the device nodes"
        findings.append(error("permissions", text, f"usermod --append --groups {group} blendmaskd"))
    if not findings and any(node.there for node in facts):
        findings = [ok("permissions", "device nodes")]
    return findings


def _shut(node: NodeFacts, user: str) -> Finding:
    remedy = f"usermod --append --groups {node.group} {user}, then log in again"
    if user.isdigit():
        remedy = f"start it with the group {node.group}: supplementalGroups of a pod, --group-add of docker"
    if node.member:
        remedy = f"{user} joined the group {node.group} after this login: log in again"
    return error("permissions", f"{node.path}: {user} may not use it (group {node.group})", remedy)


def judge_identity(is_root: bool, has_service: bool) -> list[Finding]:
    """What root may do says little of what the service's user may."""
    if not is_root or not has_service:
        return []
    return [warning("permissions", "the check runs as root, the service as blendmaskd",
                    "runuser -u blendmaskd -- blendmaskd check …")]  # fmt: skip
