"""What the tests of the evaluation programs share: a small network that is quick to run, the programs as processes."""
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from checkout import ROOT


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network of the recorded references, on smaller images."""
    path = tmp_path_factory.mktemp("config") / "tiny_R18.yaml"
    base = ROOT / "tests" / "golden" / "small_R18.yaml"
    path.write_text(f"_BASE_: {base}\nINPUT:\n  MIN_SIZE_TEST: 96\n")
    return path


Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def script() -> Script:
    """``script("eval_precision", "--config", …, environment={…})``: a program of a clone, run from another folder."""

    def run(name: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Any:
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)],
            cwd="/", env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


def _assert_same(exact: Any, shown: Any, where: str = "") -> None:
    """The same tree, with numbers as exact as a log shows them: four digits, or two decimals."""
    if isinstance(exact, dict):
        assert exact.keys() == shown.keys(), where
        for key, value in exact.items():
            _assert_same(value, shown[key], f"{where}/{key}")
    elif isinstance(exact, list):
        assert len(exact) == len(shown), where
        for index, value in enumerate(exact):
            _assert_same(value, shown[index], f"{where}/{index}")
    elif isinstance(exact, float):
        assert shown == pytest.approx(exact, rel=6e-4, abs=6e-3 if "precision" not in where else 6e-7), where
    else:
        assert shown == exact, where


@pytest.fixture(scope="session")
def parses_back() -> Callable[..., Any]:
    """``parses_back(folder, "precision", read, write)``: the report, after its log was read back to it."""

    def check(folder: Path, program: str, read: Callable[[str], Any], write: Callable[[Any], str]) -> Any:
        log = (folder / f"{program}_eval.log").read_text()
        report = json.loads((folder / f"{program}_eval.json").read_text())
        shown = read(log)
        _assert_same(report, shown, program)
        assert write(shown) == log  # nothing in the log is lost in reading
        assert not any(math.isnan(value) for value in _numbers(report))
        return report

    return check


def _numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in _numbers(value)]
    if isinstance(tree, list):
        return [number for value in tree for number in _numbers(value)]
    return [tree] if isinstance(tree, float) else []
