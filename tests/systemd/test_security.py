"""The unit's hardening leaves what the daemon needs: keys, TCP, a durable spool, caches, drop-ins; and nothing else."""
from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest
from sandbox import FIRST_SETTINGS, REPOSITORY, UNITS, Service, wait_for

from blendmaskd.client.blocking import Client

pytestmark = [pytest.mark.slow, pytest.mark.systemd]

UNIT = REPOSITORY / "configs/blendmaskd.service"
CUDA = REPOSITORY / "configs/blendmaskd-cuda.conf"
PYTHON = "/opt/environment/bin/python"
STATS = "import sys; from blendmaskd.commands import stats; sys.exit(stats())"
KEYS, TCP = "/etc/blendmaskd/keys", "tcp://127.0.0.1:9465"
PLAIN = FIRST_SETTINGS.replace("npu", "cpu").replace("500", "5")
SETTINGS = f"""{PLAIN}
spool: /var/lib/blendmaskd/spool.sqlite
endpoints: {{clients: [ipc:///run/blendmaskd/client.sock, "{TCP}"]}}
curve: {{server_key: {KEYS}/server.key_secret, client_keys: {KEYS}/clients}}
"""
FLAGS = ("--server-key", f"{KEYS}/server.key", "--key", "/tmp/alice/alice.key_secret")
DROP_INS = {
    "none": "",
    "cuda": CUDA.read_text(),
    "addresses": "[Service]\nIPAddressDeny=any\nIPAddressAllow=localhost\n",
    "images of a home": "[Service]\nProtectHome=tmpfs\nBindReadOnlyPaths=/opt/source/tests/data:/home/shared/images\n",
}


@pytest.fixture(params=DROP_INS.values(), ids=DROP_INS)
def guarded(installed: Service, request: pytest.FixtureRequest) -> Iterator[Service]:
    """The service with keys, TCP and a spool, and a drop-in that the documentation shows, running."""
    sandbox = installed.sandbox
    drop_in = sandbox.path(f"{UNITS}/blendmaskd.service.d/more.conf")
    before = installed.show("ActiveState")
    installed.systemctl("stop")
    drop_in.write_text(request.param)
    sandbox.run("systemctl", "daemon-reload")
    sandbox.run("rm", "-rf", KEYS, "/tmp/alice")
    sandbox.run(PYTHON, "-m", "blendmaskd.keys", "server", KEYS, "--owner", "blendmaskd")
    sandbox.run(PYTHON, "-m", "blendmaskd.keys", "client", "alice", "--to", "/tmp/alice", "--allow", f"{KEYS}/clients")
    installed.settings(SETTINGS)
    try:
        installed.start()
        yield installed
    finally:
        installed.systemctl("stop")
        drop_in.unlink()
        sandbox.run("systemctl", "daemon-reload")
        installed.settings(FIRST_SETTINGS.replace("npu", "cpu"))
        if before == "active":
            installed.start()


def _stats(service: Service, *flags: str) -> subprocess.CompletedProcess[str]:
    return service.sandbox.run(PYTHON, "-c", STATS, TCP, "--json", *flags, check=False)


def test_keys_guard_tcp_and_the_spool_is_written(guarded: Service) -> None:
    assert json.loads(_stats(guarded, *FLAGS).stdout)["serving"]
    refused = _stats(guarded)
    assert (refused.returncode, "--server-key FILE" in refused.stderr) == (3, True), refused
    with Client(guarded.endpoint, timeout_s=20) as client:
        assert client.segment(bytes_of_an_image()).width == 451
        job = client.submit(bytes_of_an_image())
        assert client.fetch(job).width == 451
    spool = guarded.sandbox.path("/var/lib/blendmaskd/spool.sqlite")
    assert spool.stat().st_mode & 0o007 == 0, "others may read the images in the spool"
    guarded.sandbox.path(f"{KEYS}/clients/alice.key").unlink()
    wait_for(lambda: _stats(guarded, *FLAGS).returncode == 3)


def bytes_of_an_image() -> bytes:
    return (REPOSITORY / "tests/golden/images/chelsea.png").read_bytes()


def test_the_daemon_cannot_change_who_is_allowed(service: Service) -> None:
    """Seen from inside its mount namespace, as its user: it reads its settings and keys, and writes where it must."""
    sandbox = service.sandbox
    sandbox.run("mkdir", "-p", f"{KEYS}/clients")
    sandbox.run("chown", "-R", "blendmaskd", KEYS)
    written = """
import os, sys
for folder in sys.argv[1:]:
    try:
        os.makedirs(folder, exist_ok=True)
        open(folder + "/probe", "w").close()
        os.unlink(folder + "/probe")
        print(folder)
    except OSError:
        pass
"""
    folders = [f"{KEYS}/clients", "/etc/blendmaskd", "/opt/blendmaskd", "/usr/lib", "/home", "/root", "/dev/shm",
               "/run/blendmaskd", "/var/lib/blendmaskd/atc_data", "/var/log/blendmaskd/ascend", "/tmp"]  # fmt: skip
    pid = next(iter(service.workers().values()))
    enter = ["nsenter", f"--target={pid}", "--mount", "setpriv", "--reuid=blendmaskd", "--regid=blendmaskd",
             "--clear-groups", PYTHON, "-c", written, *folders]  # fmt: skip
    done = subprocess.run(enter, capture_output=True, text=True, timeout=30)
    assert set(done.stdout.split()) == {
        "/dev/shm", "/run/blendmaskd", "/var/lib/blendmaskd/atc_data", "/var/log/blendmaskd/ascend", "/tmp",
    }, done.stderr  # fmt: skip


@pytest.mark.parametrize("with_drop_in", ["", *DROP_INS], ids=lambda name: name or "unit alone")
def test_every_drop_in_keeps_the_rating(installed: Service, with_drop_in: str) -> None:
    """As systemd has loaded it, and 2.0 or better; `verify` says nothing."""
    sandbox = installed.sandbox
    drop_in = sandbox.path(f"{UNITS}/blendmaskd.service.d/more.conf")
    drop_in.write_text(DROP_INS.get(with_drop_in, ""))
    try:
        sandbox.run("systemctl", "daemon-reload")
        rated = sandbox.run("systemd-analyze", "security", "--no-pager", "--threshold=20", "blendmaskd", check=False)
        assert rated.returncode == 0, rated.stdout
        verified = sandbox.run("systemd-analyze", "verify", f"{UNITS}/blendmaskd.service")
        assert (verified.stdout, verified.stderr) == ("", "")
    finally:
        drop_in.unlink()
        sandbox.run("systemctl", "daemon-reload")


def test_what_stays_open_says_why() -> None:
    """What `systemd-analyze` finds open, and why, stands in the unit's comments."""
    comments = " ".join(line for line in UNIT.read_text().splitlines() if line.startswith("#"))
    for name in ("PrivateDevices=yes", "MemoryDenyWriteExecute", "ProcSubset=pid", "PrivateUsers=yes", "RootDirectory=",
                 "IPAddressDeny=", "@resources", "netlink", "umask"):  # fmt: skip
        assert name in comments, name
