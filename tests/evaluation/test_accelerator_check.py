"""The check of an accelerator: each section on what is here, processes that fail, what is said of all that."""
from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from blendmaskd import settings as settings_module
from blendmaskd_workers import blendmask, engines
from blendmaskd_workers.evaluation.accelerator import children, goldens, program, recorded, report, sections, visits
from blendmaskd_workers.evaluation.accelerator.children import ChildError
from checkout import ROOT

EMULATED = {"PYTHONPATH": str(ROOT / "tests" / "emulated")}
SMALL = "small_R18_chelsea"
TELLS = "import os, signal, sys, time\nprint('{\"row\": 1}', flush=True)\n"


def told(code: str, log: Path, seconds: float = 20.0) -> tuple[list[Any], str]:
    """The rows of a child that runs this, and how it failed."""
    rows = []
    try:
        for row in children.rows(children.program(["-c", code], os.environ), seconds, log):
            rows.append(row)
    except ChildError as error:
        return rows, str(error)
    return rows, ""


# ---- processes --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("code", "failure"), [
    ("", ""),
    ("sys.exit('no such kernel\\n')", "no such kernel (exit code 1)"),
    ("os.kill(os.getpid(), signal.SIGABRT)", "it said nothing (killed by SIGABRT)"),
])  # fmt: skip
def test_what_a_process_has_told_is_kept_however_it_ends(tmp_path: Path, code: str, failure: str) -> None:
    assert told(TELLS + code, tmp_path / "log") == ([{"row": 1}], failure)


def test_a_process_that_hangs_is_ended_with_what_it_has_started(tmp_path: Path, wait_until: Any) -> None:
    left = tmp_path / "pid"
    hang = (f"import subprocess\nleft = subprocess.Popen(['sleep', '600'])\n"
            f"open({str(left)!r}, 'w').write(str(left.pid))\ntime.sleep(600)")  # fmt: skip
    start = time.monotonic()
    rows, failure = told(TELLS + hang, tmp_path / "log", seconds=2.0)
    assert (rows, failure) == ([{"row": 1}], "not ready within 2 s")
    assert time.monotonic() - start < 2 + children.END_S
    wait_until(lambda: not psutil.pid_exists(int(left.read_text())) or is_zombie(int(left.read_text())))


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("attempt_that_works", "failure"), [(1, ""), (2, ""), (3, "hiccup (exit code 1)")])
def test_a_process_that_dies_before_it_tells_anything_is_started_once_more(
    tmp_path: Path, attempt_that_works: int, failure: str
) -> None:
    counter = tmp_path / "attempts"
    code = (f"import sys\nwith open({str(counter)!r}, 'a+') as file:\n    file.write('x')\n    file.seek(0)\n"
            f"    if len(file.read()) < {attempt_that_works}: sys.exit('hiccup')\nprint('{{\"row\": 1}}')")  # fmt: skip
    rows, said = told(code, tmp_path / "log")
    assert (rows, said) == ([] if failure else [{"row": 1}], failure)


def test_what_libraries_print_does_not_come_between_the_rows(tmp_path: Path) -> None:
    code = ("import os\nfrom blendmaskd_workers.evaluation.accelerator.children import telling\n"
            "with telling() as tell:\n    os.write(1, b'loading')\n    tell(row=1)\n    print('done')")  # fmt: skip
    assert told(code, tmp_path / "log") == ([{"row": 1}], "")
    assert (tmp_path / "log").read_text().split() == ["loadingdone"]


# ---- goldens ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """What was recorded, what the engine finds, and the image as it was prepared."""
    weights = goldens._weights(SMALL, tmp_path_factory.mktemp("weights"))
    overrides = [f"model.config={recorded.config_of('small_R18')}", f"model.weights={weights}"]
    engine = engines.make(settings_module.load(None, None, overrides, ["cpu:0"]), "cpu")
    engine.load()
    arrays = recorded.answer(SMALL)
    prepared = engine.prepare(recorded.photograph(str(arrays["file"])))
    [found] = engines.segment(engine, [prepared])
    return arrays, found, prepared


@pytest.mark.parametrize(("name", "place", "change", "verdict"), [
    ("raw_scores", 3, 0.0, goldens.AS_A_CPU),
    ("raw_scores", 3, 5e-5, goldens.NEAR),
    ("raw_scores", 3, 5e-4, goldens.OFF),
    ("raw_boxes", (3, 0), 1e-2, goldens.NEAR),
    ("raw_boxes", (3, 0), 1.0, goldens.OFF),
    ("raw_classes", slice(1), 50, goldens.NEAR),
    ("raw_classes", slice(9), 50, goldens.OFF),
    ("raw_scores", 3, np.nan, goldens.OFF),
])  # fmt: skip
def test_a_device_is_judged_by_its_farthest_instance(small, name: str, place: Any, change: float, verdict: str) -> None:
    arrays, found, prepared = small
    moved = arrays[name].copy()
    moved[place] += np.asarray(change).astype(moved.dtype)
    row = goldens.compare({**arrays, name: moved}, found, prepared, exact=False)
    assert goldens.judge(row) == verdict
    assert row["mask_off"] == 0


