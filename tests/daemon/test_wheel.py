"""What pip installs: all that daemon and workers read, nothing that only tests use, and python-daemon beside it."""
from __future__ import annotations

import ast
import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from checkout import ROOT

SOURCES = {"blendmaskd": ROOT / "daemon", "blendmaskd_workers": ROOT / "workers"}
SERVE = """
import blendmaskd.shell.pages, sys, urllib.request
assert blendmaskd.shell.pages.__file__.startswith(sys.argv[1]), blendmaskd.shell.pages.__file__
server = blendmaskd.shell.pages.Pages("127.0.0.1:0")
print(urllib.request.urlopen(f"http://127.0.0.1:{server.port}/").read().decode()[:15])
server.close()
"""
BOTH = """
import sys
from pathlib import Path
here = Path(sys.argv[1])
import blendmaskd, blendmaskd_workers.loop, daemon
assert all(here in Path(module.__file__).parents for module in (blendmaskd, blendmaskd_workers.loop, daemon))
with daemon.DaemonContext(detach_process=False, stdout=sys.stdout, stderr=sys.stderr, working_directory=str(here)):
    with blendmaskd.Client(sys.argv[2]) as client:
        print(client.segment(sys.argv[3]).width)
"""


def pip(*arguments: object) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("daemon", "workers"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]


def run(code: str, folder: Path, *arguments: object, **popen: Any) -> str:
    """What Python prints with the packages of a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, **popen)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_status_page_comes_with_the_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert run(SERVE, tmp_path, tmp_path, cwd=tmp_path) == "<!doctype html>\n"


def test_the_wheel_is_the_two_packages_and_no_more(names: list[str]) -> None:
    """So setup.cfg, which lists packages one by one, lists all."""
    files = [(root, path) for package, root in SOURCES.items() for path in (root / package).rglob("*.*")]
    found = {str(path.relative_to(root)) for root, path in files if path.is_file() and path.suffix != ".pyc"}
    assert set(names) == found
    assert {"blendmaskd/py.typed", "blendmaskd/shell/status.html"} <= found


def module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: Path) -> Iterator[str]:
    """What a module imports, and modules that it names in full in a text, as commands do."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                assert not node.level, f"{path}: a relative import"
                yield str(node.module)
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            case ast.Constant(value=str(text)) if re.fullmatch(r"blendmaskd(_workers)?(\.\w+)*", text):
                yield text


def used(sources: Mapping[str, Path]) -> set[str]:
    """The modules that console commands, scripts, workers and Ray come to, over what those import."""
    entries = configparser.ConfigParser()
    entries.read(ROOT / "setup.cfg", encoding="utf-8")
    commands = re.findall(r"= ([\w.]+):", entries["options.entry_points"]["console_scripts"])
    scripts = [name for script in (ROOT / "scripts").glob("*.py") for name in imports(script)]
    application = re.findall(r"import_path: ([\w.]+):", (ROOT / "configs" / "ray_serve.yaml").read_text("utf-8"))
    waiting = {*commands, *scripts, *application, "blendmaskd.__main__", "blendmaskd_workers.__main__"}
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in sources and name not in reached:
            reached.add(name)
            waiting |= set(imports(sources[name]))
            waiting |= {name.rpartition(".")[0]}  # its package
    return reached


def test_the_wheel_holds_nothing_that_only_tests_use(names: list[str]) -> None:
    sources = {module(name): SOURCES[name.partition("/")[0]] / name for name in names if name.endswith(".py")}
    assert sorted(set(sources) - used(sources)) == []


def test_a_type_checker_knows_the_client(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (tmp_path / "user.py").write_text("from blendmaskd import Client, Klient\nreveal_type(Client('x').segment('y'))\n")
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", "user.py"],
                          cwd=tmp_path, env={**os.environ, "MYPYPATH": ""}, capture_output=True, text=True)  # fmt: skip
    assert 'Module "blendmaskd" has no attribute "Klient"' in done.stdout
    assert "blendmaskd.client.exchange.Segmentation" in done.stdout


@pytest.fixture(scope="module")
def python_daemon(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheels of python-daemon and of what it needs, packed again from the files that pip unpacked here."""
    folder = tmp_path_factory.mktemp("python-daemon")
    return [repacked(name, folder) for name in ("python-daemon", "lockfile")]


def repacked(name: str, folder: Path) -> Path:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs {name}, of the extra test")
    packed = folder / f"{name.replace('-', '_')}-{found.version}-py3-none-any.whl"
    with zipfile.ZipFile(packed, "w") as wheel:
        for file in found.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                wheel.write(str(file.locate()), str(file))
    return packed


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_python_daemon_both_work(
    ours_first: bool, wheel: Path, python_daemon: list[Path], shared_daemon: Any, tmp_path: Path
) -> None:
    for installed in ([wheel], python_daemon) if ours_first else (python_daemon, [wheel]):
        pip("install", "--quiet", "--no-index", "--no-deps", "--target", tmp_path, *installed)
    photo = ROOT / "configs" / "demo" / "images" / "0003.jpg"
    assert run(BOTH, tmp_path, tmp_path, shared_daemon.endpoint, photo, cwd=ROOT) == "383\n"
