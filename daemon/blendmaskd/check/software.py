"""Whether the versions that are installed belong together, and which allocator workers get."""
from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from blendmaskd import ascend
from blendmaskd.check.finding import Finding, error, ok, warning
from blendmaskd.core.launch_plan import TCMALLOC_PACKAGES, Preload
from blendmaskd.discovery import read
from blendmaskd.settings import Settings
from blendmaskd.shell import launch
from blendmaskd.topology import HostError

KERNELS = "opp/built-in/op_impl/ai_core/tbe/kernel"  # below ASCEND_HOME_PATH
CANN_FOLDERS = ("ascend-toolkit", "cann", "nnae", "nnrt")  # below ascend.INSTALLED, in the order of install_service.sh
_PAIR = "see docs/deployment.md for matching versions; the newest are at github.com/Ascend/pytorch, COMPATIBILITY.md"


class VersionFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Versions as installed; empty where not there or not told."""

    python: str
    torch: str = ""
    torch_npu: str = ""
    machine: str = "x86_64"
    cann: str = ""
    cann_home: str = ""  # ASCEND_HOME_PATH
    kernels: list[str] = []  # chips whose compiled operators CANN has, as its folders are named
    set_env: str = ""  # a set_env.sh that was found, for the remedy
    driver: str = ""
    firmware: str = ""
    firmware_ranges: list[tuple[str, str]] = []  # that the driver works with


def ask_versions(environment: Mapping[str, str]) -> VersionFacts:
    home = environment.get("ASCEND_HOME_PATH", "")
    scripts = [ascend.INSTALLED / folder / "set_env.sh" for folder in CANN_FOLDERS]
    driver = read(ascend.INSTALLED / "driver/version.info")
    return VersionFacts(
        python=platform.python_version(),
        torch=_installed("torch"),
        torch_npu=_installed("torch_npu"),
        machine=platform.machine(),
        cann=_cann_version(Path(home)) if home else "",
        cann_home=home,
        kernels=sorted(folder.name for folder in (Path(home) / KERNELS).glob("ascend*")) if home else [],
        set_env=next((str(script) for script in scripts if script.exists()), ""),
        driver=ascend.parse_version(driver),
        firmware=ascend.parse_version(read(ascend.INSTALLED / "firmware/version.info")),
        firmware_ranges=ascend.parse_firmware_ranges(driver),
    )


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cann_version(home: Path) -> str:
    """As torch_npu looks for it: a file ascend_*_install.info in the folder of CANN or the one of its machine."""
    folders = (home, home / f"{platform.machine()}-linux")
    files = [file for folder in folders for file in sorted(folder.glob("ascend_*_install.info"))]
    return next((version for file in files if (version := ascend.parse_version(read(file)))), "")


def ask_preload(settings: Settings) -> tuple[Preload | None, str]:
    """The allocator that the settings mean, or why it cannot be had."""
    try:
        return launch.resolve_preload(settings.runtime.preload), ""
    except HostError as problem:
        return None, str(problem)


def judge_versions(facts: VersionFacts, npu: bool) -> list[Finding]:
    """Whether torch, torch_npu, CANN, driver and firmware belong together; the last four only for NPUs."""
    if not facts.torch:
        return [error("versions", "torch is not installed for this Python", "pip install 'blendmaskd[serve]'")]
    found = [f"Python {facts.python}", f"torch {facts.torch}"]
    if not npu:
        return [ok("versions", ", ".join(found))]
    findings = [*_torch_npu(facts), *_cann(facts), *_firmware(facts)]
    named = {"torch_npu": facts.torch_npu, "CANN": facts.cann, "driver": facts.driver, "firmware": facts.firmware}
    found += [f"{name} {version or 'unknown'}" for name, version in named.items()]
    if ascend.cann_for(facts.torch_npu) is None:
        found.append(f"whether torch_npu {facts.torch_npu} works with this CANN is not known here")
    return findings or [ok("versions", ", ".join(found))]


def _torch_npu(facts: VersionFacts) -> list[Finding]:
    if not facts.torch_npu:
        return [warning("versions", "torch_npu is not installed for this Python", _PAIR)]
    ours, theirs = (version.partition("+")[0].split(".")[:2] for version in (facts.torch, facts.torch_npu))
    if ours != theirs:
        wanted = ".".join(facts.torch_npu.split(".")[:3])
        return [error("versions", f"torch_npu {facts.torch_npu} needs torch {wanted}, this is {facts.torch}",
                      f"pip install torch=={wanted}, or the torch_npu for {facts.torch}")]  # fmt: skip
    if facts.machine == "x86_64" and "+cu" in facts.torch:
        return [error("versions", f"torch {facts.torch} is the CUDA build: on x86 torch_npu needs the CPU build",
                      "pip install torch from PyTorch's index for CPUs")]  # fmt: skip
    return []


def _cann(facts: VersionFacts) -> list[Finding]:
    if not facts.cann_home:
        script = facts.set_env or "/usr/local/Ascend/ascend-toolkit/set_env.sh"
        what = "CANN is installed, but not in this environment" if facts.set_env else "no CANN was found"
        remedy = f"source {script}" if facts.set_env else "install CANN, then source its set_env.sh"
        return [warning("versions", f"ASCEND_HOME_PATH is not set: {what}", remedy)]
    if not facts.cann:
        return [warning("versions", f"{facts.cann_home} does not contain the version of CANN",
                        "look for ascend_toolkit_install.info there")]  # fmt: skip
    known = ascend.cann_for(facts.torch_npu)
    if known is None or ascend.within(facts.cann, [known]):
        return []
    age = "older" if ascend.order(facts.cann) < ascend.order(known[0]) else "newer"
    told = known[0] if known[0] == known[1] else f"{known[0]} to {known[1]}"
    text = f"torch_npu {facts.torch_npu} is known to work with CANN {told}; {facts.cann} is {age}"
    return [warning("versions", text, _PAIR)]


def judge_kernels(facts: VersionFacts, chips: Iterable[str]) -> list[Finding]:
    """Whether CANN's second package, the operators of each chip, is there; nothing of chips that are not known."""
    if not facts.cann_home:
        return []
    wanted = {chip: ascend.kernels_of(chip) for chip in chips}
    missing = [chip for chip, folder in wanted.items() if folder and folder not in facts.kernels]
    if not missing:
        return []
    there = f"only those of {', '.join(facts.kernels)}" if facts.kernels else "none"
    text = f"CANN has no operators for {', '.join(missing)}, {there} in {facts.cann_home}/{KERNELS}"
    remedy = "install the chip's ops package (kernels) of the same version as the toolkit: docs/deployment.md"
    return [warning("versions", text, remedy)]


