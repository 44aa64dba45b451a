"""What the tests of clients share: see clients.py."""
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from clients import SLOW_MS, Peer


@pytest.fixture(scope="module")
def slow_daemon(start_daemons: Any) -> Any:
    """One device, a quarter of a second an image: what is submitted can still be waiting."""
    return start_daemons(devices=["cpu:0"], timed={"latency_ms": {1: SLOW_MS}})


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with zmq.Context.instance().socket(zmq.ROUTER) as socket:
        yield Peer(socket, f"ipc://{tmp_path}/p")
