"""What the host is asked before a start, and that real processes get what their plan says."""
from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from test_launch_plan import NONE, make_plan

from blendmaskd import topology
from blendmaskd.core.launch_plan import LaunchPlan, Preload
from blendmaskd.shell import launch
from blendmaskd.topology import HostError
from blendmaskd.wanted import Actual, Wanted, differences
from blendmaskd_workers import process

OBSERVER = (
    "import os, msgspec; from blendmaskd import assignment; from blendmaskd.wanted import differences;"
    "from blendmaskd_workers.process import observe; wanted = assignment.read(os.environ).wanted;"
    "actual = observe(wanted, None); print(msgspec.json.encode([actual, differences(wanted, actual, ())]).decode())"
)

# ---------------------------------------------------------------------------------------------------- preload


@pytest.fixture
def library() -> str:
    """A shared library of this machine that Python does not load by itself; it stands in for tcmalloc."""
    for folder in launch.LIBRARY_FOLDERS:
        if (folder / "libmemusage.so").exists():
            return str(folder / "libmemusage.so")
    pytest.skip("needs libmemusage.so of glibc, to preload it")


def test_tcmalloc_is_found_by_name_for_this_machine(
    tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_ldconfig", dict)
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "libtcmalloc.so.4").write_bytes(b"\x7fELF\x01\x01" + bytes(14))  # of another word size
    assert launch.resolve_preload("auto", [empty, full]).path is None
    (full / "libtcmalloc_minimal.so.4").symlink_to(library)
    assert launch.resolve_preload("auto", [empty, full]) == Preload(str(full / "libtcmalloc_minimal.so.4"))
    assert launch.resolve_preload("required", [empty, full]).path == str(full / "libtcmalloc_minimal.so.4")
    (full / "libtcmalloc.so.4").unlink()
    (full / "libtcmalloc.so.4").symlink_to(library)
    assert launch.resolve_preload("auto", [empty, full]).path == str(full / "libtcmalloc.so.4")


def test_ld_sos_cache_is_asked_first() -> None:
    listed = launch._ldconfig()
    assert any(path.exists() for path in listed["libc.so.6"])


def test_a_missing_tcmalloc_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_ldconfig", dict)
    assert "libtcmalloc-minimal4" in launch.resolve_preload("auto", [tmp_path]).reason
    with pytest.raises(HostError, match=r"required.*libtcmalloc-minimal4.*gperftools-libs"):
        launch.resolve_preload("required", [tmp_path])
    with pytest.raises(HostError, match=r"/nowhere/libtcmalloc\.so: no such library.*libtcmalloc-minimal4"):
        launch.resolve_preload("/nowhere/libtcmalloc.so")
    assert launch.resolve_preload("off") == NONE


