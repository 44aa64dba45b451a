"""What pip installs has all that the daemon reads: a wheel is built, unpacked elsewhere and served from."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from checkout import ROOT

SERVE = """
import blendmaskd.shell.pages, sys, urllib.request
assert blendmaskd.shell.pages.__file__.startswith(sys.argv[1]), blendmaskd.shell.pages.__file__
server = blendmaskd.shell.pages.Pages("127.0.0.1:0")
print(urllib.request.urlopen(f"http://127.0.0.1:{server.port}/").read().decode()[:15])
server.close()
"""


def test_the_status_page_comes_with_the_wheel(tmp_path: Path) -> None:
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    for name in ("daemon", "workers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(unpacked)
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    served = subprocess.run(
        [sys.executable, "-c", SERVE, str(unpacked)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (served.stdout, served.stderr) == ("<!doctype html>\n", "")
