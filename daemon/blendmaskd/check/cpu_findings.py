"""Pure: whether each device gets CPUs of its own, near it and at full clock."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from blendmaskd.check.finding import Finding, error, ok, warning
from blendmaskd.topology import Cpus, format_cpus


def unplaced(complaint: str) -> list[Finding]:
    """`complaint`: what stands in the way of a plan; empty: nothing."""
    return [error("cpus", complaint, "runtime.cpus: auto, or CPUs of this list")] if complaint else []


def cpus(plan: Mapping[str, Cpus], near: Mapping[str, Cpus], placed: Iterable[str], hinted: bool) -> list[Finding]:
    """The CPU set of each device. `placed`: by the settings; `hinted`: the host's tool answers at all."""
    findings = []
    for name, own in plan.items():
        shared = sorted(other for other, theirs in plan.items() if other != name and set(theirs) & set(own))
        text = f"{name}: CPUs {format_cpus(own)}"
        by_place = set(near.get(name, ())) & set(own)
        if shared:
            findings.append(warning("cpus", f"{text}, shared with {', '.join(shared)}",
                                    "fewer devices, more CPUs, or runtime.cpus"))  # fmt: skip
        elif name.startswith("npu") and hinted and name not in placed and not by_place:
            findings.append(warning("cpus", f"{text}; which are near it is not known",
                                    "npu-smi info -t topo; then name them in runtime.cpus"))  # fmt: skip
        else:
            why = "by runtime.cpus" if name in placed else "near it" if by_place else "an even share"
            findings.append(ok("cpus", f"{text}, {why}"))
    return findings


def governor(slow: Mapping[int, str]) -> list[Finding]:
    """CPUs of the plan, by governor, that a fixed low clock may hold back."""
    if not slow:
        return []
    names = ", ".join(sorted(set(slow.values())))
    return [warning("cpus", f"governor {names} on CPUs {format_cpus(slow)}: they may run at a low clock",
                    "cpupower frequency-set --governor performance")]  # fmt: skip
