"""Offline runs on a real cluster of two nodes: bad images, resumed runs, lost nodes, Parquet in and out."""
from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from checkout import ROOT, SOURCES

pytest.importorskip("ray", reason="needs the extra ray: pip install -e '.[ray]'")

import pyarrow as pa
import pyarrow.parquet as pq

from blendmaskd_workers.engines import timed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings: Ray's and its libraries' own

BAD = {7, 47, 87, 127, 167}
TIMED = ["--devices", "npu:0", "--set", "engine=timed", "--set", "batch=1"]
RUN_S = 150.0


def _pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (32, 24, 3), np.uint8)


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_pixels(number)[:, :, ::-1]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """200 images, of which 5 are none."""
    path = tmp_path_factory.mktemp("images")
    for number in range(200):
        (path / f"{number:04d}.png").write_bytes(b"no image" if number in BAD else _png(number))
    return path


class Program:
    """A run of scripts/segment_dataset.py."""

    def __init__(self, cluster, output: Path, inputs: Path | str, *arguments: str) -> None:
        self.output = output
        self.process = subprocess.Popen(
            [sys.executable, "scripts/segment_dataset.py", "--address", cluster.address, "--input", str(inputs),
             "--output", str(output), *arguments],
            cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def end(self, code: int) -> str:
        """What it said. Fails when it ends otherwise."""
        try:
            text, _ = self.process.communicate(timeout=RUN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            text, _ = self.process.communicate()
            pytest.fail(f"it did not end:\n{text}")
        assert self.process.returncode == code, text
        return text

    def journal(self) -> list[dict[str, Any]]:
        lines = [line for part in self.output.glob("journal/*.jsonl") for line in part.read_text().split("\n")[:-1]]
        return [json.loads(line) for line in lines]

    def results(self) -> list[dict[str, Any]]:
        return json.loads((self.output / "results.json").read_text())

    def failures(self) -> list[dict[str, Any]]:
        return json.loads((self.output / "failures.json").read_text())


def test_a_killed_run_is_resumed_without_doing_work_twice(cluster, folder, tmp_path, wait_until) -> None:
    slow = [*TIMED, "--set", "timed.latency_ms={1: 100}"]
    first = Program(cluster, tmp_path / "out", folder, *slow)
    wait_until(lambda: len(first.journal()) >= 40 or first.process.poll() is not None, RUN_S)
    first.process.send_signal(signal.SIGKILL)
    first.end(-signal.SIGKILL)
    wait_until(lambda: _quiet(first), 30)
    done = first.journal()
    assert 40 <= len(done) < 200

    refused = Program(cluster, tmp_path / "out", folder, *slow)
    assert "--resume continues it" in refused.end(2)

    second = Program(cluster, tmp_path / "out", folder, *slow, "--resume")
    text = second.end(1)
    assert f"{len(done)} images were done before" in text
    places = [line["image"] for line in second.journal()]
    assert sorted(places) == list(range(200)), "each image has exactly one line"

    results = second.results()
    assert [result["image_id"] - 1 for result in results] == [n for n in range(200) if n not in BAD]
    for result in results:
        number = result["image_id"] - 1
        assert result["file_name"] == f"{number:04d}.png"
        assert result["checksum"] == timed.checksum(_pixels(number))
    failed = [(each["image_id"] - 1, each["code"]) for each in second.failures()]
    assert failed == [(number, "bad-image") for number in sorted(BAD)]
    assert all("not a JPEG" in each["reason"] for each in second.failures())
    assert "a/npu:0" in text
    assert "b/npu:0" in text

    third = Program(cluster, tmp_path / "out", folder, *slow, "--resume")
    assert "200 images were done before" in third.end(1)
    assert len(third.journal()) == 200


def _quiet(program: Program) -> bool:
    """Whether its workers are gone: nobody has its journal open."""
    parts = {str(part) for part in program.output.glob("journal/*.jsonl")}
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(entry) in parts:
                return False
        except OSError:
            continue
    return True


def test_a_node_is_killed_in_mid_run_and_every_image_is_answered(cluster, folder, tmp_path, wait_until) -> None:
    cluster.add("d")
    program = Program(cluster, tmp_path / "out", folder, *TIMED, "--set", "timed.latency_ms={1: 100}")
    wait_until(lambda: any(line["node"] == "d" for line in program.journal()) or program.process.poll() is not None,
               RUN_S)  # fmt: skip
    cluster.kill("d")
    program.end(1)
    assert len(program.results()) == 195
    assert {each["code"] for each in program.failures()} == {"bad-image"}
    assert {line["image"] for line in program.journal()} == set(range(200))


def test_an_image_that_ends_workers_fails_alone(cluster, tmp_path) -> None:
    """Its task's others lose nothing."""
    (tmp_path / "in").mkdir()
    for number in range(10):
        width = 12 if number == 3 else 24
        Image.fromarray(np.zeros((16, width, 3), np.uint8)).save(tmp_path / "in" / f"{number}.png")
    folders = f"{ROOT / 'tests' / 'cluster' / 'poison'}:{ROOT / 'tests'}:{SOURCES}"
    poison = ["--set", f"worker_env={{PYTHONPATH: '{folders}'}}"]
    program = Program(cluster, tmp_path / "out", tmp_path / "in", *TIMED, "--workers", "1", *poison)
    program.end(1)
    assert {each["file_name"]: each["code"] for each in program.failures()} == {"3.png": "worker-lost"}
    assert [result["file_name"] for result in program.results()] == [f"{n}.png" for n in range(10) if n != 3]


def test_parquet_in_and_out(cluster, tmp_path) -> None:
    pictures = sorted((ROOT / "configs" / "demo" / "images").iterdir())
    rows = [{"name": path.name, "image": {"bytes": path.read_bytes(), "path": None}} for path in pictures]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=2)
    demo = [
        "--devices", "cpu:0", "--set", f"model.config={ROOT}/configs/demo/demo.yaml", "--set", "runtime.threads=1",
        "--set", f"model.weights={ROOT}/configs/demo/model_final.pth", "--set", "warm_up=[[256, 320]]",
    ]  # fmt: skip
    Program(cluster, tmp_path / "json", tmp_path / "in.parquet", "--name-column", "name", *demo).end(0)
    Program(cluster, tmp_path / "rows", pictures[0].parent, "--format", "parquet", *demo).end(0)
    results = json.loads((tmp_path / "json" / "results.json").read_text())
    table = pq.read_table(tmp_path / "rows" / "results.parquet").to_pylist()
    assert [row["file_name"] for row in table] == [path.name for path in pictures]
    flat = [{"image_id": row["image_id"], "file_name": row["file_name"], **found} for row in table
            for found in row["detections"]]  # fmt: skip
    assert flat == results
    assert len(results) >= 6


def test_what_keeps_workers_from_starting_is_told(cluster, tmp_path) -> None:
    picture = ROOT / "configs" / "demo" / "images" / "0003.jpg"
    text = Program(cluster, tmp_path / "a", picture, "--devices", "npu:0", "--set", "engine=native").end(3)
    assert "segment_dataset: the workers cannot go on: model.weights is not set" in text
    text = Program(cluster, tmp_path / "b", picture, "--devices", "cuda:0", "--set", "engine=timed").end(3)
    assert "no node of the cluster has such a device" in text
    text = Program(cluster, tmp_path / "c", picture, "--devices", "cuda:0", "npu:0", "--set", "engine=timed").end(2)
    assert "of one kind" in text


def test_ctrl_c_keeps_what_there_is(cluster, folder, tmp_path, wait_until) -> None:
    program = Program(cluster, tmp_path / "out", folder, *TIMED, "--set", "timed.latency_ms={1: 200}")
    wait_until(lambda: len(program.journal()) >= 5 or program.process.poll() is not None, RUN_S)
    program.process.send_signal(signal.SIGINT)
    text = program.end(130)
    assert "--resume continues from here" in text
    assert 4 <= len(program.results()) < 195
