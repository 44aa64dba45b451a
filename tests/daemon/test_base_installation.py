"""What `pip install blendmaskd` gives, without the extra `serve` and on a platform that is not Linux: interpreters
that lack the extra's packages, or what only Unix has, do what a client does against a real daemon."""
from __future__ import annotations

import configparser
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import curve
import pytest

import blendmaskd
from checkout import ROOT, SOURCES

MODULES = {"pyyaml": "yaml", "opencv-python": "cv2"}  # by distribution, where they differ
BASE = {"msgpack", "msgspec", "numpy", "pillow", "pyzmq", "rich"}
PHOTO = ROOT / "configs" / "demo" / "images" / "0003.jpg"

SEGMENT = """
import asyncio, sys
from blendmaskd import AsyncClient, Client, HandshakeError, JobFailed
endpoint, server_key, key, photo = sys.argv[1:]
keys = {"server_key": server_key, "key": key, "timeout_s": 20.0}
with Client(endpoint, **keys) as client:
    print(client.segment(photo).width, len(list(client.map([photo] * 40))), client.stats()["serving"])
    try:
        client.segment(b"no image")
    except JobFailed as error:
        print(error.code)

async def ask():
    async with AsyncClient(endpoint, **keys) as client:
        return (await client.segment(photo)).height

print(asyncio.run(ask()))
try:
    Client("ipc:///tmp/x.sock", transport="shared")
except ValueError as error:
    print(error)
Client("ipc:///tmp/x.sock").close()
assert not {"fcntl", "pwd", "numpy", "torch"} & {name for name, module in sys.modules.items() if module}
"""


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def distributions(text: str) -> set[str]:
    return {re.split(r"[\[<>=;~!]", line)[0].strip().lower() for line in text.splitlines() if line.strip()}


SERVE = distributions(setup()["options.extras_require"]["serve"])
COMMANDS = dict(line.split(" = ") for line in setup()["options.entry_points"]["console_scripts"].strip().splitlines())


@pytest.fixture(scope="module")
def guarded(start_daemons: Any, tmp_path_factory: pytest.TempPathFactory) -> curve.Guarded:
    return curve.start(start_daemons, tmp_path_factory.mktemp("guarded"))


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs this Python without the extra's packages, as a platform without Unix with ``foreign=True``."""

    def run(*arguments: object, foreign: bool = False, without: Any = SERVE) -> subprocess.CompletedProcess[str]:
        masked = " ".join(MODULES.get(name, name) for name in without)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests' / 'masked'}:{SOURCES}", "MASKED": masked}
        environment |= {"FOREIGN": "1"} if foreign else {}
        return subprocess.run([sys.executable, *map(str, arguments)], env=environment, cwd=tmp_path,
                              capture_output=True, text=True, timeout=120)  # fmt: skip

    return run


def command(name: str) -> tuple[str, str]:
    """Arguments of Python that run a console command as its script would."""
    module, attribute = COMMANDS[name].split(":")
    return "-c", f"import sys; sys.argv[0] = {name!r}; from {module} import {attribute}; sys.exit({attribute}())"


def test_the_base_installation_is_small() -> None:
    assert distributions(setup()["options"]["install_requires"]) == BASE
    assert {"torch", "pycocotools"} <= SERVE
    for extra in ("npu", "ray", "test", "dev"):
        assert distributions(setup()["options.extras_require"][extra]) > SERVE


def test_a_client_by_tcp_needs_nothing_that_only_unix_has(guarded: curve.Guarded, python: Any) -> None:
    done = python("-c", SEGMENT, guarded.tcp, guarded.server_key, guarded.secret("alice"), PHOTO, foreign=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:3] == ["383 40 2", "bad-image", "259"]
    assert lines[3].startswith("transport 'shared' needs Linux")


@pytest.mark.parametrize("foreign", [False, True])
def test_submit_draws_without_the_extra(
    foreign: bool, shared_daemon: Any, guarded: curve.Guarded, python: Any, tmp_path: Path
) -> None:
    endpoint, keys = shared_daemon.endpoint, []
    if foreign:
        endpoint, keys = guarded.tcp, ["--server-key", guarded.server_key, "--key", guarded.secret("bob")]
    for form in ("rle", "polygon"):
        out = tmp_path / form
        done = python(*command("blendmaskd-submit"), endpoint, PHOTO.parent, "--out", out, "--mask-format", form,
                      "--score-threshold", 0, *keys, foreign=foreign)  # fmt: skip
        assert (done.returncode, done.stderr) == (0, done.stderr)
        assert len(list(out.glob("*.jpg"))) == len(list(PHOTO.parent.glob("*.jpg")))
        assert json.loads((out / "results.json").read_text())
        again = python(*command("blendmaskd-submit"), endpoint, PHOTO.parent, "--out", out, "--mask-format", form,
                       "--score-threshold", 0, "--resume", *keys, foreign=foreign)  # fmt: skip
        assert (again.returncode, "were done before" in again.stdout) == (0, True)