def _firmware(facts: VersionFacts) -> list[Finding]:
    ranges = facts.firmware_ranges
    if not facts.firmware or not ranges or ascend.within(facts.firmware, ranges):
        return []
    told = ", ".join(f"{low} to {high}" for low, high in ranges)
    return [warning("versions", f"driver {facts.driver} works with firmware {told}; this is {facts.firmware}",
                    "install the firmware of the driver's package")]  # fmt: skip


def judge_allocator(choice: str, preload: Preload | None, complaint: str, apt: bool, dnf: bool) -> list[Finding]:
    """Whether workers get tcmalloc. `complaint`: why a required or named library cannot be had."""
    install = _install_tcmalloc(apt, dnf)
    if preload is None:
        return [error("allocator", complaint, install)]
    if preload.path:
        return [ok("allocator", preload.path)]
    if choice == "off" or "LD_PRELOAD" in preload.reason:  # another allocator, or by somebody else's choice
        return [ok("allocator", preload.reason)]
    return [warning("allocator", "tcmalloc is not installed: workers use libc's malloc", install)]


def _install_tcmalloc(apt: bool, dnf: bool) -> str:
    if apt:
        return "apt-get install libtcmalloc-minimal4"
    return "dnf install gperftools-libs" if dnf else TCMALLOC_PACKAGES
