"""Admission: whether a message is taken from who sent it. Of each frame it gives a verdict, and says who is to go.

One object for all that guards the clients' socket: the gate of tcp:// endpoints, keys and identities, departures.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Container

import zmq

from blendmaskd.shell.admission.access import AllowedKeys, Identities, Verdict
from blendmaskd.shell.admission.departures import Departures
from blendmaskd.shell.admission.gate import Gate

log = logging.getLogger("blendmaskd")

REFUSED_S = 10.0  # between two lines about connections that were turned away


class Admission:
    """`gate` is None without tcp:// endpoints, `departures` with them, `allowed` where no keys are needed.

    `has_jobs` says whether an identity waits for an answer.
    """

    def __init__(
        self, gate: Gate | None, departures: Departures | None, allowed: AllowedKeys | None,
        has_jobs: Callable[[bytes], bool],
    ) -> None:  # fmt: skip
        self._gate = gate
        self._departures = departures
        self._identities = Identities(allowed, has_jobs) if allowed is not None else None
        self._report_refused_at = 0.0
        self.sockets = [*(gate.sockets if gate else ()), *([departures.socket] if departures else ())]
        if gate is not None and allowed is None:
            log.warning("insecure_tcp: anyone who can reach the tcp endpoint can submit jobs and read the traffic")
        elif allowed is not None and not allowed.names:
            log.warning("no client can connect over tcp yet: %s holds no keys", allowed.folder)

    def judge(self, client: bytes, frame: zmq.Frame) -> Verdict:
        """Of a message: its sender's identity and last frame. The connection of an unknown key is closed."""
        if self._departures is not None:
            self._departures.heard(client, frame)
        if self._gate is None:
            return Verdict.WELCOME
        user = self._gate.user(frame)
        verdict = Verdict.WELCOME if self._identities is None else self._identities.judge(client, user)
        if verdict is Verdict.UNKNOWN:
            self._gate.close(frame)  # the handshake of its next connection tells it why
        return verdict

    def left(self) -> list[bytes]:
        """Clients that have left; to be called in each turn, before any client is heard."""
        return self._departures.take() if self._departures is not None else []

    def receive(self, readable: Container[object]) -> list[bytes]:
        """Answer who wants to connect. Returns the clients that may not be here any more: their keys are gone."""
        if self._gate is None or not any(socket in readable for socket in self._gate.sockets):
            return []
        self._gate.receive()
        return self._shut_out(self._gate)

    def tick(self, now: float) -> list[bytes]:
        """What is due each second. Returns what `receive` does."""
        if self._gate is None:
            return []
        self._gate.refresh()
        shut_out = self._shut_out(self._gate)
        if self._identities is not None:
            self._identities.forget_idle()
        if now >= self._report_refused_at and (refused := self._gate.take_refused()):
            self._report_refused_at = now + REFUSED_S
            log.warning("tcp connections rejected: %s", refused)
        return shut_out

    def _shut_out(self, gate: Gate) -> list[bytes]:
        shut_out: list[bytes] = []
        for change in gate.take_changes():
            for complaint in change.complaints:
                log.error("curve.client_keys: %s", complaint)
            for name in change.added.values():
                log.info("client key %s: may connect", name)
            for name in change.removed.values():
                log.info("client key %s: shut out", name)
            shut_out += self._identities.of(change.removed) if self._identities is not None else []
        return shut_out
