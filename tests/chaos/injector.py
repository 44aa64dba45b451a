"""The injector: which fault comes when. Pure: the same seed gives the same faults at the same times.

=============  =====================================================================================
kill           kill -9 of a worker
stop           SIGSTOP of a worker: the daemon notices its silence, and replaces it
pause          SIGSTOP, and SIGCONT a moment later
crash          an image that crashes the decoder (SIGSEGV)
poison         an image that kills the worker on its device
exit           an image on which the worker exits in the middle of a run
raise          an image on which the engine raises
hang           an image on which the device hangs
bad-image      bytes that are no image
device         a device that dies and cannot start again, until it is repaired and the daemon reloads
reload         SIGHUP, with good settings
bad-reload     SIGHUP, with settings that are wrong
vanish         a client that leaves with thirty jobs in flight
mute           a client that sends two thousand jobs and never reads
flood          a client that sends four hundred jobs at once
=============  =====================================================================================
"""
from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WORKER_FAULTS = ("kill", "stop", "pause", "device")
IMAGE_FAULTS = ("crash", "poison", "exit", "raise", "hang", "bad-image")
DAEMON_FAULTS = ("reload", "bad-reload")
CLIENT_FAULTS = ("vanish", "mute", "flood")
KINDS = (*WORKER_FAULTS, *IMAGE_FAULTS, *DAEMON_FAULTS, *CLIENT_FAULTS)


@dataclass(frozen=True, slots=True)
class Fault:
    """`at` seconds after the beginning; `device` is its number, where it is of one."""

    at: float
    kind: str
    device: int


def faults(seed: int, kinds: Sequence[str], devices: int, mean_s: float) -> Iterator[Fault]:
    """Without end, at random times `mean_s` apart on average; each kind once before any comes again."""
    chance = random.Random(seed)
    at = 0.0
    while kinds:
        for kind in chance.sample(kinds, len(kinds)):
            at += chance.expovariate(1 / mean_s)
            yield Fault(at, kind, chance.randrange(devices))
