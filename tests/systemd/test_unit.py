"""The unit under a real systemd: installed, started, asked, reloaded, hung, stopped.

The unit is the shipped one, with all of its hardening; `sandbox.DROP_IN` only shortens two waits.
"""
from __future__ import annotations

import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sandbox import FIRST_SETTINGS, REPOSITORY, UNITS, Service, exposure_is_low, wait_for

from blendmaskd import discovery
from blendmaskd.client.blocking import Client
from blendmaskd.settings import Restarts, Settings
from blendmaskd.wanted import differences_shown

pytestmark = [pytest.mark.slow, pytest.mark.systemd]

UNIT = REPOSITORY / "configs/blendmaskd.service"
SETTINGS = FIRST_SETTINGS.replace("npu", "cpu")
STATUS = r"(\d+\.\d\d) FPS = cpu:0 (\d+\.\d\d) \+ cpu:1 (\d+\.\d\d), \d+ waiting, seq \d+"
JOBS = 12  # of half a second each, on two devices
IMAGE = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)


def test_exposure_is_low() -> None:
    exposure_is_low(UNIT)


def test_verify_has_nothing_to_say(installed: Service) -> None:
    sandbox = installed.sandbox
    cuda = sandbox.path(f"{UNITS}/blendmaskd.service.d/cuda.conf")
    for with_cuda in (False, True):
        if with_cuda:
            cuda.write_text((REPOSITORY / "configs/blendmaskd-cuda.conf").read_text())
        verified = sandbox.run("systemd-analyze", "verify", f"{UNITS}/blendmaskd.service")
        assert (verified.stdout, verified.stderr) == ("", "")
    cuda.unlink()


def test_waits_are_longer_than_what_they_wait_for(installed: Service) -> None:
    settings, restarts = Settings(), Restarts()
    assert _seconds(installed, "TimeoutStopUSec") > 2 * settings.drain_s + restarts.stop_s
    assert _seconds(installed, "TimeoutStartUSec") > 2 * (restarts.start_timeout_s + restarts.stop_s)
    shipped = re.search(r"^WatchdogSec=(\d+)s$", UNIT.read_text(), re.MULTILINE)  # the drop-in hides it from systemd
    assert shipped
    assert int(shipped[1]) > 3 * discovery.TOOL_TIMEOUT_S


def test_start_fails_when_no_worker_can_start(installed: Service) -> None:
    installed.systemctl("stop")
    installed.settings("{devices: [cpu:0], engine: adelaidet}")
    try:
        started = installed.start(check=False)
        assert started.returncode != 0
        wait_for(lambda: _said(installed, "cannot boot"))
    finally:
        installed.systemctl("stop")
        installed.settings(SETTINGS)


def test_settings_that_do_not_hold_are_not_tried_again(installed: Service) -> None:
    installed.systemctl("stop")
    installed.settings("queue: {max_jobs: -1}")
    try:
        assert installed.start(check=False).returncode != 0
        assert (installed.show("ActiveState"), installed.show("NRestarts")) == ("failed", "0")
        assert installed.show("ExecMainStatus") == "78"
    finally:
        installed.settings(SETTINGS)


def test_started_is_ready_and_says_its_fps(service: Service) -> None:
    assert service.show("ActiveState") == "active"
    with Client(service.endpoint) as client:
        assert client.segment(IMAGE).device in ("cpu:0", "cpu:1")
    combined, *each = wait_for(lambda: _fps(service))
    assert combined > 0
    assert combined == pytest.approx(sum(each), abs=0.011)
    assert re.search(STATUS, service.sandbox.run("systemctl", "status", "--no-pager", "blendmaskd").stdout)


def test_workers_get_what_the_settings_want(service: Service) -> None:
    """The hardening leaves CPU sets and the preloaded library alone."""
    library = _unused_library()
    service.settings(f"{SETTINGS}runtime: {{preload: {library}}}\n")
    service.systemctl("restart")
    try:
        with Client(service.endpoint) as client:
            devices = wait_for(lambda: _ready_devices(client))
        for device in devices:
            assert device["actual"]["preload"] == library
            assert differences_shown(device) == []
    finally:
        service.settings(SETTINGS)
        service.systemctl("restart")


