"""What tests of this folder share: see clients.py, memory_files.py and brokers.py."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from brokers import LIMITS
from clients import SLOW_MS, Peer
from memory_files import MB, descriptors, held

from blendmaskd.core.broker import Broker


@pytest.fixture(scope="module")
def slow_daemon(start_daemons: Any) -> Any:
    """One device, a quarter of a second an image: what is submitted can still be waiting."""
    return start_daemons(devices=["cpu:0"], timed={"latency_ms": {1: SLOW_MS}})


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with zmq.Context.instance().socket(zmq.ROUTER) as socket:
        yield Peer(socket, f"ipc://{tmp_path}/p")


@pytest.fixture(scope="module")
def fast_daemon(start_daemons: Any) -> Any:
    return start_daemons(timed={"latency_ms": {1: 1}}, shared_memory_bytes=256 * MB)


@pytest.fixture
def server(fast_daemon: Any, wait_until: Any) -> Iterator[Any]:
    """A daemon that these tests share; it has nothing of a region when a test begins, and no more when it has ended."""
    wait_until(lambda: held(fast_daemon) == [])
    fast_daemon.client.stats()  # connected
    before = descriptors(fast_daemon)
    yield fast_daemon
    wait_until(lambda: len(descriptors(fast_daemon)) <= len(before), 15)


@pytest.fixture
def broker() -> Broker:
    return Broker(LIMITS)
