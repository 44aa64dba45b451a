"""What the README and docs/ say is what the code does."""
from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_settings_page_is_what_the_settings_say() -> None:
    spec = importlib.util.spec_from_file_location("settings_reference", ROOT / "scripts" / "settings_reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.page() == (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def test_the_readmes_raw_client_runs_as_it_stands(shared_daemon, tmp_path) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    [text] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "import zmq" in block]
    assert len(text.strip().splitlines()) == 10
    assert "daemon" not in text
    (tmp_path / "raw_client.py").write_text(text)
    photograph = ROOT / "tests" / "golden" / "images" / "chelsea.png"
    done = subprocess.run(
        [sys.executable, "-I", "raw_client.py", shared_daemon.endpoint, photograph],
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert "image 1.0 [0.0, 0.0, 451.0, 300.0]" in done.stdout


def test_the_raw_client_through_shared_memory_runs_as_it_stands(shared_daemon, tmp_path) -> None:
    page = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    [text] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "memfd_create" in block]
    assert "from daemon" not in text
    (tmp_path / "raw_client.py").write_text(text)
    photograph = ROOT / "tests" / "golden" / "images" / "chelsea.png"
    done = subprocess.run(
        [sys.executable, "-I", "raw_client.py", shared_daemon.endpoint.removeprefix("ipc://"), photograph],
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert "'bbox': [0.0, 0.0, 451.0, 300.0]" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_scripts_that_pages_name_exist(page: Path) -> None:
    for script in set(re.findall(r"scripts/[a-z_]+\.(?:py|sh)", page.read_text(encoding="utf-8"))):
        assert (ROOT / script).exists(), f"{page.name}: {script}"