def test_workers_are_confined(service: Service) -> None:
    _, uid, *_ = service.sandbox.run("getent", "passwd", "blendmaskd").stdout.split(":")[1:]
    for pid in service.workers().values():
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert status["Uid"].split()[0] == uid
        assert (status["NoNewPrivs"], status["Seccomp"], int(status["CapBnd"], 16)) == ("1", "2", 0)
        mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
        access = {where: options.split(",")[0] for _, _, _, _, where, options, *_ in mounts}
        assert (access["/"], access["/run/blendmaskd"], access["/var/lib/blendmaskd"]) == ("ro", "rw", "rw")


def test_health_is_served(service: Service) -> None:
    """The unit's network and address families let /readyz answer, as soon as systemd says the service is started."""
    ask = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).status)"
    command = ("/opt/environment/bin/python", "-c", ask, "http://127.0.0.1:9464/readyz")
    assert service.sandbox.run(*command, check=False).stdout == "200\n"


@pytest.mark.parametrize(("groups", "answer"), [("--clear-groups", "refused"), ("--groups=blendmaskd", "connected")])
def test_only_the_group_may_connect(service: Service, groups: str, answer: str) -> None:
    connect = """
import socket
try:
    socket.socket(socket.AF_UNIX).connect("/run/blendmaskd/client.sock")
    print("connected")
except PermissionError:
    print("refused")
"""
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", groups)
    done = service.sandbox.run(*nobody, "/opt/environment/bin/python", "-c", connect)
    assert done.stdout.strip() == answer, done.stderr


def test_a_member_of_the_group_hands_images_over_in_shared_memory(service: Service) -> None:
    """Another user than the service's makes the memory; the workers find the daemon in a /proc that hides others."""
    segment = """
import numpy
from blendmaskd.client.blocking import Client
with Client("ipc:///run/blendmaskd/client.sock", transport="shared") as client:
    print(client.segment(numpy.zeros((48, 64, 3), numpy.uint8)).width)
"""
    member = ("setpriv", "--reuid=65534", "--regid=65534", "--groups=blendmaskd")
    done = service.sandbox.run(*member, "/opt/environment/bin/python", "-c", segment)
    assert done.stdout == "64\n", done.stderr


def test_reload_replaces_the_workers_before_it_returns(service: Service) -> None:
    main, before = service.main_pid(), service.workers()
    service.systemctl("reload")
    after = service.workers()
    assert service.main_pid() == main
    assert len(after) == 2
    assert not set(before) & set(after)
    assert not set(before.values()) & set(after.values())
    assert service.show("SubState") == "running"


def test_reload_of_bad_settings_changes_nothing(service: Service) -> None:
    before = service.pids()
    service.settings(SETTINGS + "queue: {max_jobs: many}\n")
    try:
        assert service.systemctl("reload", check=False).returncode != 0
        wait_for(lambda: _said(service, "queue.max_jobs = 'many'"))
        assert service.pids() == before
        assert service.show("ActiveState") == "active"
        with Client(service.endpoint) as client:
            assert client.segment(IMAGE).height == IMAGE.shape[0]
    finally:
        service.settings(SETTINGS)


def test_a_hung_daemon_is_killed_and_replaced(service: Service) -> None:
    restarts, before = int(service.show("NRestarts")), service.pids()
    os.kill(service.main_pid(), signal.SIGSTOP)
    wait_for(lambda: int(service.show("NRestarts")) > restarts)
    wait_for(lambda: service.show("ActiveState") == "active")
    assert not [pid for pid in before if Path(f"/proc/{pid}").exists()]
    with Client(service.endpoint) as client:
        assert client.segment(IMAGE).height == IMAGE.shape[0]
    assert "Fatal Python error: Aborted" in service.sandbox.journal()


