"""Faults on real processes under load: every accepted job gets exactly one answer, and service goes on.

A `scene` checks after each: see conftest.py. Twenty times in a row:
``for n in $(seq 20); do python -m pytest -q tests/faults || break; done``
"""
from __future__ import annotations

import ast
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import psutil
import pytest
import zmq
from raw_load import LONG_S, QUICK_RESTARTS, answer, picture, submission

from blendmaskd.client.blocking import Client, JobFailed
from blendmaskd.protocol import Code, Failed
from chaos.poison import Poison, worker_env
from checkout import ROOT

FAULTY = {"worker_env": worker_env()}
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
LIMIT_BYTES = 512 << 20


# -- a worker dies ----------------------------------------------------------------------------------------------------


def test_kill_9_of_either_worker(scene, wait_until) -> None:
    with scene(max_attempts=3) as here:
        for device in ("cpu:0", "cpu:1"):
            before = here.server.pids()
            answered = here.load.answered
            wait_until(lambda answered=answered: here.load.answered > answered + 50, LONG_S)
            os.kill(before[device], signal.SIGKILL)
            wait_until(lambda d=device, pid=before[device]: here.server.pids()[d] not in (pid, None), LONG_S)
            here.server.wait_ready()
            images = here.server.devices()[device]["images"]
            wait_until(lambda d=device, n=images: here.server.devices()[d]["images"] > n + 20, LONG_S)
    assert here.load.failures == []
    assert {name: d["restarts"] for name, d in here.server.devices().items()} == {"cpu:0": 1, "cpu:1": 1}


@pytest.mark.slow
def test_a_real_time_signal_ends_a_worker_only(scene, wait_until) -> None:
    with scene() as here:
        pid = here.server.pids()["cpu:0"]
        os.kill(pid, signal.SIGRTMIN + 3)
        wait_until(lambda: here.server.pids()["cpu:0"] not in (pid, None), LONG_S)
        assert "killed by signal 37" in here.server.log
    assert here.load.failures == []


@pytest.mark.slow
def test_a_stopped_worker_is_silent_then_replaced(scene, wait_until) -> None:
    with scene(restarts={**QUICK_RESTARTS, "stall_s": 6}) as here:
        pid = here.server.pids()["cpu:1"]
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: here.server.states()["cpu:1"] == "silent", LONG_S)
        assert here.server.get("/readyz")[1].startswith("degraded")
        wait_until(lambda: here.server.pids()["cpu:1"] not in (pid, None), LONG_S)
    assert here.load.failures == []


@pytest.mark.slow
def test_a_pause_of_the_whole_host_costs_no_worker(scene, wait_until) -> None:
    """All processes stand still for longer than `stall_s`, in the midst of jobs, as in a virtual machine's snapshot."""
    with scene(timed={"latency_ms": {1: 300}}, restarts={**QUICK_RESTARTS, "stall_s": 2}) as here:
        pids = here.server.pids()
        for _ in range(2):
            answered = here.load.answered
            wait_until(lambda answered=answered: here.load.answered > answered + 4, LONG_S)
            everyone = here.server.processes()
            for process in everyone:
                process.suspend()
            paused = time.monotonic()
            wait_until(lambda paused=paused: time.monotonic() > paused + 4)
            for process in everyone:
                process.resume()
        wait_until(lambda: here.server.log.count("stood still") >= 2)
    assert here.load.failures == []
    assert here.server.pids() == pids


@pytest.mark.parametrize("poison", [Poison.CRASHES_DECODING, Poison.KILLS, Poison.EXITS],
                         ids=["crash in the decoder", "kill on the device", "exit code"])  # fmt: skip
def test_a_poison_image_fails_alone_and_by_name(scene, poison) -> None:
    with scene(**FAULTY) as here, Client(here.server.endpoint, timeout_s=LONG_S) as client:
        with pytest.raises(JobFailed) as failed:
            client.segment(picture(poison))
        assert failed.value.code is Code.WORKER_LOST
        how = "exited with code 3" if poison is Poison.EXITS else "killed by SIG"
        assert how in failed.value.reason
        assert "this image was on a worker that died" in failed.value.reason
    assert here.load.failures == []


