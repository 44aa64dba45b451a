"""The check before the first start, as the service's user; what the journal makes of the daemon's lines."""
from __future__ import annotations

import os
import signal

import pytest
from sandbox import SETTINGS, Sandbox, Service, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.systemd]

CHECK = f"cd /opt/blendmaskd && runuser -u blendmaskd -- venv/bin/python -m blendmaskd check --settings {SETTINGS}"


def check(sandbox: Sandbox) -> str:
    return sandbox.run("bash", "-c", CHECK).stdout


def test_the_services_user_may_do_what_it_must_before_the_first_start(installed: Service) -> None:
    installed.systemctl("stop")
    told = check(installed.sandbox)
    assert "client.sock: systemd creates the folder when the service starts" in told
    assert told.splitlines()[-1].endswith("0 errors")


def test_a_running_service_is_known(service: Service) -> None:
    assert "client.sock: served by a running blendmaskd (pid " in check(service.sandbox)


def test_the_journal_has_priorities_and_one_time_a_line(service: Service) -> None:
    [(name, pid)] = [(name, pid) for name, pid in service.workers().items() if name.startswith("cpu:0.")]
    os.kill(pid, signal.SIGKILL)
    expected = f"ERROR backoff: killed by SIGKILL slot={name}\n"
    wait_for(lambda: service.sandbox.journal("--priority=warning", "--lines=1") == expected)
    wait_for(lambda: name not in service.workers() and len(service.workers()) == 2)