def test_kill_9_of_the_daemon_loses_no_job(service: Service) -> None:
    """Systemd starts it again; a client that waits sends anew what was unanswered, the spool has what was durable."""
    service.settings(SETTINGS + "spool: /var/lib/blendmaskd/spool.db\n")
    try:
        service.systemctl("restart")
        restarts, main = int(service.show("NRestarts")), service.main_pid()
        with ThreadPoolExecutor(1) as thread, Client(service.endpoint) as client, Client(service.endpoint) as watcher:
            durable = [watcher.submit(IMAGE) for _ in range(4)]
            answers = thread.submit(lambda: [found.height for found in client.map([IMAGE] * JOBS, window=4)])
            wait_for(lambda: watcher.stats()["answered"] >= 2)
            os.kill(main, signal.SIGKILL)
            assert answers.result(timeout=60.0) == [IMAGE.shape[0]] * JOBS
            assert [watcher.fetch(job).height for job in durable] == [IMAGE.shape[0]] * 4
            wait_for(lambda: watcher.stats()["spool"]["answers"] == 4)
        assert int(service.show("NRestarts")) == restarts + 1
        assert service.main_pid() != main
    finally:
        service.settings(SETTINGS)
        service.systemctl("restart")


def test_stop_drains_and_leaves_nothing(service: Service) -> None:
    with ThreadPoolExecutor(JOBS) as threads, Client(service.endpoint) as watcher:
        before = _accepted(_next_stats(watcher))  # a new snapshot: the jobs of earlier tests are in it
        answers = [threads.submit(_segment, service.endpoint) for _ in range(JOBS)]
        wait_for(lambda: _accepted(watcher.stats()) == before + JOBS)
        service.systemctl("stop")
        assert {answer.result(timeout=5.0) for answer in answers} <= {"cpu:0", "cpu:1"}
    drained = wait_for(lambda: re.findall(r"draining, (\d+) jobs", service.sandbox.journal()))
    assert int(drained[-1]) > 0
    assert (service.show("Result"), service.show("ExecMainStatus")) == ("success", "0")
    assert service.pids() == []
    assert not service.sandbox.path("/run/blendmaskd").exists()


def _segment(endpoint: str) -> str:
    with Client(endpoint, retries=0) as client:
        return client.segment(IMAGE).device


def _next_stats(client: Client) -> dict[str, Any]:
    seq = client.stats()["seq"]
    wait_for(lambda: client.stats()["seq"] > seq)
    return client.stats()


def _accepted(stats: dict[str, Any]) -> int:
    """Jobs that the daemon has taken on since it began."""
    return int(stats["queue"]["jobs"] + stats["leased"] + stats["answered"])


def _ready_devices(client: Client) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = client.stats()["devices"]
    return devices if all(device["state"] == "ready" for device in devices) else []


def _fps(service: Service) -> list[float]:
    """Combined and per device, once the status line shows work."""
    match = re.fullmatch(STATUS, service.show("StatusText"))
    values = [float(value) for value in match.groups()] if match else [0.0]
    return values if values[0] else []


def _seconds(service: Service, name: str) -> float:
    shown = service.sandbox.run("systemd-analyze", "timespan", service.show(name)).stdout
    match = re.search(r"μs: (\d+)", shown)
    assert match, shown
    return int(match[1]) / 1e6


def _said(service: Service, text: str) -> str:
    """The last minute's lines with `text`; the journal takes lines a moment after they are written."""
    lines = service.sandbox.journal("--since=-60s").splitlines()
    return "\n".join(line for line in lines if text in line)


def _unused_library() -> str:
    """A library of the C library's own that nothing links to: a stand-in for tcmalloc that is everywhere."""
    listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=10, check=True).stdout
    match = re.search(r"^\s+libanl\.so\.1 .*=> (/.+)$", listed, re.MULTILINE)
    if not match:
        pytest.skip("needs libanl.so.1 of glibc")
    return match[1]