@pytest.mark.slow
def test_the_window_mates_of_a_poison_image_lose_nothing(scene) -> None:
    """They are in its very batch: started on the worker that it kills."""
    with scene(**FAULTY, batch=4, max_wait_ms=50, timed={"latency_ms": {1: 5, 4: 10}}, max_attempts=3) as here:
        with contextlib.closing(here.server.dealer()) as dealer:
            dealer.rcvtimeo = int(LONG_S * 1000)
            for number in range(16):
                pixels = picture(Poison.KILLS if number == 5 else 64, seed=number)
                dealer.send_multipart(submission(str(number), pixels))
            answers = [answer(dealer.recv_multipart()) for _ in range(16)]
        failed = [each for each in answers if isinstance(each, Failed)]
        assert [(each.job, each.code) for each in failed] == [("5", Code.WORKER_LOST)]
        assert sorted(int(each.job) for each in answers) == list(range(16))
    assert here.load.failures == []


@pytest.mark.slow
def test_a_hung_worker_is_aborted_with_its_stacks(scene) -> None:
    restarts = {**QUICK_RESTARTS, "stall_s": 5}
    with scene(**FAULTY, restarts=restarts) as here:
        with Client(here.server.endpoint, timeout_s=LONG_S) as client, pytest.raises(JobFailed) as failed:
            client.segment(picture(Poison.HANGS))
        assert failed.value.code is Code.WORKER_LOST
    assert here.load.failures == []
    assert "in faulty_launch" in here.server.log, "no stack dump"


@pytest.mark.slow
def test_memory_that_a_limit_refuses_costs_the_image_only(scene) -> None:
    """RLIMIT_AS: the engine sees MemoryError, and its worker lives on."""
    with scene(**FAULTY) as here:
        pids = here.server.pids()
        for pid in pids.values():
            limit = psutil.Process(pid).memory_info().vms + (512 << 20)
            resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(JobFailed, match="MemoryError") as failed:
            here.server.client.segment(picture(Poison.EATS_MEMORY))
        assert failed.value.code is Code.ENGINE_FAILED
    assert here.load.failures == []
    assert here.server.pids() == pids


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of its own with a limit of memory, as systemd's MemoryMax= makes one."""
    group = _memory_group()
    if group is None:
        pytest.skip("needs the right to make a control group with a memory limit (root)")
    yield group
    group.rmdir()


@pytest.mark.slow
def test_out_of_memory_kills_the_worker_and_fails_the_image(memory_group, scene) -> None:
    with scene(**FAULTY) as here, Client(here.server.endpoint, timeout_s=LONG_S) as client:
        for process in here.server.processes():
            (memory_group / "cgroup.procs").write_text(str(process.pid))
        with pytest.raises(JobFailed, match="killed by SIGKILL") as failed:
            client.segment(picture(Poison.EATS_MEMORY))
        assert failed.value.code is Code.WORKER_LOST
    assert here.load.failures == []


# -- the engine fails -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_engine_that_raises_fails_that_image_only(scene) -> None:
    with scene(**FAULTY, batch=2, timed={"latency_ms": {1: 5, 2: 8}}) as here:
        pids = here.server.pids()
        with pytest.raises(JobFailed, match="not to the engine's taste"):
            here.server.client.segment(picture(Poison.RAISES))
    assert here.load.failures == []
    assert here.server.pids() == pids


