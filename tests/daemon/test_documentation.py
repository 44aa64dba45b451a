"""What the README and docs/ say is what the code does."""
from __future__ import annotations

import configparser
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blendmaskd.protocol import Code
from checkout import ROOT, SOURCES

PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "configs" / "demo" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_settings_is_what_their_code_says() -> None:
    spec = importlib.util.spec_from_file_location("settings_reference", ROOT / "scripts" / "settings_reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert reference.page() == written, "python scripts/settings_reference.py"


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
    for link, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
        target = page.parent / link if link else page
        assert target.exists(), f"{page.name}: {link}"
        if heading and target.suffix == ".md":
            assert heading in headings(target), f"{page.name}: {link}#{heading}"


def test_each_bound_of_the_security_page_names_tests_that_there_are() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    tests = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    tables = re.findall(r"^\|[^\n]*\| test \|\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = "".join(tables).splitlines()
    assert len(tables) == 2
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", row.split(" | ")[-1])
        assert named, row
        assert [test for file, test in named if f"\ndef {test}(" not in tests[file]] == [], row


def headings(page: Path) -> set[str]:
    """The anchors of a page, as forges make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_there_is_a_remedy_for_every_code_and_every_alert() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "configs" / "prometheus-rules.yml").read_text(encoding="utf-8"))
    wanted = [*Code, *alerts]
    assert len(wanted) > len(Code)
    assert [name for name in wanted if f"`{name}`" not in page] == []
    errors = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    assert [code for code in Code if f"| `{code}` |" not in errors] == []


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the console commands that setup.cfg names, for a PATH."""
    folder = tmp_path_factory.mktemp("programs")
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    for line in metadata["options.entry_points"]["console_scripts"].split("\n"):
        name, _, place = line.partition(" = ")
        if name:
            module, _, function = place.partition(":")
            code = f"import sys; from {module} import {function}; sys.exit({function}())"
            (folder / name).write_text(f"#!{sys.executable}\nimport sys\nsys.argv[0] = {name!r}\n{code}\n")
            (folder / name).chmod(0o755)
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    return folder


def commands(page: str) -> list[str]:
    """The lines of indented blocks, continued ones joined."""
    blocks = re.sub(r"\\\n +", "", page)
    return [line.strip() for line in re.findall(r"^ {4,}(.+)$", blocks, re.MULTILINE)]


PROGRAM = re.compile(
    r"(?:sudo )?(blendmaskd(?:-[a-z-]+)?(?: (?:check|server|client|list)\b)?|python scripts/[a-z_]+\.py)(?: |$)(.*)"
)


def documented_flags() -> dict[str, list[str]]:
    """By program, the flags that pages and README use with it, in order: they name tests."""
    flags: dict[str, set[str]] = {}
    for page in PAGES:
        for line in commands(page.read_text(encoding="utf-8")):
            found = PROGRAM.match(line)
            if found:
                used = re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", found[2].partition(" #")[0])
                flags.setdefault(found[1], set()).update(used)
    return {program: sorted(used) for program, used in flags.items()}


@pytest.mark.parametrize(("program", "flags"), documented_flags().items(), ids=str)
def test_documented_programs_and_flags_exist(program: str, flags: list[str], programs: Path) -> None:
    argv = [*program.split(), "--help"]
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": SOURCES}
    shown = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert set(flags) <= set(re.findall(r"--[a-z][a-z0-9-]*", shown.stdout))


@pytest.fixture
def short_folders() -> Iterator[Callable[..., str]]:
    """Makes folders with short paths: a socket's has at most 107 bytes."""
    with contextlib.ExitStack() as folders:
        yield lambda **named: folders.enter_context(tempfile.TemporaryDirectory(**named))


def test_commands_that_are_said_to_run_do(
    programs: Path, tmp_path: Path, short_folders: Callable[..., str], wait_until: Any
) -> None:
    """Blocks after ``<!-- runs: daemon -->`` start a daemon, those after ``<!-- runs: commands -->`` talk to it."""
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    sockets = short_folders(prefix="bmd-")
    for before, after in (("/tmp/blendmaskd.sock", f"{sockets}/c.sock"), ("--out out/", f"--out {tmp_path}/out")):
        page = page.replace(before, after)
    blocks = re.findall(r"<!-- runs: (\w+) -->\n\n((?: {4}.*\n)+)", page)
    [daemon] = [block for kind, block in blocks if kind == "daemon"]
    scripts = [block for kind, block in blocks if kind == "commands"]
    assert len(scripts) >= 2
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": SOURCES}
    run = {"cwd": ROOT, "env": environment, "text": True}
    served = f"exec {daemon.strip()} --set endpoints.metrics=127.0.0.1:0"
    with (tmp_path / "log").open("w") as log, subprocess.Popen(["bash", "-c", served], stderr=log, **run) as process:
        try:
            wait_until(lambda: "ready: 2 of 2 devices" in (tmp_path / "log").read_text() or process.poll(), 120)
            for script in scripts:
                done = subprocess.run(["bash", "-ec", script], capture_output=True, timeout=120, **run)
                assert done.returncode == 0, done.stdout + done.stderr
                assert "cpu:1" in done.stdout
        finally:
            process.terminate()
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_scripts_that_pages_name_exist(page: Path) -> None:
    for script in set(re.findall(r"scripts/[a-z_]+\.(?:py|sh)", page.read_text(encoding="utf-8"))):
        assert (ROOT / script).exists(), f"{page.name}: {script}"
