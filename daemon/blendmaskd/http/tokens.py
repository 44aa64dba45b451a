"""The file of tokens: a line ``NAME TOKEN`` for each client; ``#`` begins a comment. Who has a token is its name.

Only the front's own user and root may read the file. It is read again when it changes; while it cannot be used, nobody
is let in. Tokens are kept and compared as digests: how long a comparison takes says nothing of a token.
"""
from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
from collections.abc import Mapping

from blendmaskd import files
from blendmaskd.keys import NAME, is_open_to_others

log = logging.getLogger("blendmaskd.http")

TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{32,256}")


class TokensError(ValueError):
    """A file that cannot be used; the text names it and says what to do."""


class Tokens:
    """`refresh` reads the file if it has changed; `name_of` says whose a token is."""

    def __init__(self, path: str) -> None:
        """Raises `TokensError`."""
        self._path = path
        self._seen = state(path)
        self._names = _read(path)

    def name_of(self, token: str) -> str | None:
        return self._names.get(_digest(token))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._names.values())

    def refresh(self) -> None:
        now = state(self._path)
        if now == self._seen:
            return
        self._seen = now
        try:
            self._names = _read(self._path)
            log.info("tokens were read anew: %d clients", len(self._names))
        except TokensError as error:
            self._names = {}
            log.error("nobody is let in: %s", error)


def state(path: str) -> object:
    """What changes with a file's content, rights or owner."""
    try:
        found = os.stat(path)
    except OSError as error:
        return error.errno
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode, found.st_uid


def _read(path: str) -> Mapping[bytes, str]:
    try:
        with open(files.open_file(path), encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise TokensError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    mode = stat.S_IMODE(status.st_mode)
    if is_open_to_others(mode, status.st_uid, os.geteuid()):
        raise TokensError(f"{path}: has mode {mode:04o}, so others can read it: chmod 600 {path}")
    names: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, _, token = line.partition("#")[0].strip().partition(" ")
        if not name:
            continue
        if not NAME.fullmatch(name) or not TOKEN.fullmatch(token.strip()):
            raise TokensError(f"{path}, line {number}: expected NAME TOKEN, a token of 32 to 256 letters, digits and "
                              "._~+/=-, such as `openssl rand -hex 32` gives")  # fmt: skip
        if name in names.values() or _digest(token.strip()) in names:
            raise TokensError(f"{path}, line {number}: name or token is there twice")
        names[_digest(token.strip())] = name
    return names


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
