"""Asks what is installed: the versions of Python's packages and of Ascend's, and the allocator."""
from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

from blendmaskd import ascend
from blendmaskd.check.host import read
from blendmaskd.check.software_findings import VersionFacts
from blendmaskd.core.launch_plan import Preload
from blendmaskd.settings import Settings
from blendmaskd.shell import launch
from blendmaskd.topology import HostError

ASCEND = Path("/usr/local/Ascend")
CANN_FOLDERS = ("ascend-toolkit", "cann", "nnae", "nnrt")  # below ASCEND, in the order of install_service.sh


def versions(environment: Mapping[str, str]) -> VersionFacts:
    home = environment.get("ASCEND_HOME_PATH", "")
    scripts = [ASCEND / folder / "set_env.sh" for folder in CANN_FOLDERS]
    driver = read(ASCEND / "driver/version.info")
    return VersionFacts(
        python=platform.python_version(),
        torch=_installed("torch"),
        torch_npu=_installed("torch_npu"),
        machine=platform.machine(),
        cann=_cann_version(Path(home)) if home else "",
        cann_home=home,
        set_env=next((str(script) for script in scripts if script.exists()), ""),
        driver=ascend.parse_version(driver),
        firmware=ascend.parse_version(read(ASCEND / "firmware/version.info")),
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


def preload(settings: Settings) -> tuple[Preload | None, str]:
    """The allocator that the settings mean, or why it cannot be had."""
    try:
        return launch.resolve_preload(settings.runtime.preload), ""
    except HostError as error:
        return None, str(error)
