"""Operators' times: of torch's profiler, and of torch_npu's tables in the forms of its versions."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from blendmaskd_workers import devices
from blendmaskd_workers.evaluation import logs, operators, performance, recording
from blendmaskd_workers.evaluation.operators import Operator, read_kernel_details

# torch_npu 2.1 on a 910A: a step, private formats, operators that fell back to the chip's CPU, no blank fields.
OLD = """\
Step Id,Model ID,Task ID,Stream ID,Name,Type,Accelerator Core,Start Time(us),Duration(us),Wait Time(us),Block Dim,Mix \
Block Dim,Input Shapes,Input Data Types,Input Formats,Output Shapes,Output Data Types,Output Formats,Context ID
1,4294967295,17,5,Cast12,Cast,AI_CORE,1699529622790614.8,120.5,0,32,0,\"\"\"2,3,800,800\"\"\",FLOAT,NCHW,\"\"\"2,3,800,800\"\"\",\
FLOAT16,NCHW,N/A
1,4294967295,18,5,Conv2D13,Conv2D,AI_CORE,1699529622790740.1,900.25,5.1,32,0,\"\"\"2,1,800,800,16;49,4,16,16\"\"\",FLOAT16;\
FLOAT16,NC1HWC0;FRACTAL_Z,\"\"\"2,4,400,400,16\"\"\",FLOAT16,NC1HWC0,N/A
1,4294967295,19,5,Conv2D14,Conv2D,AI_CORE,1699529622791640.1,99.75,5.1,32,0,\"\"\"2,4,200,200,16;4,4,16,16\"\"\",FLOAT16;\
FLOAT16,NC1HWC0;FRACTAL_Z,\"\"\"2,4,200,200,16\"\"\",FLOAT16,NC1HWC0,N/A
1,4294967295,20,6,trans_Cast_5,Cast,AI_CPU,1699529622792055.2,197.54,0,1,0,\"\"\"\"\"\",INT32,FORMAT_ND,\"\"\"\"\"\",UINT64,\
FORMAT_ND,N/A
"""
# torch_npu 2.13: a device's number, Block Num, a tab behind the time.
NEW = """\
Device_id,Model ID,Task ID,Stream ID,Name,Type,OP State,Accelerator Core,Start Time(us),Duration(us),Wait Time(us),\
Block Num,Mix Block Num,HF32 Eligible,Input Shapes
0,4294967295,61,2,aclnnConvolution_Conv2d_Conv2DV2,Conv2DV2,dynamic,AI_CORE,"1736413971558972.912\t",185.504,1.087,16,\
0,NO,\"\"\"2,3,800,800;64,3,7,7\"\"\"
0,4294967295,62,2,aclnnAdd_AddAiCore_Add,Add,dynamic,AI_VECTOR_CORE,"1736413971560588.764\t",1.17,2.2,20,0,NO,\"\"\";\"\"\"
"""
LEVEL_0 = """\
Device_id,Name,Type,Accelerator Core,Start Time(us),Duration(us),Wait Time(us),Block Dim
0,aclnnMul_MulAiCore_Mul,N/A,N/A,1774670741777420.5,18.0,64.742,0
0,aclnnMul_MulAiCore_Mul,N/A,N/A,1774670741777450.5,2.0,4.742,0
"""


@pytest.mark.parametrize(("text", "found"), [
    (OLD, [("Conv2D", "AI_CORE", 2, 1.0), ("Cast", "AI_CPU", 1, 0.19754), ("Cast", "AI_CORE", 1, 0.1205)]),
    (NEW, [("Conv2DV2", "AI_CORE", 1, 0.185504), ("Add", "AI_VECTOR_CORE", 1, 0.00117)]),
    (LEVEL_0, [("aclnnMul_MulAiCore_Mul", "N/A", 2, 0.02)]),
    (NEW.splitlines()[0], []),
])  # fmt: skip
def test_tables_of_all_versions_are_read(text: str, found: list[tuple[str, str, int, float]]) -> None:
    assert [(one.name, one.core, one.calls, pytest.approx(one.ms)) for one in read_kernel_details(text)] == found


@pytest.mark.parametrize("text", ["", "Device_id,OP Type,Core Type,Count,Total Time(us)\n0,Add,AI_CORE,1,2\n"])
def test_another_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no kernel_details\.csv: no column Accelerator Core, Duration\(us\), Name"):
        read_kernel_details(text)


def test_the_excess_of_a_batch_is_what_it_takes_beyond_the_time_per_image_of_the_smaller_one() -> None:
    two = [Operator("Conv2D", "AI_CORE", 71, 30.0), Operator("Add", "AI_CORE", 16, 8.0)]
    four = [Operator("Conv2D", "AI_CORE", 71, 98.0), Operator("TransData", "AI_CORE", 9, 10.0),
            Operator("Add", "AI_CORE", 16, 12.0)]  # fmt: skip
    found = operators.table({2: two, 4: four})
    assert [(row["operator"], row["excess_ms"]) for row in found["operators"]] == [
        ("Conv2D", 38), ("Add", -4), ("TransData", 10)]  # fmt: skip
    assert [cell["share_percent"] for cell in found["operators"][0]["cells"]] == [
        pytest.approx(100 * 30 / 38), pytest.approx(100 * 98 / 120)]  # fmt: skip
    assert found["batches"] == [{"batch": 2, "ms": 38, "calls": 87}, {"batch": 4, "ms": 120, "calls": 96}]
    assert found["excess_ms"] == 44


def test_many_operators_are_summed_up_behind_the_largest() -> None:
    many = [Operator(f"op{number}", "cpu", 1, 100.0 - number) for number in range(operators.SHOWN + 3)]
    rows = operators.table({1: many})["operators"]
    assert len(rows) == operators.SHOWN + 1
    assert (rows[-1]["operator"], rows[-1]["core"]) == ("all others", "3 kinds")
    assert sum(row["cells"][0]["ms"] for row in rows) == pytest.approx(sum(one.ms for one in many))
    assert {row["excess_ms"] for row in rows} == {0}


def test_torchs_profiler_tells_convolutions_from_the_rest() -> None:
    image, weight = torch.ones(1, 16, 64, 64), torch.ones(16, 16, 3, 3)
    found = recording.record(devices.open_device("cpu"), lambda: torch.conv2d(image, weight).relu(), runs=3)
    by_name = {one.name: one for one in found}
    assert by_name["aten::conv2d"].calls == by_name["aten::relu"].calls == 1
    assert max(found, key=lambda one: one.ms).name in ("aten::mkldnn_convolution", "aten::_slow_conv2d_forward")
    assert {one.core for one in found} == {"cpu"}


@pytest.fixture
def torch_npu(tmp_path: Path) -> Mapping[str, str]:
    """An environment with emulated NPUs, and a profiler with torch_npu's names that writes a table."""
    package = tmp_path / "modules" / "torch_npu"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "profiler.py").write_text(PROFILER)
    (package / "kernel_details.csv").write_text(OLD)
    emulated = Path(__file__).resolve().parents[1] / "emulated"
    return {"PYTHONPATH": f"{emulated}:{package.parent}"}


