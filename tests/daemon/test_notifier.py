"""What systemd is told, where it does not read for a while."""
from __future__ import annotations

import contextlib
import socket
import tempfile

from blendmaskd.shell.systemd import Notifier


def test_a_manager_that_does_not_read_makes_nobody_wait_and_misses_nothing_that_lasts() -> None:
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder, contextlib.ExitStack() as closing:
        manager = closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
        manager.bind(f"{folder}/notify")
        notifier = Notifier(f"{folder}/notify")
        assert notifier._socket is not None
        closing.enter_context(contextlib.closing(notifier._socket))
        for number in range(2000):  # its queue has a few hundred places
            notifier.send(WATCHDOG="1", STATUS=f"{number}")
        notifier.send(READY="1")
        told = []
        with contextlib.suppress(BlockingIOError):
            while True:
                told.append(manager.recv(4096).decode())
        assert 0 < len(told) < 2000
        assert not any("READY" in text for text in told)
        notifier.send(STATUS="the last")
        assert set(manager.recv(4096).decode().splitlines()) == {"WATCHDOG=1", "READY=1", "STATUS=the last"}
        notifier.send(WATCHDOG="1")
        assert manager.recv(4096) == b"WATCHDOG=1"
        manager.close()
        notifier.send(STATUS="to nobody")
