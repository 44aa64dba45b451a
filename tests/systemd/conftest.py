"""Fixtures: the sandbox, and the service installed in it. What is missing for them is named in the skip."""
from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox import DROP_IN, FIRST_SETTINGS, INSTALL, REPOSITORY, SCRIPT, UNITS, Sandbox, Service, wait_for

SYSTEMD = "/usr/lib/systemd/systemd"
PROGRAMS = ("unshare", "nsenter", "setpriv", "runuser", "useradd", "systemctl", "systemd-analyze", "journalctl")
NAMESPACES = ("--mount", "--pid", "--fork", "--uts", "--ipc", "--net", "--cgroup")
HIDDEN = ("/root", "/home", "/run", "/tmp", "/var")  # from the service, or because the sandbox has its own


@functools.cache
def missing() -> str:
    """What this machine lacks for the sandbox; empty: nothing."""
    if os.geteuid() != 0:
        return "root"
    programs = [program for program in (SYSTEMD, *PROGRAMS) if not shutil.which(program)]
    if programs:
        return " and ".join(programs)
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    if not any(kind == "cgroup2" and os.access(where, os.W_OK) for _, where, kind, *_ in mounts):
        return "a writable cgroup2 mount"
    mount = ["unshare", *NAMESPACES, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if subprocess.run(mount, capture_output=True).returncode:
        return "the right to make namespaces and to mount (CAP_SYS_ADMIN)"
    return ""


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A systemd that is up, with an environment to install from: see `sandbox`."""
    if missing():
        pytest.skip(f"needs {missing()}")
    folder = tmp_path_factory.mktemp("systemd")
    mounts = [f"{REPOSITORY}:/opt/source", f"{sysconfig.get_path('purelib')}:/opt/site"]
    python = Path(sys.base_prefix)
    if any(python.is_relative_to(hidden) for hidden in HIDDEN):
        mounts.append(f"{python}:/opt/python")
        python = Path("/opt/python")
    with (folder / "console.log").open("w") as console:
        booted = subprocess.Popen([SCRIPT, "boot", folder, *mounts], stdout=console, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: (folder / "pid").exists() or booted.poll() is not None)
        assert booted.poll() is None, (folder / "console.log").read_text()
        sandbox = Sandbox(folder)
        wait_for(lambda: sandbox.run("systemctl", "is-system-running", check=False).stdout.strip() == "running")
        make_environment(sandbox, python)
        yield sandbox
    finally:
        subprocess.run([SCRIPT, "remove", folder], check=True, timeout=30)
        booted.wait(timeout=10)


def make_environment(sandbox: Sandbox, python: Path) -> None:
    """What `pip install` would have made: an environment with the package and its requirements."""
    if python == Path("/opt/python"):  # its libpython, if any, is not where its programs look
        sandbox.path("/etc/ld.so.conf.d/00-python.conf").write_text(f"{python}/lib\n")
        sandbox.run("ldconfig")
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    sandbox.run(f"{python}/bin/{version}", "-m", "venv", "--without-pip", "/opt/environment")
    here = sandbox.path(f"/opt/environment/lib/{version}/site-packages/here.pth")
    here.write_text("/opt/source/daemon\n/opt/source/workers\nimport site; site.addsitedir('/opt/site')\n")


@pytest.fixture(scope="session")
def installed(sandbox: Sandbox) -> Service:
    """The service as scripts/install_service.sh leaves it, and the drop-in of these tests."""
    sandbox.path("/opt/first.yaml").write_text(FIRST_SETTINGS)
    arguments = ("--settings", "/opt/first.yaml", "--devices", "cpu:0,cpu:1")
    sandbox.run(INSTALL, "--environment", "/opt/environment", *arguments)
    sandbox.path(f"{UNITS}/blendmaskd.service.d/test.conf").write_text(DROP_IN)
    sandbox.run("systemctl", "daemon-reload")
    return Service(sandbox)


@pytest.fixture
def service(installed: Service) -> Service:
    """The service, running."""
    installed.start()
    return installed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """With a failure, show the journal of the unit."""
    report = yield
    service = getattr(item, "funcargs", {}).get("installed")
    if report.failed and isinstance(service, Service):
        report.sections.append(("journal of the unit", service.sandbox.journal("--lines=60")))
    return report