PROFILER = '''
import contextlib, pathlib, shutil

class ProfilerActivity:
    CPU, NPU = "CPU", "NPU"

class ProfilerLevel:
    Level0, Level1 = "Level0", "Level1"

def _ExperimentalConfig(*, profiler_level):
    return profiler_level

def tensorboard_trace_handler(folder):
    output = pathlib.Path(folder) / "host_7_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
    def analyse(profile):
        output.mkdir(parents=True)
        shutil.copy(pathlib.Path(__file__).with_name("kernel_details.csv"), output)
    return analyse

@contextlib.contextmanager
def profile(*, activities, on_trace_ready, experimental_config):
    assert (activities, experimental_config) == ([ProfilerActivity.NPU], ProfilerLevel.Level1)
    print("torch_npu's profiler prints to stdout")
    yield
    on_trace_ready(None)
'''


@pytest.mark.slow
def test_an_npus_operators_are_those_of_torch_npus_table(config, script, read_report, torch_npu, tmp_path) -> None:
    done = script(
        "eval_performance", "--config", config, "--random-weights", "0", "--devices", "npu:0", "--profile", "2", "4",
        "--iterations", "2", "--warm-up", "1", "--set", "runtime.threads=1", "--set", "runtime.preload='off'",
        "--output-dir", tmp_path / "out", environment=torch_npu,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    profile = read_report(tmp_path / "out", "performance", logs.write_performance)["profile"]
    assert [row["batch"] for row in profile["batches"]] == [2, 4]
    first = profile["operators"][0]
    assert (first["operator"], first["core"]) == ("Conv2D", "AI_CORE")
    assert [(cell["calls"], cell["ms"]) for cell in first["cells"]] == [(1, 0.5), (1, 0.5)]  # of two runs
    assert first["excess_ms"] == -0.5
    assert (tmp_path / "out" / "operators.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_profiler_that_writes_nothing_is_told(config, script, torch_npu, tmp_path) -> None:
    (tmp_path / "modules" / "torch_npu" / "kernel_details.csv").rename(tmp_path / "modules" / "torch_npu" / "x.csv")
    profiler = tmp_path / "modules" / "torch_npu" / "profiler.py"
    profiler.write_text(PROFILER.replace("    on_trace_ready(None)\n", ""))
    done = script("eval_performance", "--config", config, "--random-weights", "0", "--devices", "npu:0", "--profile",
                  "--iterations", "1", "--warm-up", "1", "--output-dir", tmp_path / "out",
                  "--set", "runtime.preload='off'", environment=torch_npu)  # fmt: skip
    assert done.returncode == 2
    assert "npu:0: torch_npu's profiler has written no kernel_details.csv" in done.stderr


@pytest.mark.slow
def test_a_cpus_operators_are_those_of_torchs_profiler(config, read_report, tmp_path) -> None:
    code = performance.main([
        "--config", str(config), "--random-weights", "0", "--devices", "cpu:0", "--profile", "4", "1", "--iterations",
        "2", "--warm-up", "1", "--set", "runtime.threads=1", "--output-dir", str(tmp_path),
    ])  # fmt: skip
    assert code == 0
    profile = read_report(tmp_path, "performance", logs.write_performance)["profile"]
    assert [row["batch"] for row in profile["batches"]] == [1, 4]
    assert all(row["ms"] > 0 and row["calls"] > 100 for row in profile["batches"])
    for number in range(2):
        assert sum(row["cells"][number]["share_percent"] for row in profile["operators"]) == pytest.approx(100)
    assert any("conv" in row["operator"] for row in profile["operators"])


@pytest.mark.parametrize("arguments", [
    ["--engine", "timed", "--profile"],
    ["--config", "x.yaml", "--random-weights", "0", "--profile", "1", "2", "4"],
    ["--config", "x.yaml", "--random-weights", "0", "--profile", "0"],
])  # fmt: skip
def test_what_cannot_be_profiled_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        performance.main(["--devices", "cpu:0", *arguments])
    assert ended.value.code == 2
