"""`scripts/benchmark.py --http`: load on any server that takes an image."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from running_front import Front

from checkout import ROOT


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/benchmark.py", "--encoding", "jpeg", "--size", "96x96", "--seconds", "1",
               "--warm-up", "0.2", "--rounds", "2", *map(str, arguments)]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("form", [(), ("--http-form", "image")])
def test_what_comes_back_is_counted(shared_front: Front, tmp_path: Path, form: tuple[str, ...]) -> None:
    file = tmp_path / "rows.json"
    done = benchmark("--http", f"{shared_front.url}/v1/segment", f"{shared_front.url}/nowhere", "--json", file, *form)
    assert done.returncode == 0, done.stderr
    good, wrong = (row for row in json.loads(file.read_text()) if row["round"] == 2)
    assert good["images"] > 10
    assert 0 < good["p50_ms"] < 1000
    assert good["cpu_s_per_1000"] > 0
    assert not good["failures"]
    assert (wrong["images"], set(wrong["failures"])) == (0, {"404"})


def test_what_cannot_be_loaded_is_said() -> None:
    assert "expected http://HOST:PORT/PATH" in benchmark("--http", "ftp://x").stderr
    assert benchmark("--http", "http://127.0.0.1:1/x").returncode == 3
