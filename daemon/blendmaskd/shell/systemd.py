"""What systemd is told: sd_notify(3) in a few lines, so that no dependency is needed for one datagram."""
from __future__ import annotations

import os
import socket
import time


class Notifier:
    """Sends notifications to `NOTIFY_SOCKET`; does nothing where there is none."""

    def __init__(self, address: str | None) -> None:
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self._unsent: dict[str, str] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None

    def send(self, **fields: str) -> None:
        """One notification, such as ``READY="1", STATUS="..."``. Never waits: what a manager that does not read has no
        room for goes with the next one. A lost one is not worth a crash.
        """
        if self._socket is None or self._address is None:
            return
        self._unsent |= fields
        text = "\n".join(f"{name}={value}" for name, value in self._unsent.items())
        try:
            self._socket.sendto(text.encode(), socket.MSG_DONTWAIT, self._address)
        except BlockingIOError:
            return
        except OSError:
            pass
        self._unsent = {}

    def reloading(self) -> None:
        self.send(RELOADING="1", MONOTONIC_USEC=str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000))


def from_environment() -> Notifier:
    """The notifier of this process's manager."""
    return Notifier(os.environ.get("NOTIFY_SOCKET"))
