"""Who may speak at a CURVE endpoint, and under whose identity. Reads the folder of allowed keys; owns no socket.

ZeroMQ asks who a client is only when it connects (`blendmaskd.shell.admission.gate` answers). What follows here is
asked of each message, because a key can be removed while its client is connected, and because a ROUTER lets a new
connection take over the identity of another (ROUTER_HANDOVER, by which a client that reconnects gets its answers):

- **A message under a key that is not allowed any more** is dropped, its connection closed; the key's unanswered jobs
  were answered `unauthorised` when the file went.
- **An identity has at least 16 bytes**, random ones, so that it is a secret like the name of a region of shared memory:
  who could guess another's would get that one's answers. ZeroMQ's own identities, which it gives to a client that
  names none, are numbers in a row, and refused.
- **While an identity has unanswered jobs it belongs to the key that submitted them.** Another's message under it is
  refused, and the jobs end without an answer, which would go to the stranger; their client sends them again when it
  finds itself disconnected.

An ipc client is known by the kernel's word for who it is.
"""
from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from blendmaskd.keys import PUBLIC, KeyFileError, read_listed

LEAST_IDENTITY_BYTES = 16
# Before the identities of remote and of local clients: a client may choose any, also one that begins so.
FROM_AFAR, FROM_HERE = b"\0tcp:", b"\0ipc:"
_SHORT_OF_SOMETHING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
LOCAL = "local"  # the owner of what an ipc client submits


class Change(NamedTuple):
    """What a look into the folder has found."""

    added: dict[str, str]  # key, name
    removed: dict[str, str]
    complaints: list[str]  # of files that are no keys, and of a folder that cannot be read


class AllowedKeys:
    """The public keys in a folder. `names` maps a key (Z85 text, which is its User-Id) to the name of its file.

    A file that is no key lets nobody in and harms no other. A folder that cannot be read lets nobody in. Being short of
    descriptors or memory changes nothing: nobody could shut others out by using them up.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.names: dict[str, str] = {}
        self._seen: object = None

    def refresh(self) -> Change:
        """Look again. What did not change since then costs a `stat` per file."""
        try:
            seen = {entry.path: _stamp(entry) for entry in os.scandir(self.folder) if entry.name.endswith(PUBLIC)}
        except OSError as error:
            if error.errno in _SHORT_OF_SOMETHING:
                return Change({}, {}, [])
            return self._take({}, error.strerror, [f"{self.folder}: {error.strerror}: no client key is allowed"])
        if seen == self._seen:
            return Change({}, {}, [])
        names, complaints = {}, []
        for path in sorted(seen, reverse=True):  # of two files with one key, the first names it
            try:
                names[read_listed(path).decode()] = Path(path).stem
            except KeyFileError as error:
                if isinstance(error.__cause__, OSError) and error.__cause__.errno in _SHORT_OF_SOMETHING:
                    return Change({}, {}, [])
                complaints.append(str(error))
        return self._take(names, seen, complaints)

    def _take(self, names: dict[str, str], seen: object, complaints: list[str]) -> Change:
        news = complaints if seen != self._seen else []
        old, self.names, self._seen = self.names, names, seen
        return Change(_without(names, old), _without(old, names), news)


def _stamp(entry: os.DirEntry[str]) -> tuple[int, ...]:
    try:
        found = entry.stat()
    except OSError:  # gone since the folder was read, or a link to nowhere
        return ()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_mode


def _without(names: dict[str, str], others: dict[str, str]) -> dict[str, str]:
    return {key: name for key, name in names.items() if key not in others}


class Verdict(Enum):
    """What is done with a message. The value is the reason that its sender is given."""

    WELCOME = ""
    OLD = "speak ZMTP 3, as libzmq does since version 4"
    UNKNOWN = "this key is not among those the daemon allows"
    SHORT = "set the socket's identity to 16 random bytes (ZMQ_ROUTING_ID): anyone who can guess it gets your answers"
    TAKEN = "this identity has unanswered jobs of another key: choose 16 random bytes of your own"


class Identities:
    """Which key an identity belongs to while it has unanswered jobs, as `has_jobs` says."""

    def __init__(self, allowed: AllowedKeys, has_jobs: Callable[[bytes], bool]) -> None:
        self._allowed = allowed
        self._has_jobs = has_jobs
        self._owners: dict[bytes, str] = {}

    def judge(self, identity: bytes, user: str) -> Verdict:
        """`user`: the key that the message came under, or `LOCAL`."""
        if user != LOCAL:
            if user not in self._allowed.names:
                return Verdict.UNKNOWN
            if len(identity.removeprefix(FROM_AFAR)) < LEAST_IDENTITY_BYTES:
                return Verdict.SHORT
        if self._owners.get(identity, user) != user and self._has_jobs(identity):
            return Verdict.TAKEN
        self._owners[identity] = user
        return Verdict.WELCOME

    def of(self, users: Iterable[str]) -> list[bytes]:
        """The identities that belong to these."""
        wanted = set(users)
        return [identity for identity, owner in self._owners.items() if owner in wanted]

    def forget_idle(self) -> None:
        """Keep those that matter."""
        self._owners = {identity: owner for identity, owner in self._owners.items() if self._has_jobs(identity)}
