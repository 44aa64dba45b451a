"""Processes that cannot be started, because the host has nothing left to start them with."""
from __future__ import annotations

import os
import resource
import signal
from typing import Any

import numpy as np
from test_launch_plan import NONE, make_plan

from blendmaskd.shell.processes import UNKNOWN_END, Child, how_it_ended

PICTURE = np.zeros((32, 32, 3), np.uint8)
LONG_S = 60.0


def test_a_worker_that_cannot_be_started_is_tried_again_while_the_others_serve(daemon: Any, wait_until: Any) -> None:
    running = daemon(restarts={"first_delay_s": 0.05, "longest_delay_s": 0.2, "give_up_after": 1000, "stop_s": 2})
    client, pid = running.client, running.process.pid
    assert client.segment(PICTURE).detections
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1
    dead = running.pids()["cpu:0"]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (in_use - 3, before[1]))
    os.kill(dead, signal.SIGKILL)
    wait_until(lambda: "cannot be started: [Errno 24] Too many open files" in running.log, LONG_S)
    assert client.segment(PICTURE).device == "cpu:1"
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    wait_until(lambda: running.pids()["cpu:0"] not in (dead, None), LONG_S)
    running.wait_ready()
    assert client.segment(PICTURE).detections


def test_an_end_that_somebody_else_was_told_of_is_no_success() -> None:
    child = Child(make_plan("cpu:0", tuple(os.sched_getaffinity(0)), os.environ, NONE, ("-c", "")))
    os.waitpid(child.process.pid, 0)
    assert child.reap() == UNKNOWN_END
    assert how_it_ended(UNKNOWN_END) == "ended, and nobody knows how"