def test_wrong_masks_are_off(small) -> None:
    arrays, found, prepared = small
    swapped = {f"rle_counts_{name}": arrays[f"rle_counts_{name}"][::-1] for name in ("lo", "hi")}
    row = goldens.compare({**arrays, **swapped}, found, prepared, exact=False)
    assert row["mask_off"] > 1000
    assert goldens.judge(row) == goldens.OFF


@pytest.mark.parametrize(("difference", "verdict"), [
    (1e-7, goldens.AS_A_CPU), (1e-4, goldens.NEAR), (1e-2, goldens.OFF), (float("inf"), goldens.OFF),
])  # fmt: skip
def test_a_training_is_judged_by_its_worst_number(difference: float, verdict: str) -> None:
    assert goldens.judge({"relative_diff": difference}) == verdict


def test_numbers_that_are_none_or_missing_are_as_far_off_as_can_be() -> None:
    assert goldens._largest({"a": 1.0, "b": 2.2}, {"a": 1.0, "b": 2.0, "frozen": None}) == pytest.approx(0.1)
    assert goldens._largest({"a": float("nan")}, {"a": 1.0}) == float("inf")
    assert goldens._largest({}, {"a": 1.0}) == float("inf")


# ---- times ------------------------------------------------------------------------------------------------------

class Limited:
    """An engine that has no memory, or no operator, for more than so many images."""

    def __init__(self, engine: Any, most: int, error: Exception) -> None:
        self._engine, self._most, self._error = engine, most, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def warm_up(self, sizes: Any, batch: int) -> None:
        if batch > self._most:
            raise self._error


