"""The first command of the README, from a clone whose packages are installed already."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from checkout import ROOT

PYTHON = """\
#!/bin/sh
case "$*" in "-m pip install"*) exit ;; esac
exec {python} "$@"
"""


def test_it_serves_the_pictures_and_stops(tmp_path: Path) -> None:
    for name in ("configs", "constraints.txt", "daemon", "scripts", "setup.cfg", "workers"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "Done: overlays and results.json are in out/quickstart." in done.stdout
    assert "2 of 2 devices" in done.stdout or "combined" in done.stdout, done.stdout
    pictures = {path.stem for path in (ROOT / "configs" / "demo" / "images").iterdir()}
    out = tmp_path / "out" / "quickstart"
    assert {path.stem for path in out.glob("*.jpg")} == pictures
    results = json.loads((out / "results.json").read_text())
    assert {result["image_id"] for result in results} == set(range(1, len(pictures) + 1))
