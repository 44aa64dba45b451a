"""The plain ZeroMQ path, as the limit of what a broker over ZeroMQ can do: not for people.

    python -m blendmaskd_workers.benchmark.bare proxy ipc:///FRONT ipc:///BACK
    python -m blendmaskd_workers.benchmark.bare poller ipc:///FRONT ipc:///BACK
    python -m blendmaskd_workers.benchmark.bare worker ipc:///BACK '[0.02179]' 20000

`zmq.proxy` between a ROUTER and a DEALER in a process of its own, and a process for each device that only sleeps:
no queue of its own, no deadlines, nobody who notices a death. The poller does in Python what the proxy does in C, which
is the least that a broker in Python can do. It takes the frames that the daemon takes and answers
with as many bytes, so the same generator loads both. The numbers are seconds by batch size, from 1 on; a batch is what
is there when the device is free. Each process prints a line when it is ready.
"""
from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import msgpack
import zmq

from blendmaskd import protocol
from blendmaskd.protocol import Result
from blendmaskd_workers import process

_OPEN_NAME = "@" * 16
Socket = zmq.Socket[bytes]


def main(argv: list[str]) -> int:
    process.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's business: it ends us
    match argv:
        case ["proxy", front, back]:
            stand_between(front, back, zmq.proxy)
        case ["poller", front, back]:
            stand_between(front, back, poll)
        case ["worker", back, seconds, answer_bytes]:
            work(back, json.loads(seconds), int(answer_bytes))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


def stand_between(front: str, back: str, pass_on: Callable[[Socket, Socket], object]) -> None:
    """Pass everything on, until killed."""
    context = zmq.Context()
    with context.socket(zmq.ROUTER) as clients, context.socket(zmq.DEALER) as workers:
        clients.bind(front)
        workers.bind(back)
        print("ready", flush=True)
        pass_on(clients, workers)


def poll(clients: Socket, workers: Socket) -> None:
    """As `zmq.proxy`, by zmq.Poller."""
    poller = zmq.Poller()
    poller.register(clients, zmq.POLLIN)
    poller.register(workers, zmq.POLLIN)
    while True:
        for source, _ in poller.poll():
            target = workers if source is clients else clients
            with contextlib.suppress(zmq.Again):
                while True:
                    target.send_multipart(source.recv_multipart(zmq.NOBLOCK, copy=False), copy=False)


def work(back: str, seconds: list[float], answer_bytes: int) -> None:
    """Answer each job with `answer_bytes` after the time that its batch takes, until killed."""
    answer = Result(job=_OPEN_NAME, width=0, height=0, device="bare", timings={})
    magic, header, payload = protocol.encode(answer, [msgpack.packb([{"padding": bytes(answer_bytes)}])])
    head, _, tail = header.partition(_OPEN_NAME.encode())
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        _connect(socket, back)
        print("ready", flush=True)
        while True:
            batch = _take(socket, len(seconds))
            if seconds[len(batch) - 1]:  # as the timed engine: sleeping for no time takes 0.08 ms
                time.sleep(seconds[len(batch) - 1])
            for client, job in batch:
                socket.send_multipart([client, magic, head + job + tail, payload], copy=False)


def _connect(socket: Socket, back: str) -> None:
    """Return when the proxy may give us jobs."""
    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    socket.connect(back)
    monitor.recv_multipart()
    socket.disable_monitor()


def _take(socket: Socket, most: int) -> list[tuple[Any, bytes]]:
    """Client and name of one job, or of as many as are here."""
    batch: list[tuple[Any, bytes]] = []
    while len(batch) < most:
        try:
            client, _, header, *_ = socket.recv_multipart(zmq.NOBLOCK if batch else 0, copy=False)
        except zmq.Again:
            break
        batch.append((client, msgpack.unpackb(header.buffer)["job"].encode()))
    return batch


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