@pytest.fixture(scope="module")
def engine(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small network on a CPU."""
    import torch

    weights = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({"model": blendmask.random_weights(blendmask.build(blendmask.load_config(config)))}, weights)
    settings = settings_module.load(None, None, [f"model.config={config}", f"model.weights={weights}"], ["cpu:0"])
    made = engines.make(settings, "cpu")
    made.load()
    return made


def rows_of(engine: Any, seconds: float = 60.0) -> list[Any]:
    rows: list[Any] = []
    visits._time_all(engine, (64, 64), (1, 2, 4), time.monotonic() + seconds, lambda **row: rows.append(row))
    return rows


@pytest.mark.parametrize(("error", "said"), [
    (RuntimeError("CUDA out of memory. Tried to allocate\n20 GiB"),
     {"skipped": "out of memory: CUDA out of memory. Tried to allocate"}),
    (RuntimeError("\"topk\" not implemented for 'Half'"), {"unsupported": "\"topk\" not implemented for 'Half'"}),
    (AttributeError("module 'torch.npu' has no attribute 'NPUGraph'"),
     {"unsupported": "module 'torch.npu' has no attribute 'NPUGraph'"}),
    (RuntimeError("an illegal memory access"), {"failed": "RuntimeError: an illegal memory access"}),
])  # fmt: skip
def test_what_a_batch_does_not_fit_for_is_said_and_ends_the_row_of_batches(
    engine, monkeypatch, error: Exception, said: Any
) -> None:
    monkeypatch.setattr(visits, "MOST_S", 0.05)
    one, two, four = rows_of(Limited(engine, 1, error))
    assert one["batch"] == 1
    assert one["runs"] >= visits.LEAST_RUNS
    assert one["images_per_s"] > 0
    assert 0 < one["second_ms"] < one["first_ms"]
    assert (two, four) == ({"batch": 2, **said}, {"batch": 4, "skipped": "batch 2 did not run"})


def test_a_batch_for_which_there_is_no_time_is_left_out(engine) -> None:
    assert rows_of(engine, seconds=0.0)[1:] == [{"batch": 2, "skipped": visits.TIME_IS_UP},
                                                {"batch": 4, "skipped": visits.TIME_IS_UP}]  # fmt: skip


def test_runs_overlap_where_the_device_does(engine) -> None:
    prepared = engine.prepare(np.zeros((64, 64, 3), np.uint8))
    calls: list[str] = []

    class Watched:
        overlaps = True

        def launch(self, batch: Any) -> Any:
            calls.append("launch")
            return WatchedRun(engine.launch(batch))

    class WatchedRun:
        def __init__(self, run: Any) -> None:
            self.run = run

        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(self.run, name)

    times = visits.fly(Watched(), [prepared], 0.0)  # type: ignore[arg-type]
    assert len(times) == visits.LEAST_RUNS + 1
    assert all(each.first_s > 0 for each in times)
    assert calls[:7] == ["launch", "complete", "launch", "choose", "complete", "collect", "times"]


# ---- what is said -----------------------------------------------------------------------------------------------

TIMED = [
    {"precision": "fp32", "graphs": False, "batch": 1, "images_per_s": 40.0},
    {"precision": "bf16", "graphs": True, "batch": 4, "images_per_s": 90.0},
    {"precision": "fp16", "graphs": True, "failed": "no"},
]


def test_the_daemon_is_loaded_as_the_device_was_fastest_and_as_it_can_bear() -> None:
    assert sections.fastest(TIMED) == ("bf16", True)
    assert sections.fastest([]) == ("fp32", False)
    assert sections.clients_for(TIMED) == [8, 32]
    assert sections.clients_for([]) == [8, 32]
    assert sections.clients_for([{**TIMED[0], "images_per_s": 2.0}]) == [8]
    assert sections.clients_for([{**TIMED[0], "images_per_s": 0.5}]) == [1]


def test_what_a_load_was_too_short_for_is_left_out() -> None:
    row = sections._under_load({"load": {"clients": 8}, "fps": 3.0, "p50_ms": float("nan"), "failures": {}, "wrong": 0})
    assert set(row) == {"clients", "fps", "p50_ms", "failures", "wrong"}
    assert "images/s 3.0" in report.line("daemon", row)


def tree(**rows: Any) -> Any:
    return {
        "run": {"device": "cuda:0", "config": "R_50_1x.yaml", "weights": None, "budget_s": 480.0},
        "machine": {"cpu": "Some CPU", "cpus": 16, "memory_gb": 128.0, "python": "3.12", "kernel": "6", "time": "now"},
        "device": {"name": "Card|X", "memory_gb": 80.0, "driver": "580.1", "torch": "2.11.0", "runtime": "CUDA 13.0"},
        "sections": {name: {"rows": found, "seconds": 1.0} for name, found in rows.items()},
        "seconds": 2.0,
    }


GOLDEN = {"golden": "a", "way": "served", "recorded": 100, "matched": 99, "score_diff": 1e-6, "box_diff_px": 1e-3,
          "mask_pixels": 5_000_000, "mask_off": 0}  # fmt: skip


@pytest.mark.parametrize(("section", "row", "bad"), [
    ("goldens", {**GOLDEN, "verdict": "near"}, False),
    ("goldens", {**GOLDEN, "verdict": "off"}, True),
    ("times", {"precision": "fp16", "graphs": True, "unsupported": "no such kernel"}, False),
    ("times", {"precision": "fp16", "graphs": True, "batch": 8, "skipped": "out of memory"}, False),
    ("times", {"precision": "fp16", "graphs": True, "failed": "killed by SIGSEGV"}, True),
    ("precision", {"precision": "bf16", "off": ["p3 is off"]}, False),
    ("precision", {"precision": "fp32", "off": ["p3 is off"]}, True),
    ("daemon", {"clients": 8, "failures": {"timeout": 2}, "wrong": 0}, True),
    ("daemon", {"clients": 8, "failures": {}, "wrong": 1}, True),
    ("daemon", {"clients": 8, "failures": {}, "wrong": 0, "fps": 3.0}, False),
    ("daemon", {"failed": "KeyError: 'rows'"}, True),
])  # fmt: skip
def test_what_is_unsupported_or_left_out_is_no_problem_and_what_fails_is(section: str, row: Any, bad: bool) -> None:
    page = tree(**{section: [row]})
    assert bool(report.problems(page)) is bad
    text = report.markdown(page)
    for words in ("Card\\|X", "580.1", "2.11.0", "Some CPU", "learnt nothing"):
        assert words in text
    for reason in report.NOT_MEASURED:
        assert row.get(reason, "") in text


@pytest.mark.parametrize(("arguments", "code"), [
    (["--device", "gpu"], 2), (["--device", "cpu:0"], 2), (["--device", "cpu", "--sections", "times,speed"], 2),
    (["--device", "cpu", "--budget-s", "0"], 2),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(arguments)
    assert ended.value.code == code


def test_what_is_not_there_is_said(tmp_path: Path, capsys: Any) -> None:
    out = ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert program.main([*out, "--goldens", "R_50_9x_dog"]) == 2
    assert program.main([*out, "--weights", "missing.pth"]) == 2
    (tmp_path / "file").write_text("")
    assert program.main(["--device", "cpu", "--out", str(tmp_path / "file" / "out")]) == 4
    said = capsys.readouterr().err
    for words in ("R_50_9x_dog.npz: no such file", "missing.pth: no such file", "Not a directory"):
        assert words in said


def test_the_wheels_to_bring_are_those_that_are_needed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["serve"]
    names = {re.split("[<>=]", line)[0] for line in wanted.split()} - {"torch", "numpy"}
    [brought] = re.findall(r"-d wheels ([^:]+)\n\n", program.__doc__ or "")
    assert names <= set(brought.replace("\\", "").split())


# ---- all of it --------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_device_that_is_not_there_is_reported(script, tmp_path: Path) -> None:
    done = script("accelerator_check", "--device", "cuda:7", "--out", tmp_path)
    assert done.returncode == 3, done.stderr
    assert "cuda devices are visible to this process" in (tmp_path / "accelerator_check.md").read_text()


@pytest.fixture
def check(script, config: Path, tmp_path: Path) -> Any:
    """``check("cpu", 60, "goldens,times")``: exit code, and what was measured by section, which may be little."""

    def run(device: str, budget_s: int, names: str, *more: object, **environment: str) -> tuple[int, Any]:
        done = script("accelerator_check", "--device", device, "--config", config, "--goldens", SMALL,
                      "--sizes", "64x64", "--batch-sizes", 1, 2, "--budget-s", budget_s, "--sections", names,
                      "--out", tmp_path, *more, environment=environment, timeout_s=budget_s + 60)  # fmt: skip
        found = json.loads((tmp_path / "accelerator_check.json").read_text())
        assert found["seconds"] < budget_s, done.stderr
        return done.returncode, {name: section["rows"] for name, section in found["sections"].items()}

    return run


@pytest.mark.slow
def test_a_cpu_passes_all_sections(check, tmp_path: Path) -> None:
    code, rows = check("cpu", 300, "goldens,precision,times,daemon")
    assert code == 0
    assert rows["goldens"][0]["verdict"] == goldens.AS_A_CPU
    assert rows["precision"][0]["loss_diff"] == 0
    assert rows["times"][2]["images_per_s"] > 0  # behind what a CPU has not
    assert rows["daemon"][0]["fps"] > 0
    assert "a CPU has no graphs" in (tmp_path / "accelerator_check.md").read_text()


@pytest.mark.slow
def test_an_emulated_npu_passes_with_graphs(check, tmp_path: Path) -> None:
    code, rows = check("npu:0", 120, "goldens,times", **EMULATED)
    assert code == 0
    assert {row["verdict"] for row in rows["goldens"] if "verdict" in row} == {goldens.AS_A_CPU}
    assert {"exact", "served", "cpu"} <= {row.get("way") for row in rows["goldens"]}
    assert {row["graphs"] for row in rows["times"] if "images_per_s" in row} == {False, True}
    assert "Ascend910-emulated physical 0" in (tmp_path / "accelerator_check.md").read_text()


@pytest.mark.slow
def test_an_emulated_npu_is_kept_busy_by_the_daemon(check) -> None:
    code, rows = check("npu:1", 60, "daemon", **EMULATED)
    assert code == 0
    assert 0 < rows["daemon"][0]["of_device_time"] < 1.2
    assert set(rows["daemon"][0]["idle_share"]) == {"input", "launches", "selection"}


@pytest.mark.slow
def test_a_section_that_fails_stops_no_other(check, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_text("no checkpoint")
    code, rows = check("cpu", 100, "goldens,precision,times,daemon", "--weights", weights)
    assert code == 1
    assert {row["verdict"] for row in rows["goldens"]} == {goldens.AS_A_CPU}  # they have weights of their own
    for name in ("precision", "times", "daemon"):
        [*_, failure] = [row["failed"] for row in rows[name] if "failed" in row]
        assert failure, name
    assert "weights.pth" in rows["times"][-1]["failed"]


@pytest.mark.slow
def test_ctrl_c_ends_its_processes_and_leaves_the_report(config: Path, tmp_path: Path, wait_until: Any) -> None:
    argv = [sys.executable, str(ROOT / "scripts" / "accelerator_check.py"), "--device", "cpu", "--config", str(config),
            "--sizes", "64x64", "--goldens", SMALL, "--out", str(tmp_path)]  # fmt: skip
    running = subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    wait_until(lambda: "exact" in text_of(tmp_path / "accelerator_check.json"), 60)
    below = psutil.Process(running.pid).children(recursive=True)
    running.terminate()
    assert running.wait(30) == 130
    assert below
    wait_until(lambda: not any(process.is_running() for process in below))
    assert "| exact |" in (tmp_path / "accelerator_check.md").read_text()


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""
