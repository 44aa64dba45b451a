"""What a worker had sent before its process exited is read whole before its jobs are taken for lost."""
from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from blendmaskd.shell.sockets import LAST_S, MESSAGES_PER_TURN, receive, receive_last

MESSAGES = 10 * MESSAGES_PER_TURN
SEND = """
import os, sys, zmq
context = zmq.Context()
socket = context.socket(zmq.DEALER)
socket.set(zmq.ROUTING_ID, b"npu:0.1")
socket.connect(sys.argv[1])
for number in range(int(sys.argv[2])):
    socket.send(b"%d" % number)
if sys.argv[3:]:  # leave a process behind that holds the connection open
    socket.recv()
    if not os.fork():
        sys.stdin.read()
    os._exit(0)
context.destroy(linger=-1)
"""


@pytest.fixture
def router(tmp_path: Path) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.LINGER, 0)
        router.bind(f"ipc://{tmp_path}/workers.sock")
        yield router


def sender(router: zmq.Socket[bytes], *arguments: str) -> subprocess.Popen[bytes]:
    """Sends so many messages and exits; what else it leaves behind ends when its stdin is closed."""
    endpoint = router.get_string(zmq.LAST_ENDPOINT)
    return subprocess.Popen([sys.executable, "-c", SEND, endpoint, *arguments], stdin=subprocess.PIPE)


def send_and_exit(router: zmq.Socket[bytes], messages: str) -> None:
    with sender(router, messages) as process:
        assert process.wait() == 0


def read(router: zmq.Socket[bytes], peer: bytes = b"npu:0.1") -> list[int]:
    return [int(frames[-1].bytes) for frames in receive_last(router, peer) if frames[0].bytes == peer]


def test_all_that_the_dead_had_sent_is_read_whatever_a_turn_reads(router: zmq.Socket[bytes]) -> None:
    send_and_exit(router, str(MESSAGES))
    assert len(list(receive(router))) == MESSAGES_PER_TURN
    assert read(router) == list(range(MESSAGES_PER_TURN, MESSAGES))


def test_more_than_zeromq_takes_in_at_a_time(router: zmq.Socket[bytes]) -> None:
    router.set(zmq.RCVHWM, 10)
    router.bind(f"{router.get_string(zmq.LAST_ENDPOINT)}.2")
    send_and_exit(router, "200")  # the host's socket holds the others
    assert read(router) == list(range(200))


def test_neighbours_are_read_too_and_a_worker_that_never_spoke_is_not_waited_for(
    router: zmq.Socket[bytes], wait_until
) -> None:
    send_and_exit(router, "3")
    wait_until(lambda: router.poll(0), 30)
    begun = time.monotonic()
    assert read(router, b"npu:1.1") == []
    assert time.monotonic() - begun < LAST_S
    assert list(receive(router)) == []


def test_a_process_left_behind_holds_nobody_up(router: zmq.Socket[bytes]) -> None:
    with sender(router, "1", "fork") as process:
        assert router.recv_multipart() == [b"npu:0.1", b"0"]
        router.send_multipart([b"npu:0.1", b"fork"])
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        begun = time.monotonic()
        assert read(router) == []
        assert LAST_S <= time.monotonic() - begun < LAST_S + 10
