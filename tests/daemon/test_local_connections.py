"""More local connections than descriptors: the daemon serves those that fit, and outlives the rest."""
from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import psutil
import pytest
import zmq

from blendmaskd.protocol import GetStats, encode
from blendmaskd.shell.descriptors import MOST_REGIONS, most_connections, most_regions, needed

IMAGE = np.zeros((48, 64, 3), np.uint8)
FILES = 80  # of which eight connections are left


@pytest.fixture
def few(daemon: Any) -> Any:
    """A daemon that takes eight connections."""
    return daemon(devices=["cpu:0"], files=FILES)


def _connect(running: Any) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(running.endpoint.removeprefix("ipc://"))
    return connection


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        while connection.recv(4096):
            pass
        return True
    return False


def test_the_oldest_silent_connection_makes_room(few: Any, wait_until: Any) -> None:
    client = few.client
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(_connect(few)) for _ in range(2 * most_connections(FILES))]
        wait_until(lambda: _is_closed(silent[0]))
        assert client.segment(IMAGE).width == 64
        assert few.connect().segment(IMAGE).width == 64
    wait_until(lambda: "were too many at once" in few.log, 30)


def test_clients_beyond_the_bound_wait_until_there_is_room(few: Any, wait_until: Any) -> None:
    clients = [few.connect() for _ in range(most_connections(FILES) - 1)]  # the fixture has one
    for client in clients:
        assert client.segment(IMAGE).width == 64
    late = few.connect(timeout_s=1.0)
    with pytest.raises(TimeoutError, match="closed the connection"):
        late.segment(IMAGE)
    assert clients[0].segment(IMAGE).width == 64
    clients[-1].close()
    late.timeout_s = 20.0
    assert late.segment(IMAGE).width == 64


def test_a_crowd_that_speaks_is_served_as_far_as_it_fits(few: Any, wait_until: Any) -> None:
    with zmq.Context() as context, contextlib.ExitStack() as stack:
        crowd = []
        for _ in range(100):
            dealer = stack.enter_context(context.socket(zmq.DEALER))
            dealer.set(zmq.LINGER, 0)
            dealer.connect(few.endpoint)
            dealer.send_multipart(encode(GetStats()))
            crowd.append(dealer)
        wait_until(lambda: sum(bool(dealer.poll(0)) for dealer in crowd) >= most_connections(FILES) - 1)
        before = few.pids()["cpu:0"]
        psutil.Process(before).kill()
        wait_until(lambda: few.pids()["cpu:0"] not in (None, before), 30)
    few.wait_ready()
    assert few.connect().segment(IMAGE).width == 64


FLOOD = """
import socket, sys, time
deadline, held = time.monotonic() + 3, []
while time.monotonic() < deadline:
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].settimeout(0.5)
    try:
        held[-1].connect(sys.argv[1])
    except OSError:
        pass
    if len(held) > 3000:
        held.clear()
"""


def test_a_flood_faster_than_the_loop_does_not_end_it(few: Any) -> None:
    """ZeroMQ aborts at the limit of descriptors: it must not get there, however fast others connect."""
    client, path = few.client, few.endpoint.removeprefix("ipc://")
    client.segment(IMAGE)
    flooding = [subprocess.Popen([sys.executable, "-c", FLOOD, path]) for _ in range(2)]
    try:
        while any(each.poll() is None for each in flooding):
            assert client.segment(IMAGE).width == 64
            assert len(os.listdir(f"/proc/{few.process.pid}/fd")) < needed(FILES)
    finally:
        for each in flooding:
            each.kill()
            each.wait()
    assert few.connect().segment(IMAGE).width == 64


def test_regions_are_bounded_by_descriptors_and_images_go_by_socket_then(few: Any) -> None:
    large = np.zeros((200, 200, 3), np.uint8)
    clients = [few.connect() for _ in range(most_regions(FILES) + 2)]
    for client in clients:
        for _ in range(3):
            assert client.segment(large).width == 200
    assert few.client.stats()["regions"]["count"] <= most_regions(FILES)
    required = few.connect(transport="shared", timeout_s=5.0)
    with pytest.raises(Exception, match="no descriptors for more"):
        required.segment(large)


@pytest.mark.parametrize("files", [128, 1024, 8192, 65536, 1 << 20])
def test_all_shares_fit_beside_each_other(files: int) -> None:
    assert most_connections(files) + 2 * most_regions(files) <= files - 32
    assert 1 <= most_regions(files) <= MOST_REGIONS
