"""A systemd of our own (see sandbox.sh) with the service installed in it, as on a host.

The shipped unit is not changed, but for a drop-in (`DROP_IN`) that shortens two waits. To make that possible the
places that the unit names exist inside the sandbox: the repository and the interpreter that runs these tests are
mounted below /opt, an environment made from them stands for the one that pip would fill, and
scripts/install_service.sh does the rest.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("sandbox.sh")
INSTALL = "/opt/source/scripts/install_service.sh"
SETTINGS = "/etc/blendmaskd/daemon.yaml"
UNITS = "/etc/systemd/system"

# Why each: a watchdog of 45 s, and the 2 s before a restart, would be most of the time that these tests take.
DROP_IN = "[Service]\nWatchdogSec=3s\nRestartSec=100ms\n"

FIRST_SETTINGS = """\
devices: [npu:0, npu:1]
engine: timed
timed: {latency_ms: {1: 500}}
"""


T = TypeVar("T")


class Sandbox:
    """A running systemd; see sandbox.sh. Paths in arguments and commands are those inside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid = int((folder / "pid").read_text())

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside. A failure shows its output."""
        argv = [str(SCRIPT), "enter", str(self.folder), *command]
        # PYTHON*: of the interpreter inside, which is another one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BLEND"))}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment)
        assert not (check and done.returncode), f"{command}: {done.stdout}{done.stderr}"
        return done

    def path(self, inside: str) -> Path:
        """The path by which this process reaches a file inside."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def journal(self, *options: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", "--unit=blendmaskd", *options).stdout


class Service:
    """The installed service in its sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.endpoint = f"ipc://{sandbox.path('/run/blendmaskd/client.sock')}"

    def systemctl(self, verb: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.sandbox.run("systemctl", verb, "blendmaskd", check=check)

    def start(self, check: bool = True) -> subprocess.CompletedProcess[str]:
        self.systemctl("reset-failed", check=False)  # or many tests in little time meet the start limit
        return self.systemctl("start", check)

    def show(self, name: str) -> str:
        return self.sandbox.run("systemctl", "show", "--value", f"--property={name}", "blendmaskd").stdout.strip()

    def pids(self) -> list[int]:
        """The processes of the unit's cgroup, as this process numbers them."""
        cgroup = Path((self.sandbox.folder / "cgroup").read_text().strip())
        try:
            return [int(pid) for pid in (cgroup / "system.slice/blendmaskd.service/cgroup.procs").read_text().split()]
        except OSError:  # no cgroup: ENOENT, or ENODEV while it is taken down
            return []

    def workers(self) -> dict[str, int]:
        """``device.generation`` of the worker processes to their pids."""
        found = {}
        for pid in self.pids():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "blendmaskd_workers" in command:
                found[command[command.index("blendmaskd_workers") + 1]] = pid
        return found

    def main_pid(self) -> int:
        (pid,) = set(self.pids()) - set(self.workers().values())
        return pid

    def settings(self, text: str) -> None:
        self.sandbox.path(SETTINGS).write_text(text)


def wait_for(condition: Callable[[], T], deadline_s: float = 15.0) -> T:
    """What `condition` returns once it is true."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {deadline_s} s: {condition}"
        time.sleep(0.02)
    return value


def exposure_is_low(unit: Path) -> None:
    """By `systemd-analyze security`, at most 2.0."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    argv = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", str(unit)]
    rated = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert rated.returncode == 0, rated.stdout  # above the threshold, in tenths
