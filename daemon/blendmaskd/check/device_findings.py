"""Pure: whether the devices are there, healthy and free, open as a worker needs them, and to whom."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from blendmaskd.ascend import Card
from blendmaskd.check.finding import Finding, error, ok, warning
from blendmaskd.topology import VISIBLE_DEVICES

GIB = 1 << 30


class Probe(msgspec.Struct, frozen=True):
    """What a process said that opened the device as a worker does; `error` is empty when it could."""

    error: str = ""
    name: str = ""  # Ascend910B3
    memory_bytes: int = 0  # all there is
    bf16: bool | None = None  # whether it computes in bfloat16; None: it does not tell
    differences: tuple[str, ...] = ()  # from what its launch plan wanted


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


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A device node of the Ascend driver."""

    path: str
    there: bool
    usable: bool = False  # for reading and writing by this user
    group: str = ""
    member: bool = False  # this user is, or becomes at the next login
    service_may: bool | None = None  # whether the service's user is in the group; None: there is no such user


def device(facts: DeviceFacts, precision: str, exact: bool = False) -> list[Finding]:
    """Whether it is there, healthy, free, and opens with this precision; `exact` is told beside it."""
    name = facts.device
    if facts.hidden:
        variable = VISIBLE_DEVICES[name.partition(":")[0]]
        return [error("device", facts.hidden, f"change {variable} or the setting devices")]
    if facts.probe and facts.probe.error:
        return [*_card(facts), error("device", f"{name}: {facts.probe.error}", _probe_remedy(facts))]
    return [*_card(facts), *_users(facts), *(_opened(facts, precision, exact) if facts.probe else _unopened(facts))]


def plan(warnings: Iterable[str]) -> list[Finding]:
    """What a launch plan says of settings that will not do what they seem to say."""
    return [warning("device", text, "docs/settings.md, runtime") for text in warnings]


def _card(facts: DeviceFacts) -> list[Finding]:
    name = facts.device
    if not facts.tool:
        return []
    if facts.cards is None:
        return [warning("device", f"{name}: {facts.tool} does not answer: health and other users are not known",
                        f"is the driver installed, and {facts.tool} on PATH? It may need root")]  # fmt: skip
    if facts.card is None:
        return [error("device", f"{name}: {facts.tool} lists {facts.cards} devices, not this one",
                      "name others in devices, or look for the card with lspci")]  # fmt: skip
    if facts.card.health in ("OK", ""):
        return []
    text = f"{name}: {facts.card.name}, health {facts.card.health}"
    if facts.card.health == "Warning":
        return [warning("device", text, "npu-smi info -t health; the driver's log is dmesg")]
    return [error("device", text, "npu-smi info -t health; a card in this state may need a reset or a reboot")]


def _users(facts: DeviceFacts) -> list[Finding]:
    if not facts.users:
        return []
    who = ", ".join(f"pid {pid} ({name})" for pid, name in facts.users)
    return [warning("device", f"{facts.device}: in use by {who}", "stop it, or share the device's memory and time")]


def _opened(facts: DeviceFacts, precision: str, exact: bool) -> list[Finding]:
    assert facts.probe is not None
    probe, name = facts.probe, facts.device
    findings = [
        warning("device", f"{name}: {difference}", "docs/troubleshooting.md") for difference in probe.differences
    ]
    if precision == "bf16" and probe.bf16 is False:
        findings.append(error("device", f"{name}: {probe.name} does not compute in bfloat16",
                              "model.precision: fp16, or fp32"))  # fmt: skip
    if not findings:
        health = f", health {facts.card.health}" if facts.card and facts.card.health else ""
        arithmetic = f"{precision}, exact" if exact else precision
        findings = [ok("device", f"{name}: {probe.name}, {probe.memory_bytes / GIB:.0f} GiB{health}, {arithmetic}")]
    return findings


def _unopened(facts: DeviceFacts) -> list[Finding]:
    return [ok("device", f"{facts.device}: not opened, {facts.untried}")]


def _probe_remedy(facts: DeviceFacts) -> str:
    assert facts.probe is not None
    complaint = facts.probe.error
    if "set_env.sh" in complaint:
        return "source CANN's set_env.sh in this shell; see the lines of versions and permissions"
    if "is not installed" in complaint:
        return "pip install the torch_npu that belongs to your CANN and torch: docs/deployment.md"
    if "are visible" in complaint:
        return "see the lines of permissions; is the driver loaded?"
    if "precision" in complaint or "float16" in complaint:
        return "model.precision: auto, or fp32"
    return "docs/troubleshooting.md"


def nodes(facts: Sequence[NodeFacts], opened: bool, user: str) -> list[Finding]:
    """Whether this user, and the service's, may use the driver's device nodes. `opened`: every device was opened."""
    if opened:
        return _shut_out(facts)
    missing = [node.path for node in facts if not node.there]
    findings = [_shut(node, user) for node in facts if node.there and not node.usable]
    if missing:
        findings.append(error("permissions", f"not there: {', '.join(missing)}",
                              "install the driver, or load it; in a container: --device"))  # fmt: skip
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
    if node.member:
        remedy = f"{user} is in the group {node.group} since this login began: log in again"
    return error("permissions", f"{node.path}: {user} may not use it (group {node.group})", remedy)


def identity(user: str, is_root: bool, has_service: bool) -> list[Finding]:
    """What root may do says little of what the service's user may."""
    if not is_root or not has_service:
        return []
    return [warning("permissions", "run as root: the service runs as blendmaskd",
                    "runuser -u blendmaskd -- blendmaskd check …")]  # fmt: skip
