"""What the broker gives out: messages to workers, jobs' ends, and what others are to do."""
from __future__ import annotations

import msgspec

from blendmaskd.protocol import Code, Failed, Frames, Result, ToWorker

DURABLE = b""  # the one identity that no peer can have, whatever it claims: a ROUTER makes one up for it then


class Answered(msgspec.Struct, frozen=True):
    """A job's one answer, or why it was refused: for the client that submitted it, or `DURABLE`."""

    owner: bytes
    answer: Result | Failed
    payload: Frames = ()


class Dropped(msgspec.Struct, frozen=True):
    """A job ends without an answer: nobody waits for one, or who does is told apart."""

    job: str
    code: Code


class SendWorker(msgspec.Struct, frozen=True):
    """Send this to a worker."""

    worker: str
    message: ToWorker
    payload: Frames = ()
    durable: str = ""  # the durable job that is leased by this


class Losses(msgspec.Struct, frozen=True):
    """Workers died with this durable job."""

    job: str
    attempts: int
    losses: int


class Returned(msgspec.Struct, frozen=True):
    """This durable job is not here any more, and has no answer."""

    job: str


class Evict(msgspec.Struct, frozen=True):
    """This worker hangs: end it. `exited` follows."""

    worker: str
    reason: str


class Acquit(msgspec.Struct, frozen=True):
    """An image, not this device, is to blame for a death that was counted against it."""

    device: str


Action = Answered | Dropped | SendWorker | Evict | Losses | Returned | Acquit


def refused(job: str, code: Code, reason: str, retry_after_s: float | None = None) -> Failed:
    """A failure as a job's answer."""
    return Failed(job=job, code=code, reason=reason, retry_after_s=retry_after_s)
