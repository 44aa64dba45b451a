"""scripts/install_service.sh, run for real inside the sandbox; all but pip, whose place an environment takes."""
from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox import INSTALL, REPOSITORY, SETTINGS, UNITS, Sandbox, Service
from sandbox import SCRIPT as SANDBOX_SCRIPT

from blendmaskd import settings

pytestmark = [pytest.mark.slow, pytest.mark.systemd]

SCRIPT = REPOSITORY / "scripts/install_service.sh"
WITHOUT_PIP = ("--environment", "/opt/environment")


@pytest.fixture
def kept(installed: Service) -> Iterator[Sandbox]:
    """The sandbox with the service installed, whose settings and drop-ins are put back after the test."""
    sandbox = installed.sandbox
    before = sandbox.path(SETTINGS).read_text()
    yield sandbox
    sandbox.path(SETTINGS).write_text(before)
    sandbox.path("/etc/blendmaskd/ascend.env").unlink(missing_ok=True)
    sandbox.run(INSTALL, *WITHOUT_PIP)


@pytest.mark.parametrize("script", [SCRIPT, SANDBOX_SCRIPT], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == ""


def test_help_names_every_option() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, timeout=10, check=True)
    accepted = set(re.findall(r"--[a-z-]+(?=[ |)][^\n]*\)|\))", _function("parse")))
    assert {"--devices", "--now", "--cann"} <= accepted
    assert accepted <= set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--wieghts", "x"), "--wieghts: unknown option"),
        (("--weights",), "--weights needs a value"),
        (("--weights", "/nowhere.pth"), "/nowhere.pth: no such file"),
        ((*WITHOUT_PIP, "--extras", "npu"), "leave out"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_done(
    sandbox: Sandbox, arguments: tuple[str, ...], complaint: str
) -> None:
    before = sandbox.path("/opt/blendmaskd").exists()
    done = sandbox.run(INSTALL, *arguments, check=False)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert sandbox.path("/opt/blendmaskd").exists() == before


def test_it_wants_root(sandbox: Sandbox) -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash")
    done = sandbox.run(*nobody, INSTALL, *WITHOUT_PIP, check=False)
    assert done.returncode == 1
    assert "run as root" in done.stderr


def test_an_interpreter_that_the_service_cannot_read_is_refused(installed: Service) -> None:
    sandbox = installed.sandbox
    base = sandbox.run("/opt/environment/bin/python", "-c", "import sys; print(sys.base_prefix)").stdout.strip()
    sandbox.run("mkdir", "-p", "/tmp/python")
    sandbox.run("mount", "--bind", base, "/tmp/python")
    try:
        done = sandbox.run("env", "PYTHON=/tmp/python/bin/python3", INSTALL, check=False)
    finally:
        sandbox.run("umount", "/tmp/python")
    assert done.returncode == 1
    assert "/tmp/python, which the service cannot read" in done.stderr


def test_new_settings_name_devices_and_weights(kept: Sandbox) -> None:
    kept.path(SETTINGS).unlink()
    kept.path("/opt/given").mkdir(exist_ok=True)
    kept.path("/opt/given/model_final.pth").write_bytes(b"weights")
    kept.path("/opt/given/categories.json").write_text("[]")
    kept.run(INSTALL, *WITHOUT_PIP, "--devices", "cuda:0,cuda:1", "--weights", "/opt/given/model_final.pth")
    loaded = settings.load(kept.path(SETTINGS))
    assert loaded.devices == ["cuda:0", "cuda:1"]
    assert loaded.model.weights == "weights/model_final.pth"
    folder = kept.path("/opt/blendmaskd")
    assert (folder / loaded.model.weights).read_bytes() == b"weights"
    assert (folder / "weights/categories.json").exists()
    assert (folder / loaded.model.config).exists()
    assert kept.path(f"{UNITS}/blendmaskd.service.d/cuda.conf").exists()


def test_a_second_run_keeps_settings_and_replaces_the_rest(kept: Sandbox) -> None:
    unit, mine = kept.path(f"{UNITS}/blendmaskd.service"), kept.path(f"{UNITS}/blendmaskd.service.d/test.conf")
    unit.write_text("[Service]\n")
    text = kept.path(SETTINGS).read_text() + "# mine\n"
    kept.path(SETTINGS).write_text(text)
    done = kept.run(INSTALL, *WITHOUT_PIP, "--devices", "cpu:7")
    assert unit.read_text() == (REPOSITORY / "configs/blendmaskd.service").read_text()
    assert mine.exists()
    assert kept.path(SETTINGS).read_text() == text
    assert "has devices: cpu:0 cpu:1, not cpu:7" in done.stderr
    assert not kept.path(f"{UNITS}/blendmaskd.service.d/cuda.conf").exists()


def test_an_upgrade_takes_the_environment_that_was_named_before(kept: Sandbox) -> None:
    done = kept.run(INSTALL)
    assert "environment=/opt/environment" in done.stderr
    assert str(kept.path("/opt/blendmaskd/venv").readlink()) == "/opt/environment"
    assert "Collecting" not in done.stdout + done.stderr


def test_a_virtual_environment_s_packages_cannot_be_seen_by_another(installed: Service) -> None:
    command = ("env", "PYTHON=/opt/environment/bin/python", INSTALL, "--system-site-packages")
    done = installed.sandbox.run(*command, check=False)
    assert done.returncode == 1
    assert "take --environment" in done.stderr


def test_settings_that_do_not_hold_stop_an_upgrade(kept: Sandbox) -> None:
    kept.path(SETTINGS).write_text("devises: [cpu:0]\n")
    done = kept.run(INSTALL, *WITHOUT_PIP, check=False)
    assert done.returncode == 1
    assert "devises: unknown key" in done.stderr


def test_workers_have_ascends_group_and_environment(kept: Sandbox, service: Service) -> None:
    """CANN's set_env.sh, as the toolkit writes it, and what the unit makes of it."""
    kept.path("/opt/set_env.sh").write_text(
        "export ASCEND_TOOLKIT_HOME=/usr/local/Ascend/ascend-toolkit/latest\n"
        "export LD_LIBRARY_PATH=${ASCEND_TOOLKIT_HOME}/lib64:$LD_LIBRARY_PATH\n"
        "export PATH=${ASCEND_TOOLKIT_HOME}/bin:$PATH\n"
        """export ASCEND_ODD='a "b" $c `d` \\e'\n"""
        "helper() { :; }; export -f helper\n"
    )
    kept.run("groupadd", "--force", "--gid", "61000", "HwHiAiUser")
    kept.run(INSTALL, *WITHOUT_PIP, "--cann", "/opt/set_env.sh", "--now")
    assert service.show("UnitFileState") == "enabled"
    for pid in service.workers().values():
        environment = dict(
            entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if entry
        )
        assert environment["LD_LIBRARY_PATH"] == "/usr/local/Ascend/ascend-toolkit/latest/lib64"
        assert environment["PATH"].startswith("/usr/local/Ascend/ascend-toolkit/latest/bin:/usr/local/sbin:")
        assert environment["ASCEND_ODD"] == 'a "b" $c `d` \\e'
        assert environment["HOME"] == "/var/lib/blendmaskd"
        groups = re.search(r"^Groups:(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert groups
        assert "61000" in groups[1].split()


def _function(name: str) -> str:
    match = re.search(rf"^{name}\(\) {{$(.*?)^}}$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert match
    return match[1]