@pytest.mark.slow
@pytest.mark.parametrize("latency_ms", [5, 0], ids=["on the device's thread", "on the main thread"])
def test_an_engine_that_only_raises_is_started_anew(daemon, wait_until, latency_ms) -> None:
    server = daemon(**FAULTY, devices=["cpu:0"], timed={"latency_ms": {1: latency_ms}})
    pid = server.pids()["cpu:0"]
    for _ in range(3):
        assert server.client.segment(picture()).detections
    for _ in range(3):
        with pytest.raises(JobFailed, match="not to the engine's taste"):
            server.client.segment(picture(Poison.RAISES))
    wait_until(lambda: server.pids()["cpu:0"] not in (pid, None), LONG_S)
    server.wait_ready()
    assert server.client.segment(picture()).detections


# -- a device is gone for good ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("code", "reason"), [(70, "died 2 times in a row"), (78, "cannot boot")])
def test_a_device_that_dies_for_good_is_done_without_until_a_reload(
    scene, wait_until, tmp_path, code, reason
) -> None:
    restarts = {**QUICK_RESTARTS, "give_up_after": 2}
    with scene(worker_env=worker_env(tmp_path), restarts=restarts) as here:
        (tmp_path / "cpu:1").write_text(str(code))
        os.kill(here.server.pids()["cpu:1"], signal.SIGKILL)
        wait_until(lambda: here.server.states()["cpu:1"] == "failed", LONG_S)
        snapshot = here.server.client.stats()
        assert (snapshot["degraded"], snapshot["serving"]) == (True, 1)
        assert reason in here.server.devices()["cpu:1"]["reason"]
        for page in ("/readyz", "/healthz"):
            status, body = here.server.get(page)
            assert (status, body.startswith("degraded")) == (200, True)
        answered = here.load.answered
        wait_until(lambda: here.load.answered > answered + 50, LONG_S)
        (tmp_path / "cpu:1").unlink()
        here.server.process.send_signal(signal.SIGHUP)
        here.server.wait_ready()
    assert here.load.failures == []


@pytest.mark.slow
def test_when_all_devices_are_gone_everything_is_answered_unavailable(scene, wait_until, tmp_path) -> None:
    with scene(worker_env=worker_env(tmp_path), restarts={**QUICK_RESTARTS, "give_up_after": 1}) as here:
        for device, pid in here.server.pids().items():
            (tmp_path / device).write_text("78")
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: set(here.server.states().values()) == {"failed"}, LONG_S)
        assert here.server.get("/readyz")[0] == here.server.get("/healthz")[0] == 503
        wait_until(lambda: here.load.failures, LONG_S)
        here.load.end()
        for device in here.server.pids():
            (tmp_path / device).unlink()
        here.server.process.send_signal(signal.SIGHUP)
        here.server.wait_ready()
    assert {failure.code for failure in here.load.failures} <= {Code.UNAVAILABLE, Code.WORKER_LOST}


# -- clients misbehave ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_jobs_of_a_client_that_left_are_cancelled(scene, wait_until) -> None:
    with scene(timed={"latency_ms": {1: 100}}) as here:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.connect(here.server.endpoint)
            for number in range(200):  # ten seconds of work
                socket.send_multipart(submission(str(number), picture()))
            wait_until(lambda: here.server.client.stats()["queue"]["jobs"] > 100, LONG_S)
        wait_until(lambda: here.server.client.stats()["failures"].get("cancelled", 0) > 100, LONG_S)
        wait_until(lambda: here.server.client.stats()["queue"]["jobs"] < 10, LONG_S)
    assert here.load.failures == []


@pytest.mark.slow
def test_clients_with_a_job_each_that_leave_together_cost_no_device_time(scene, wait_until) -> None:
    """No answer is under way to any of them that could say so: their connections do."""
    with scene(timed={"latency_ms": {1: 100}}) as here:
        with zmq.Context() as context, contextlib.ExitStack() as sockets:
            leaving = [sockets.enter_context(context.socket(zmq.DEALER)) for _ in range(100)]
            for socket in leaving:
                socket.connect(here.server.endpoint)
                socket.send_multipart(submission("the only one", picture()))
            wait_until(lambda: here.server.client.stats()["queue"]["jobs"] > 50, LONG_S)
        wait_until(lambda: here.server.client.stats()["failures"].get("cancelled", 0) > 50, LONG_S)
    assert here.load.failures == []