@pytest.mark.parametrize("folder", ["with spaces", "a:b"])
def test_a_library_that_ld_so_would_look_for_elsewhere_is_refused(library: str, tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    copy = shutil.copy(library, tmp_path / folder)
    with pytest.raises(HostError, match=r"ld\.so takes a space or colon for the end of a path"):
        launch.resolve_preload(str(copy))


def test_a_named_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_text("GROUP ( libtcmalloc.so.4 )")
    with pytest.raises(HostError, match="no such library for this machine"):
        launch.resolve_preload(str(tmp_path / "lib.so"))


# ---------------------------------------------------------------------------------------------------- real processes


@pytest.fixture
def one_cpu() -> int:
    return max(os.sched_getaffinity(0))


def observe(plan: LaunchPlan) -> tuple[Actual, list[str]]:
    running = launch.launch(plan, stdout=subprocess.PIPE)
    output, _ = running.communicate(timeout=30)
    assert running.returncode == 0
    return msgspec.json.decode(output, type=tuple[Actual, list[str]])


def test_a_worker_has_what_its_plan_wants(one_cpu: int, library: str) -> None:
    before = os.sched_getaffinity(0)
    plan = make_plan(
        "npu:1", (one_cpu,), os.environ, Preload(library), ("-c", OBSERVER), worker_env={"SOME_VARIABLE": "x"}
    )
    actual, differences = observe(plan)
    assert differences == []
    assert actual.cpus == str(one_cpu)
    assert actual.preload == library
    assert actual.env["SOME_VARIABLE"] == "x"
    assert os.sched_getaffinity(0) == before


def test_a_worker_says_where_it_differs(one_cpu: int) -> None:
    spoilt = (
        "import os; os.environ['TASK_QUEUE_ENABLE'] = '0'; os.environ.pop('OMP_NUM_THREADS');"
        f"os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))});" + OBSERVER
    )
    plan = make_plan("npu:1", (one_cpu,), os.environ, NONE, ("-c", spoilt))
    _, differences = observe(plan)
    text = "\n".join(differences)
    assert "task_queue: wanted 2, is 0" in text
    assert "TASK_QUEUE_ENABLE: wanted '2', is '0'" in text
    assert "threads: wanted 1, is None" in text
    assert ("thread main runs on CPUs" in text) == (len(os.sched_getaffinity(0)) > 1)


def test_threads_with_a_mask_of_their_own_are_named() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    pinned = (
        "import os, threading; pinned, end = threading.Event(), threading.Event()\n"
        f"def run(): os.sched_setaffinity(0, [{cpus[0]}]); pinned.set(); end.wait(30)\n"
        f"threading.Thread(target=run).start(); pinned.wait(30)\n{OBSERVER}\nend.set()"
    )
    actual, differences = observe(make_plan("cpu:0", tuple(cpus), os.environ, NONE, ("-c", pinned)))
    assert (actual.cpus, differences) == (topology.format_cpus(cpus), [])
    assert list(actual.thread_cpus.values()) == [str(cpus[0])]


def test_a_library_that_was_not_preloaded_is_reported(one_cpu: int, library: str) -> None:
    plan = make_plan("cpu:0", (one_cpu,), os.environ, Preload(library), ("-c", OBSERVER))
    without = {name: value for name, value in plan.environment.items() if name != "LD_PRELOAD"}
    actual, differences = observe(dataclasses.replace(plan, environment=without))
    assert actual.preload is None
    assert f"preload: wanted {library}, is None" in differences


def test_narrower_is_as_wanted_only_with_affinity_conf() -> None:
    wanted = Wanted(cpus="0-3", threads=4, task_queue=None, preload=None, env={})
    actual = Actual(**{**msgspec.to_builtins(wanted), "cpus": "0-1"}, thread_cpus={"acl_thread/7": "2"})
    assert differences(wanted, actual, ()) == ["CPUs 2-3 of 0-3 are not used"]
    wanted, actual = (msgspec.structs.replace(one, env={"CPU_AFFINITY_CONF": "1"}) for one in (wanted, actual))
    assert differences(wanted, actual, ()) == []
    actual = msgspec.structs.replace(actual, thread_cpus={"acl_thread/7": "3-4"})
    assert differences(wanted, actual, ()) == ["thread acl_thread/7 runs on CPUs 3-4, outside 0-3"]


def test_launching_from_a_thread_leaves_the_others_alone(one_cpu: int) -> None:
    """The starting thread's mask, not the process's, is what changes, and only for the start."""
    before = process.thread_masks()
    plan = make_plan("cpu:0", (one_cpu,), os.environ, NONE, ("-c", OBSERVER))
    seen: list[Actual] = []
    thread = threading.Thread(target=lambda: seen.append(observe(plan)[0]))
    thread.start()
    thread.join(30)
    assert seen[0].cpus == str(one_cpu)
    assert before.items() <= process.thread_masks().items()  # the joined thread may still be ending


def test_nothing_is_imported_from_the_working_directory(
    one_cpu: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor by an empty entry of PYTHONPATH, as CANN's set_env.sh leaves one where there was none."""
    for name in ("blendmaskd_workers", "msgspec", "queue"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('somebody else\'s {name}')")
    monkeypatch.chdir(tmp_path)
    for path in (None, ":", f"{tmp_path / 'nothing'}:", "."):
        base = {**os.environ, "PYTHONPATH": path} if path else os.environ
        plan = make_plan("cpu:0", (one_cpu,), base, NONE)
        running = launch.launch(plan, stderr=subprocess.PIPE)
        _, said = running.communicate(timeout=30)
        assert ("somebody else" in said.decode()) == (path == "."), "but where the operator says so"


def test_a_plan_follows_the_cpus_that_this_process_may_use_now() -> None:
    code = """
import dataclasses, os
from blendmaskd import settings
from blendmaskd.shell import launch
cpus = sorted(os.sched_getaffinity(0))
both = launch.basis(settings.from_tree({"devices": ["cpu:0", "cpu:1"]}))
named = {"cpu:0": str(cpus[0]), "cpu:1": f"{cpus[0]},{cpus[1]}"}
placed = launch.basis(settings.from_tree({"devices": ["cpu:0", "cpu:1"], "runtime": {"cpus": named}}))
os.sched_setaffinity(0, cpus[1:2])
assert set(launch.follow_host(both).cpus.values()) == {(cpus[1],)}, "shrunk"
assert set(launch.follow_host(placed).cpus.values()) == {(cpus[1],)}, "what is left of it, and what is left at all"
os.sched_setaffinity(0, cpus)
assert launch.follow_host(both) == both, "as before"
small = dataclasses.replace(both, available=cpus[:1], cpus=dict.fromkeys(both.cpus, cpus[:1]))
assert launch.follow_host(small).cpus == both.cpus, "grown"
"""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpus_that_do_not_exist_stop_the_launch() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(HostError, match="npu:1: cannot run on CPUs 900-901"):
        launch.launch(make_plan("npu:1", (900, 901)))
    assert os.sched_getaffinity(0) == before


def test_a_program_that_cannot_be_started_leaves_the_mask(one_cpu: int) -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(OSError, match="nowhere"):
        launch.launch(dataclasses.replace(make_plan("cpu:0", (one_cpu,)), argv=("/nowhere",)))
    assert os.sched_getaffinity(0) == before


def test_every_thread_of_this_process_has_a_mask() -> None:
    masks = process.thread_masks()
    assert len(masks) == len(list(Path("/proc/self/task").iterdir()))
    assert topology.format_cpus(os.sched_getaffinity(0)) in masks.values()
