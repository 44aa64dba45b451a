"""The Containerfiles, by a parser: no builder runs here. What of them is shell runs, with stand-ins."""
from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

from blendmaskd import settings
from checkout import ROOT

FILES = ["Containerfile", "Containerfile.ascend"]
KNOWN = {"ARG", "FROM", "RUN", "COPY", "WORKDIR", "USER", "CMD", "ENV", "SHELL", "COMMENT"}


@pytest.fixture
def parsed(request: pytest.FixtureRequest, tmp_path: Path) -> DockerfileParser:
    (tmp_path / "Dockerfile").write_text((ROOT / request.param).read_text())
    return DockerfileParser(path=str(tmp_path))


def values(parsed: DockerfileParser, instruction: str) -> list[str]:
    return [each["value"] for each in parsed.structure if each["instruction"] == instruction]


@pytest.mark.parametrize("parsed", FILES, indirect=True)
def test_it_is_made_of_what_is_here(parsed: DockerfileParser) -> None:
    assert {each["instruction"] for each in parsed.structure} <= KNOWN
    assert values(parsed, "FROM") == ["${BASE}"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for copied in values(parsed, "COPY"):
        *sources, _ = copied.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source not in ignored
    copied = " ".join(values(parsed, "COPY"))
    assert all(name in copied for name in ("setup.cfg", "pyproject.toml", "daemon", "workers", "constraints.txt"))


@pytest.mark.parametrize("parsed", FILES, indirect=True)
def test_its_command_starts_a_daemon(parsed: DockerfileParser) -> None:
    python, option, module, *arguments = json.loads(values(parsed, "CMD")[-1])
    assert (python, option, module) == ("python", "-m", "blendmaskd")
    overrides = [arguments[place + 1] for place, each in enumerate(arguments) if each == "--set"]
    files = [arguments[place + 1] for place, each in enumerate(arguments) if each == "--settings"]
    loaded = settings.load(ROOT / files[0] if files else None, {}, overrides, None if files else ["cpu:0"])
    assert (ROOT / loaded.model.config).exists()


@pytest.mark.parametrize("parsed", FILES, indirect=True)
def test_its_shell_parses(parsed: DockerfileParser) -> None:
    for script in values(parsed, "RUN"):
        done = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True)
        assert done.stderr == "", script


@pytest.mark.parametrize("parsed", ["Containerfile.ascend"], indirect=True)
def test_torch_and_numpy_of_the_base_stay_as_they_are(parsed: DockerfileParser, tmp_path: Path) -> None:
    [script] = [script for script in values(parsed, "RUN") if "constraints.txt" in script]
    pins = script.partition("&&")[0].replace("/src/constraints.txt", str(ROOT / "constraints.txt"))
    subprocess.run(["bash", "-euc", pins.replace("/tmp/pins", f"{tmp_path}/pins")], check=True)
    names = re.findall(r"^(torch|numpy)\W.*$", (tmp_path / "pins").read_text(), re.MULTILINE)
    assert names == ["numpy"]
    assert "numpy<2" in (tmp_path / "pins").read_text()


@pytest.mark.parametrize("parsed", ["Containerfile.ascend"], indirect=True)
@pytest.mark.parametrize(("machine", "index"), [("x86_64", " --index-url https://download.pytorch.org/whl/cpu"),
                                                ("aarch64", "")])  # fmt: skip
def test_a_base_without_torch_npu_gets_the_pair(
    parsed: DockerfileParser, tmp_path: Path, machine: str, index: str
) -> None:
    script = values(parsed, "RUN")[0]
    for name, text in {"uname": f"echo {machine}", "pip": f'echo "$@" >>{tmp_path}/asked'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_NPU": "2.9.0.post2"}
    shell = json.loads(values(parsed, "SHELL")[0])
    subprocess.run([*shell, script], env=environment, check=True)
    torch, torch_npu = (tmp_path / "asked").read_text().splitlines()
    assert torch == f"install --no-cache-dir{index} torch==2.9.0"
    assert torch_npu.startswith("install --no-cache-dir torch_npu==2.9.0.post2 numpy<2 ")


@pytest.mark.parametrize("parsed", ["Containerfile.ascend"], indirect=True)
def test_its_python_has_canns_variables(parsed: DockerfileParser, tmp_path: Path) -> None:
    (tmp_path / "set_env.sh").write_text("echo noise\nexport ASCEND_HOME_PATH=/cann$1\n")
    [script] = [script for script in values(parsed, "RUN") if "chmod" in script]
    script = script.replace("/opt/blendmaskd", str(tmp_path))
    environment = {**os.environ, "SET_ENV": f"{tmp_path}/set_env.sh"}
    subprocess.run([*json.loads(values(parsed, "SHELL")[0]), script], env=environment, check=True)
    program = "import os, sys; print(os.environ['ASCEND_HOME_PATH'], sys.argv[1])"
    argv = [tmp_path / "bin" / "python", "-c", program, "two words"]
    done = subprocess.run(argv, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True)
    assert done.stdout == "/cann two words\n"
