"""What the tests of the evaluation programs share: a small network that is quick to run, the programs as processes."""
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from blendmaskd_workers import blendmask
from blendmaskd_workers.evaluation import subjects
from blendmaskd_workers.evaluation.subjects import Subject
from checkout import ROOT


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Both sides of a comparison must sum in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network of the recorded references, on smaller images."""
    path = tmp_path_factory.mktemp("config") / "tiny_R18.yaml"
    base = ROOT / "tests" / "golden" / "small_R18.yaml"
    path.write_text(f"_BASE_: {base}\nINPUT:\n  MIN_SIZE_TEST: 96\n")
    return path


@pytest.fixture(scope="module")
def pair(config: Path) -> tuple[Subject, Subject]:
    """A reference, and a device equal to it."""
    network = blendmask.load_config(config)
    return subjects.load(network, 0, "cpu"), subjects.load(network, 0, "cpu")


Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def script() -> Script:
    """``script("eval_precision", "--config", …, environment={…})``: a program of a clone, run from another folder."""

    def run(
        name: str, *arguments: object, environment: Mapping[str, str] | None = None, timeout_s: float = 120
    ) -> Any:
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)],
            cwd="/", env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def read_report() -> Callable[..., Any]:
    """``read_report(folder, "precision", write)``: its report, once it is seen that the log holds all of it."""

    def check(folder: Path, program: str, write: Callable[[Any], str]) -> Any:
        log = (folder / f"{program}_eval.log").read_text()
        report = json.loads((folder / f"{program}_eval.json").read_text())
        assert write(report) == log
        for value in _leaves(report):
            texts = [f"{value:{form}}" for form in FORMS] if isinstance(value, float) else [str(value)]
            assert any(text in log for text in texts), value
        assert not any(math.isnan(value) for value in _leaves(report) if isinstance(value, float))
        return report

    return check


FORMS = (".2f", ".3e", ".6f")  # numbers as exact as a log shows them


def _leaves(tree: Any) -> list[Any]:
    """Numbers and texts."""
    if isinstance(tree, dict | list):
        return [leaf for value in (tree.values() if isinstance(tree, dict) else tree) for leaf in _leaves(value)]
    return [] if tree is None or isinstance(tree, bool) else [tree]
