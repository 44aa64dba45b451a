"""What `blendmaskd.core.durable` asks of the spool, and what that replies. Pure."""
from __future__ import annotations

from collections.abc import Mapping

import msgspec

from blendmaskd.protocol import Failed, Frames, Result, Submit

Answer = Result | Failed
Owners = Mapping[bytes, int]


class Stored(msgspec.Struct, frozen=True):
    """What the spool has of a job without an answer, but for its image; and what it is told of it."""

    seq: int
    name: str
    owner: bytes
    priority: int
    size: int  # bytes of its image
    attempts: int = 0
    losses: int = 0
    leased: bool = False


class Store(msgspec.Struct, frozen=True):
    """Keep a new job; `Kept`, `Known` or `NotKept` follows."""

    job: Stored
    message: Submit
    payload: Frames


class Load(msgspec.Struct, frozen=True):
    """Give a job; `Loaded` or `NotLoaded` follows."""

    seq: int


class Mark(msgspec.Struct, frozen=True):
    """Remember this of a job. It need not outlive the host."""

    seq: int
    attempts: int
    losses: int
    leased: bool


class StoreAnswer(msgspec.Struct, frozen=True):
    """Keep a job's answer in the place of its image; `AnswerKept` follows, however long it takes."""

    seq: int
    answer: Answer
    payload: Frames


class Look(msgspec.Struct, frozen=True):
    """Give the answer of this name; `Looked` follows."""

    client: bytes
    name: str


class Erase(msgspec.Struct, frozen=True):
    """Keep nothing of this name; `Erased` follows."""

    client: bytes
    name: str


Request = Store | Load | Mark | StoreAnswer | Look | Erase


class Kept(msgspec.Struct, frozen=True):
    """The job is on the disk."""

    seq: int


class Known(msgspec.Struct, frozen=True):
    """The spool has an answer of this job's name already, and has kept nothing."""

    seq: int


class NotKept(msgspec.Struct, frozen=True):
    """Nothing of the job was kept."""

    seq: int
    reason: str


class Loaded(msgspec.Struct, frozen=True):
    """The job as it was submitted."""

    seq: int
    message: Submit
    payload: Frames


class NotLoaded(msgspec.Struct, frozen=True):
    """The job cannot be read now."""

    seq: int
    reason: str


class AnswerKept(msgspec.Struct, frozen=True):
    """The answer is on the disk."""

    seq: int


class Looked(msgspec.Struct, frozen=True):
    """The answer of a name; None: there is none. `reason`: the spool cannot be read."""

    client: bytes
    name: str
    answer: Answer | None
    payload: Frames
    reason: str = ""


class Erased(msgspec.Struct, frozen=True):
    """Nothing of the name is left, or why something is."""

    client: bytes
    name: str
    reason: str = ""


class Usage(msgspec.Struct, frozen=True):
    """How full the spool is. `trouble`: why something that must be written is not, or empty.

    `bytes` are those on the disk; `owners` are the same by who submitted what they are of.
    """

    answers: int
    bytes: int
    trouble: str = ""
    owners: Owners = {}


Reply = Kept | Known | NotKept | Loaded | NotLoaded | AnswerKept | Looked | Erased | Usage