@pytest.mark.parametrize("foreign", [False, True])
def test_stats_shows_without_the_extra(foreign: bool, guarded: curve.Guarded, python: Any) -> None:
    keys = ["--server-key", guarded.server_key, "--key", guarded.secret("bob")]
    done = python(*command("blendmaskd-stats"), guarded.tcp, *keys, foreign=foreign)
    assert (done.returncode, done.stderr) == (0, "")
    assert "combined" in done.stdout


def test_keys_are_made_where_files_have_no_owners(python: Any, tmp_path: Path) -> None:
    made = python(*command("blendmaskd-keys"), "client", "alice", "--to", tmp_path, foreign=True)
    assert (made.returncode, made.stderr) == (0, "")
    listed = python(*command("blendmaskd-keys"), "list", tmp_path, foreign=True)
    assert listed.stdout.endswith("  alice\n")
    owned = python(*command("blendmaskd-keys"), "client", "bob", "--to", tmp_path, "--owner", "bob", foreign=True)
    assert (owned.returncode, owned.stderr.count("\n")) == (1, 1)
    assert "--owner bob: files have no selectable owner" in owned.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps_or_names_the_extra_in_one_line(name: str, python: Any) -> None:
    done = python(*command(name), "--help")
    if done.returncode == 0 or name in ("blendmaskd", "blendmaskd-submit", "blendmaskd-stats", "blendmaskd-keys"):
        assert done.stdout.startswith("usage: ")
    else:
        extra = "http" if name == "blendmaskd-http" else "serve"
        assert re.fullmatch(rf"{name}: \w+ is not installed; .*: pip install 'blendmaskd\[{extra}\]'\n", done.stderr)


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["-m", "blendmaskd", "--devices", "cpu:0"], 78, r"blendmaskd: \w+ is not installed; .*blendmaskd\[serve\]'"),
        (["-m", "blendmaskd", "check"], 78, r"blendmaskd: \w+ is not installed; .*blendmaskd\[serve\]'"),
        ([ROOT / "scripts" / "inference.py", "--config=x", "--input", PHOTO, "--json=x", "--random-weights"], 2,
         r".*pip install 'blendmaskd\[serve\]'"),
        ([ROOT / "scripts" / "segment_dataset.py", "--input", PHOTO, "--output", "x"], 2, r".*blendmaskd\[\w+\]'"),
    ],
)
def test_what_needs_the_extra_says_so(argv: list[object], code: int, text: str, python: Any) -> None:
    done = python(*argv)
    assert re.fullmatch(text + "\n", done.stderr), done.stderr
    assert done.returncode == code


def test_a_daemon_without_torch_says_what_is_missing(python: Any, tmp_path: Path) -> None:
    arguments = ["--devices", "cpu:0", "--set", "engine=native", "--set", "model.weights=x.pth", "--set",
                 f"endpoints.clients=[ipc://{tmp_path}/s]", "--set", "endpoints.metrics=null"]  # fmt: skip
    checked = python("-m", "blendmaskd", "check", "--json", *arguments, without=["torch", "pycocotools"])
    found = [(line["area"], line["text"], line["remedy"]) for line in json.loads(checked.stdout)["findings"]]
    named = [remedy for area, text, remedy in found if area == "device" and "torch is not installed" in text]
    assert named == ["pip install 'blendmaskd[serve]'"], found
    assert [text for area, text, _ in found if area == "weights" and "blendmaskd[serve]" in text], found


def test_what_a_client_s_host_runs_can_be_imported_there(python: Any) -> None:
    names = [module.name for module in pkgutil.walk_packages(blendmaskd.__path__, "blendmaskd.")]
    serving = tuple(f"blendmaskd.{name}" for name in ("check", "core", "http", "shell"))
    # Of the core, what programs load as well.
    names = [name for name in names if not name.startswith(serving) and name != "blendmaskd.coco.average_precision"]
    assert {"blendmaskd.client.places", "blendmaskd.keys", "blendmaskd.programs.submit"} <= set(names)
    done = python("-c", "\n".join(f"import {name}" for name in names), foreign=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_module_of_ours_that_is_missing_is_our_own_fault(python: Any) -> None:
    code = "import sys; from blendmaskd.extras import run; run('x', 'blendmaskd.nowhere')"
    assert "ModuleNotFoundError: No module named 'blendmaskd.nowhere'" in python("-c", code).stderr