VANISHING = """
import sys
import numpy as np
from blendmaskd.client.blocking import Client
client = Client(sys.argv[1], transport=sys.argv[2])
images = (np.full((256, 256, 3), n % 256, np.uint8) for n in range(10_000))
for number, _ in enumerate(client.map(images, window=32)):
    if number == 20:
        print("busy", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["socket", "shared"])
def test_clients_that_are_killed_leave_nothing_behind(scene, wait_until, transport) -> None:
    with scene(timed={"latency_ms": {1: 20}}) as here:
        argv = [sys.executable, "-c", VANISHING, here.server.endpoint, transport]
        clients = [subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == b"busy\n"
            client.kill()
            client.communicate()
        wait_until(lambda: here.server.client.stats()["failures"].get("cancelled", 0) >= 20, LONG_S)
    assert here.load.failures == []


@pytest.mark.slow
def test_a_client_that_never_reads_costs_its_own_jobs_only(scene, wait_until) -> None:
    """Its answers fill the daemon's bounded buffer for it, and then nothing more is done for it."""
    with scene(timed={"latency_ms": {1: 1}}) as here, zmq.Context() as context:
        frames = [submission(str(number), picture(16)) for number in range(20_000)]
        with context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.rcvhwm = 1
            socket.connect(here.server.endpoint)
            socket.sndtimeo = 1000  # ms; once it is cut off, nobody takes what it sends
            with contextlib.suppress(zmq.Again):
                for each in frames:
                    socket.send_multipart(each)
            wait_until(lambda: "does not read its answers" in here.server.log, LONG_S)
            answered = here.load.answered
            wait_until(lambda: here.load.answered > answered + 50, LONG_S)
        assert here.server.log.count("does not read its answers") < 100, "it floods the log as well"
    assert {failure.code for failure in here.load.failures} <= {Code.BUSY}


@pytest.mark.slow
def test_a_flood_is_answered_busy_at_once(scene) -> None:
    """600 images of 0.6 MB; what is refused is not kept."""
    with scene(queue={"max_jobs": 32}, timed={"latency_ms": {1: 50}}) as here:
        pixels = picture(4096)
        with contextlib.closing(here.server.dealer()) as dealer:
            dealer.rcvtimeo = int(LONG_S * 1000)
            for number in range(600):
                dealer.send_multipart(submission(str(number), pixels))
            answers = [answer(dealer.recv_multipart()) for _ in range(600)]
        codes = Counter(each.code if isinstance(each, Failed) else "answered" for each in answers)
        assert codes.keys() == {Code.BUSY, "answered"}
        assert codes["answered"] >= 12
        assert len({each.job for each in answers}) == 600
        assert all(each.retry_after_s for each in answers if isinstance(each, Failed))
    assert {failure.code for failure in here.load.failures} <= {Code.BUSY}


# -- the clock --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wall_clock_that_jumps_changes_nothing(scene, wait_until, tmp_path) -> None:
    """libfaketime moves CLOCK_REALTIME of daemon and workers while they serve; CLOCK_MONOTONIC it leaves alone."""
    if not FAKETIME.exists():
        pytest.skip(f"needs Debian's libfaketime: {FAKETIME}")
    offset = tmp_path / "offset"
    offset.write_text("+0")
    environment = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1",
                   "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}  # fmt: skip
    day_s = 86400.0
    instant = {"latency_ms": {1: 0}}  # the engine does not sleep: libfaketime 0.9.10 breaks Python's time.sleep
    with scene(environment=environment, timed=instant, restarts={**QUICK_RESTARTS, "stall_s": 10}) as here:
        pids = here.server.pids()
        for jump, days in (("-30d", -30), ("+365d", 365), ("+0", 0)):
            before = here.server.client.stats()
            offset.write_text(jump)
            answered = here.load.answered

            def jumped(days: int = days, before: dict[str, Any] = before) -> bool:
                now = here.server.client.stats()
                return now["seq"] > before["seq"] + 1 and abs(now["time"] - time.time() - days * day_s) < day_s / 2

            wait_until(jumped, LONG_S)
            wait_until(lambda answered=answered: here.load.answered > answered + 100, LONG_S)
            assert set(here.server.states().values()) == {"ready"}
    assert here.load.failures == []
    assert here.server.pids() == pids


