"""The performance program, on sleeping, emulated and real devices; every process that it starts ends."""
from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from PIL import Image

from blendmaskd import discovery
from blendmaskd import settings as settings_module
from blendmaskd.core.launch_plan import Basis, Preload
from blendmaskd_workers.evaluation import logs, performance
from blendmaskd_workers.evaluation.timing import CannotTime, Request, Stopwatch, figures, time_together
from checkout import ROOT

EMULATED = {"PYTHONPATH": str(ROOT / "tests" / "emulated")}


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(psutil.Process().children())
    yield
    assert set(psutil.Process().children()) <= before


def test_figures() -> None:
    found = figures([10.0, 20.0, 30.0, 60.0], batch=3)
    assert found["avg_ms"] == 30
    assert found["median_ms"] == 25
    assert (found["min_ms"], found["max_ms"]) == (10, 60)
    assert found["fps"] == pytest.approx(120)  # 3 images in 25 ms
    assert found["std_ms"] == pytest.approx(statistics.pstdev([10, 20, 30, 60]))
    assert found["cv_percent"] == pytest.approx(100 * found["std_ms"] / 30)


# ---- one process ------------------------------------------------------------------------------------------------

def stopwatch(*overrides: str, device: str = "npu:0") -> Stopwatch:
    settings = settings_module.load(None, None, ["engine=timed", *overrides], [device])
    basis = Basis(settings, {}, Preload(None, "not wanted"), discovery.available_cpus()[:1], math.inf)
    return Stopwatch(device, basis, "64x96")


def test_a_device_is_timed_in_a_pinned_process_of_its_own() -> None:
    with stopwatch("timed.latency_ms={1: 5, 2: 8}") as one:
        one.ready()
        assert one.network_input == "64x96"
        assert one.actual.cpus == str(discovery.available_cpus()[0])
        assert one.actual.env["ASCEND_RT_VISIBLE_DEVICES"] == "0"
        for batch, least in ((1, 5), (2, 8)):
            [latencies_ms] = time_together([one], Request(iterations=4, warm_up=1, batch=batch))
            assert len(latencies_ms) == 4
            assert least <= min(latencies_ms) < least + 5


def test_what_does_not_take_effect_is_said() -> None:
    with stopwatch("worker_env={OMP_NUM_THREADS: '3'}", "runtime.cpu_affinity_conf=npu_affine:1") as one:
        one.ready()
        assert any("npu_affine:1" in warning for warning in one.warnings())
        one.actual = msgspec.structs.replace(one.actual, preload=None, threads=1)
        assert "npu:0: threads: wanted 3, is 1" in one.warnings()


def test_all_are_busy_until_the_last_has_finished() -> None:
    with stopwatch("timed.latency_ms={1: 5}") as fast, stopwatch("timed.latency_ms={1: 60}", device="npu:1") as slow:
        fast.ready()
        slow.ready()
        processes = [psutil.Process(one.process.pid) for one in (fast, slow)]
        before = [process.num_ctx_switches().voluntary for process in processes]
        ours, theirs = time_together([fast, slow], Request(iterations=4, warm_up=1))
        sleeps = [process.num_ctx_switches().voluntary - first for process, first in zip(processes, before)]
    assert (len(ours), len(theirs)) == (4, 4)
    assert sleeps[0] > 20  # 4 iterations of 5 ms, and then many more while the other took 240 ms


@pytest.mark.slow
def test_an_engine_that_cannot_be_loaded_says_why() -> None:
    with (
        stopwatch("engine=native", "model.weights=/nowhere.pth", device="cpu:0") as one,
        pytest.raises(CannotTime, match=r"cpu:0: .*(/nowhere\.pth|R_50_1x)"),
    ):
        one.ready()


def test_the_death_of_a_process_is_noticed() -> None:
    with stopwatch("timed.latency_ms={1: 5}") as one:
        one.ready()
        psutil.Process(one.process.pid).kill()
        with pytest.raises(CannotTime, match=r"npu:0: its process ended with exit code -9"):
            time_together([one], Request(iterations=1, warm_up=1))


