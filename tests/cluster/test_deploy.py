"""The commands of docs/ray.md, as they are written there, on one machine."""
from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkout import ROOT

pytest.importorskip("ray", reason="needs the extra ray: pip install -e '.[ray]'")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings: Ray's and its libraries' own

PROGRAMS = ("curl", "ray", "serve")
PORTS = {"Ray": 6379, "its dashboard": 8265, "Serve": 8000}


def commands(section: str) -> list[str]:
    """The indented blocks of a section of the page."""
    page = (ROOT / "docs" / "ray.md").read_text(encoding="utf-8")
    [text] = re.findall(rf"^## {section}\n(.*?)(?=^###? |\Z)", page, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"(?:^    .+\n)+", text, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() for block in blocks]


class Shell:
    """Runs commands in the repository, with this Python's programs and Ray's files in `folder`."""

    def __init__(self, folder: Path) -> None:
        import cluster_trial as trial

        self.path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = {**os.environ, **trial.environment(str(folder)), "PATH": self.path}

    def start(self, command: str, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return subprocess.Popen(
                f"exec {command}", shell=True, cwd=ROOT, env=self._environment, stdout=file, stderr=file
            )

    def run(self, command: str) -> str:
        done = subprocess.run(
            command, shell=True, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=150
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def shell() -> Iterator[Shell]:
    import cluster_trial as trial

    folder = Path(tempfile.mkdtemp(prefix="bmd-"))
    yield Shell(folder)
    for process in trial.processes(str(folder)):
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def test_serve_deploy_and_an_offline_run_as_documented(shell, tmp_path, wait_until) -> None:
    for program in PROGRAMS:
        if not shutil.which(program, path=shell.path):
            pytest.skip(f"needs {program}")
    for name, port in PORTS.items():
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"needs port {port}, which {name} listens on by default")
    start, deploy, segment, ready, shutdown = commands("Serve")
    [offline] = commands("A folder, or Parquet files")
    head = shell.start(start, tmp_path / "head.log")
    try:
        wait_until(lambda: _deployed(shell, deploy, head), 120)
        answer = json.loads(shell.run(segment))
        assert {found["category_name"] for found in answer["detections"]} >= {"star", "disc"}
        assert shell.run(ready).startswith("ok\n")
        shell.run(shutdown)
        said = shell.run(offline.replace("out/dataset", str(tmp_path / "out")))
        assert "combined: 6 images" in said
        assert len(json.loads((tmp_path / "out" / "results.json").read_text())) >= 6
    finally:
        head.terminate()
        head.wait(60)


def _deployed(shell: Shell, deploy: str, head: subprocess.Popen[bytes]) -> bool:
    """The second terminal is opened a little later: Ray's dashboard takes seconds until it answers."""
    assert head.poll() is None, "ray start ended"
    try:
        shell.run(deploy)
    except AssertionError as error:
        if "Connect" in str(error):  # ConnectionError, Connection refused
            return False
        raise
    return True
