"""docs/http.md: its commands are run as they stand, and its tables name what there is."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running_front import MakeFront

from blendmaskd.http.rest import STATUS
from checkout import ROOT

PAGE = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")


def test_the_pages_commands_run(daemon: Any, front: MakeFront, tmp_path: Path) -> None:
    here = front(daemon(spool=str(tmp_path / "spool.sqlite")))
    blocks = re.findall(r"<!-- runs -->\n\n((?: {4}.*\n)+)", PAGE)
    assert len(blocks) >= 4
    curlrc = tmp_path / ".curlrc"
    curlrc.write_text("silent\nshow-error\nfail\n")
    for block in blocks:
        script = re.sub(r"^ {4}", "", block, flags=re.MULTILINE).replace("http://127.0.0.1:9466", here.url)
        done = subprocess.run(["bash", "-euc", script], cwd=ROOT, env={**os.environ, "HOME": str(tmp_path)},
                              capture_output=True, text=True, timeout=60)  # fmt: skip
        assert done.returncode == 0, script + done.stdout + done.stderr
        assert done.stderr == ""
    [first, *_] = blocks
    assert "127.0.0.1:9466/v1/segment" in first


def test_the_pages_python_runs(shared_front: Any) -> None:
    pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    code = block.replace("127.0.0.1:9466", f"127.0.0.1:{shared_front.port}")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["[[", "0.", "0.", "383.", "259.]]", "[b'image']"]), done


def test_each_code_and_status_is_in_the_table() -> None:
    rows = re.findall(r"^\| ([\d, ]+)[^|]*\| (.*) \|$", PAGE, re.MULTILINE)
    for code, status in STATUS.items():
        assert [row for row in rows if str(status.value) in row[0] and f"`{code}`" in row[1]], (code, status)