# ---- the program ------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_two_sleeping_devices_are_twice_as_fast_as_one(tmp_path, read_report, capsys) -> None:
    for _ in range(5):  # whatever else the machine does disturbs the two sooner than the one
        capsys.readouterr()
        code = performance.main([
            "--engine", "timed", "--devices", "npu:0", "npu:1", "--batch-sizes", "1", "2", "4", "--iterations", "12",
            "--warm-up", "1", "--size", "64x64", "--output-dir", str(tmp_path),
        ])  # fmt: skip
        assert code == 0
        report = read_report(tmp_path, "performance", logs.write_performance)
        together = report["together"]
        if together["speedup"] >= 1.95:
            break
    assert together["speedup"] >= 1.95
    assert together["combined_fps"] == pytest.approx(sum(row["fps"] for row in together["devices"]))
    if len(discovery.available_cpus()) > 1:
        assert len({row["cpus"] for row in together["devices"]}) == 2
    assert [row["batch"] for row in report["batches"]] == [1, 2, 4]
    assert report["best_batch"] == 2
    assert "shows" in report["run"]["note"] or "show" in report["run"]["note"]
    log = capsys.readouterr().out
    assert "note: engine timed" in log
    assert log.count("| best") == 1
    for name in ("performance", "large_batch", "dual_device"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 800


@pytest.mark.slow
def test_an_emulated_pair_with_everything_that_can_be_measured(config, script, tmp_path, read_report) -> None:
    done = script(
        "eval_performance", "--config", config, "--random-weights", "0", "--devices", "npu:0", "npu:1",
        "--batch-sizes", "1", "2", "--dtypes", "fp32", "bf16", "--runtime-options", "--cpu-baseline",
        "--iterations", "2", "--warm-up", "1", "--output-dir", tmp_path,
        "--set", "runtime.threads=1", "--set", "runtime.preload='off'", environment=EMULATED,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path, "performance", logs.write_performance)
    baseline, *devices = report["latency"]
    assert (baseline["device"], baseline["model"]) == ("CPU", "cpu")
    assert [row["model"] for row in devices] == [f"Ascend910-emulated physical {index}" for index in (0, 1)]
    assert all(len(row["latencies_ms"]) == 2 for row in report["latency"])
    assert report["speedups"][1]["speedup"] == pytest.approx(baseline["median_ms"] / devices[1]["median_ms"])
    assert [row["dtype"] for row in report["dtypes"] if row["fps"] > 0] == ["fp32", "bf16"]
    assert report["together"]["combined_fps"] > 0
    options = {row["options"]: row for row in report["runtime_options"]}
    assert "off" in options["tcmalloc"]["skipped"]
    assert options["none"]["task_queue"] == "1"
    assert options["task_queue"]["task_queue"] == "2"
    if len(discovery.available_cpus()) > 1:
        everything = options["affinity + task_queue"]
        assert everything["cpus"] == report["together"]["devices"][0]["cpus"] != options["none"]["cpus"]
        assert everything["task_queue"] == "2"
    assert "NPU vs CPU speedup:" in done.stdout


@pytest.mark.slow
def test_a_data_type_that_a_device_cannot_compute_is_reported_in_its_row(config, script, tmp_path, read_report) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "autocast = torch.autocast\n"
        "def refuse(device, dtype, **more):\n"
        "    if dtype == torch.float16: raise RuntimeError('no kernel for Half\\non this device')\n"
        "    return autocast(device, dtype, **more)\n"
        "torch.autocast = refuse\n"
    )
    done = script(
        "eval_performance", "--config", config, "--random-weights", "0", "--devices", "cpu:0",
        "--dtypes", "fp16", "fp32", "--iterations", "2", "--warm-up", "1", "--size", "96x96",
        "--output-dir", tmp_path / "out", "--set", "runtime.threads=1", environment={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "out", "performance", logs.write_performance)
    assert report["dtypes"][0] == {"dtype": "fp16", "failed": "cpu:0: no kernel for Half"}
    assert report["dtypes"][1]["base"] == "fp32"
    assert report["together"] is None
    assert report["latency"][0]["device"] == "cpu:0"


def test_ctrl_c_ends_it_and_its_processes(tmp_path, wait_until) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "eval_performance.py"), "--engine", "timed", "--devices", "npu:0",
               "--iterations", "100000", "--output-dir", str(tmp_path)]  # fmt: skip
    running = subprocess.Popen(command, cwd="/", stderr=subprocess.PIPE, text=True, start_new_session=True)

    def under_way() -> bool:  # before its stopwatch it starts other processes, which end
        return any(_ignores(child.pid, signal.SIGINT) for child in psutil.Process(running.pid).children())

    wait_until(under_way, 30.0)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    said, status = running.communicate(timeout=20)[1], running.returncode
    assert (set(said.splitlines()) - {"timing npu:0: batch 1"}, status) == (set(), 130)
    assert not list(tmp_path.iterdir())


def _ignores(pid: int, number: signal.Signals) -> bool:
    try:
        ignored = int(re.search(r"^SigIgn:\s+(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1], 16)
    except FileNotFoundError:  # it has ended
        return False
    return bool(ignored >> (number - 1) & 1)


def test_without_matplotlib_there_are_figures_but_no_pictures(script, tmp_path) -> None:
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')"
    )
    done = script("eval_performance", "--engine", "timed", "--devices", "cpu:0", "--iterations", "1", "--warm-up", "1",
                  "--output-dir", tmp_path / "out", environment={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pip install 'blendmaskd[plots]'" in done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["performance_eval.json", "performance_eval.log"]
    assert json.loads((tmp_path / "out" / "performance_eval.json").read_text())["latency"]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "said"), [
    (["--devices", "npu:0", "--random-weights", "0"], "torch_npu"),
    (["--devices", "cpu:0", "--weights", "missing.pth"], "missing.pth"),
    (["--devices", "gpu:0", "--random-weights", "0"], "gpu:0"),
    (["--devices", "cpu:0", "--random-weights", "0", "--set", "runtime.preload=/nowhere.so"], "/nowhere.so"),
])  # fmt: skip
def test_what_cannot_be_had_is_said(config, tmp_path, capsys, arguments, said) -> None:
    code = performance.main(["--config", str(config), "--output-dir", str(tmp_path), *arguments])
    assert code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [
    ["--devices", "cpu:0"],
    ["--devices", "cpu:0", "--engine", "timed", "--cpu-baseline"],
    ["--devices", "cpu:0", "--engine", "timed", "--size", "800"],
    ["--devices", "cpu:0", "--engine", "timed", "--iterations", "0"],
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(arguments) -> None:
    with pytest.raises(SystemExit) as ended:
        performance.main(arguments)
    assert ended.value.code == 2