def test_no_decision_reads_the_wall_clock() -> None:
    """Of what daemon and workers load, only snapshots, with failures and readings in them, and logs tell the time."""
    code = ("import sys, blendmaskd.shell.server, blendmaskd_workers.loop, blendmaskd_workers.engines;"
            "print(*(getattr(module, '__file__', '') for name, module in sys.modules.items() if 'blendmaskd' in name))")
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [Path(name) for name in loaded.split()]
    wall = {"time", "time_ns", "localtime", "gmtime", "now", "utcnow", "today"}
    readers = set()
    for path in filter(Path.exists, paths):
        for node in ast.walk(ast.parse(path.read_text())):
            if (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in wall
                    and node.value.id in ("time", "datetime", "date")):  # fmt: skip
                readers.add(path.name)
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not wall & {name.name for name in node.names}, f"{path} imports it by name"
    assert readers == {"logs.py", "server.py", "desk.py", "npu_health.py"}


# -- the disk is full -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_stops_the_submit_program_alone(scene, small_disk, tmp_path) -> None:
    """It says so, leaves its jobs, and goes on where there is room again."""
    names = [f"{number}.png" for number in range(200)]
    for name in names:
        PIL.Image.fromarray(picture()).save(tmp_path / name)
    out = small_disk(tmp_path / "out", "64k")
    with scene() as here:
        submit = [sys.executable, ROOT / "scripts" / "submit.py", here.server.endpoint, *names, "--out", "out"]
        full = subprocess.run(submit, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert full.returncode == 4, full.stderr
        assert "No space left on device: stopped" in full.stderr
        answered = here.load.answered
        subprocess.run(["mount", "-o", "remount,size=10m", out], check=True)
        subprocess.run([*submit, "--resume"], cwd=tmp_path, capture_output=True, check=True)
        assert here.load.answered > answered
        journal = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
        images = Counter(line["image"] for line in journal if "detections" in line)
        assert images == Counter(range(len(names)))
    assert here.load.failures == []


# -- the daemon -------------------------------------------------------------------------------------------------------


def test_kill_9_of_the_daemon_leaves_no_worker(daemon, wait_until) -> None:
    server = daemon()
    assert len(server.processes()) == 3
    server.kill()
    wait_until(lambda: server.processes() == [], LONG_S)


def test_a_second_daemon_does_not_take_the_socket_over(scene) -> None:
    with scene() as here:
        second = subprocess.run(
            [sys.executable, "-m", "blendmaskd", "--settings", here.server.settings_file],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert second.returncode == 78
        assert "another daemon serves" in second.stderr
    assert here.load.failures == []


@pytest.mark.slow
def test_no_worker_can_boot_the_daemon_says_why_and_ends(daemon) -> None:
    server = daemon(wait=False, engine="native", model={"weights": "/nowhere.pth"})
    assert server.process.wait(LONG_S) == 1
    assert "/nowhere.pth" in server.log
    assert "no worker can be started" in server.log


# -- inside -----------------------------------------------------------------------------------------------------------


def _memory_group() -> Path | None:
    """A new group with a limit, of either version of control groups; None where none can be made."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        limit = {"cgroup2": "memory.max", "cgroup": "memory.limit_in_bytes"}.get(kind)
        if limit is None or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        group = Path(mount) / f"blendmaskd-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            if (group / limit).exists():
                (group / limit).write_text(str(LIMIT_BYTES))
                return group
            group.rmdir()
    return None
