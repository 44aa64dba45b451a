"""Admission: whether a message is taken from who sent it. Of each frame it gives a verdict, and says who is to go.

One object for all that guards the clients' socket: the gate, keys and identities, departures.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Container

import zmq

from blendmaskd.shell.admission.access import AllowedKeys, Identities, Verdict
from blendmaskd.shell.admission.gate import Gate

log = logging.getLogger("blendmaskd")

REFUSED_S = 10.0  # between two lines about connections that were turned away


class Admission:
    """`allowed` is None where no keys are needed. `has_jobs` says whether an identity waits for an answer."""

    def __init__(self, gate: Gate, allowed: AllowedKeys | None, has_jobs: Callable[[bytes], bool]) -> None:
        self._gate = gate
        self._identities = Identities(allowed, has_jobs) if allowed is not None else None
        self._report_refused_at = 0.0
        self.sockets = gate.sockets
        if allowed is not None and not allowed.names:
            log.warning("no client can connect over tcp yet: %s holds no keys", allowed.folder)

    def judge(self, client: bytes, frame: zmq.Frame) -> Verdict:
        """Of a message: its sender's identity and last frame. The connection of an unknown key is closed."""
        if not self._gate.heard(client, frame):
            return Verdict.OLD
        if self._identities is None:
            return Verdict.WELCOME
        verdict = self._identities.judge(client, self._gate.key(frame))
        if verdict is Verdict.UNKNOWN:
            self._gate.close(frame)  # the handshake of its next connection tells it why
        return verdict

    def close(self, frame: zmq.Frame) -> None:
        """Close the connection that this frame came by."""
        self._gate.close(frame)

    def is_operator(self, frame: zmq.Frame) -> bool:
        """Whether this came from who runs the daemon."""
        return self._gate.is_operator(frame)

    def user(self, frame: zmq.Frame) -> bytes:
        """Who runs the client that this came from."""
        return self._gate.user(frame)

    def cut_off(self, client: bytes) -> None:
        """Close its connection."""
        self._gate.cut_off(client)

    def connected(self, client: bytes) -> bool:
        """Whether it has said something, and is not known to have left."""
        return self._gate.departures.knows(client)

    def left(self, readable: Container[object], behind: Container[str]) -> list[bytes]:
        """Answer who wants to connect, and say which clients have left; to be called in each turn, before any client
        is heard. See `Gate.receive`."""
        self._gate.receive(readable, behind)
        return self._gate.departures.take()

    def next_look(self, now: float) -> float:
        """When `left` is to be asked, even if nothing is told."""
        return self._gate.next_look(now)

    def tick(self, now: float) -> list[bytes]:
        """What is due each second. Returns what `shut_out` does."""
        self._gate.refresh()
        if self._identities is not None:
            self._identities.forget_idle()
        if now >= self._report_refused_at and (refused := self._gate.take_refused()):
            self._report_refused_at = now + REFUSED_S
            log.warning("connections rejected: %s", refused)
        return self.shut_out()

    def shut_out(self) -> list[bytes]:
        """The clients that may not be here any more: their keys are gone."""
        shut_out: list[bytes] = []
        for change in self._gate.take_changes():
            for complaint in change.complaints:
                log.error("curve.client_keys: %s", complaint)
            for name in change.added.values():
                log.info("client key %s: may connect", name)
            for name in change.removed.values():
                log.info("client key %s: shut out", name)
            shut_out += self._identities.of(change.removed) if self._identities is not None else []
        return shut_out
