"""Prometheus' own tool reads our metrics without a complaint."""
from __future__ import annotations

import shutil
import subprocess

import pytest


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (Debian: prometheus)")
def test_promtool_has_no_complaint(shared_daemon, wait_until) -> None:
    wait_until(lambda: shared_daemon.get("/metrics")[0] == 200)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=shared_daemon.get("/metrics")[1], capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
