"""The spool: durable jobs and their answers in a file, which outlives the daemon. SQLite in WAL mode.

A thread does all reading and writing, so that a slow disk never holds the daemon's loop up; `ask` takes requests, in
their order, and `replies` has what came of them when `fileno` is readable. What was asked for while one commit ran goes
into the next one together. A commit with a new job or an answer is on the disk when its reply comes (`synchronous`
FULL: one fsync of the log), whatever then happens to daemon or host; one with marks alone is not waited for (NORMAL):
it outlives the daemon, and a host that loses its power may forget it.

What must not get lost and cannot be written, on a full disk say, is tried again each second; until then it is in memory
and `Usage.trouble` says why. New jobs are refused meanwhile. Jobs leave the last `RESERVE` of the disk free, since
answers, and forgetting too, need some to make room. One daemon at a time has the file, by SQLite's own lock.

Nothing is decided here.
"""
from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from blendmaskd.core import spool_messages as messages
from blendmaskd.core.spool_messages import Reply, Request
from blendmaskd.protocol import FROM_CLIENT, TO_CLIENT, Failed, Result, Submit

VERSION = 1
APPLICATION = 0x424D4431  # BMD1, as SQLite's application_id
RETRY_S = 1.0
EXPIRE_S = 60.0
CLOSE_S = 10.0
ROW_BYTES = 1024  # that a job takes beside what is written of it, generously
_WRITTEN = f"size + length(submit) + coalesce(length(answer), 0) + {ROW_BYTES}"  # bytes of a row and its payload
_PAYLOAD = "INSERT INTO payloads VALUES (?, ?)"
_UNUSED = "SELECT freelist_count * page_size FROM pragma_freelist_count, pragma_page_size"  # bytes
MOST_AT_ONCE = 256  # requests in a commit
RESERVE = 8 << 20  # twice the pages (1000) after which SQLite copies its log into the database, which grows by them

_FOR_THE_DISK = messages.Store | messages.StoreAnswer | messages.Erase  # each makes its commit synchronous
_ERRORS = (sqlite3.Error, msgspec.MsgspecError, ValueError, OverflowError, MemoryError)  # of a disk, or a damaged row

_SCHEMA = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    owner BLOB NOT NULL,
    submit BLOB NOT NULL,               -- header, as it came
    priority INTEGER NOT NULL,
    size INTEGER NOT NULL,              -- bytes of the image; of the answer when there is one
    attempts INTEGER NOT NULL DEFAULT 0,
    losses INTEGER NOT NULL DEFAULT 0,
    leased INTEGER NOT NULL DEFAULT 0,
    answer BLOB,                        -- header
    answered REAL                       -- on the spool's clock
);
CREATE INDEX answered ON jobs (answered) WHERE answer IS NOT NULL;
CREATE TABLE payloads (seq INTEGER PRIMARY KEY, frame BLOB NOT NULL);   -- the image, then the answer's
CREATE TABLE clock (seconds REAL NOT NULL);                             -- that daemons have run with this spool
INSERT INTO clock VALUES (0);
"""


class SpoolError(RuntimeError):
    """The file cannot be the spool; the text says why and what to do."""


class Spool:
    """Open it with `open`, which gives what is in it; `close` when all is asked."""

    def __init__(self, path: Path, keep_s: float) -> None:
        self.path = path
        self.keep_s = keep_s  # of answers, on the spool's clock
        self.next_seq = 1
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._replies: deque[Reply] = deque()
        self._unsaved: list[Request] = []  # must be written, and could not be
        self._trouble = ""
        self._answers = self._bytes = 0
        self._owners: Counter[bytes] = Counter()  # bytes of jobs and answers, by who submitted them

    def open(self) -> list[messages.Stored]:
        """What has no answer, in its order. Raises `SpoolError`."""
        try:
            _make(self.path)
            self._db = _connect(self.path)
            stored = self._read()
        except OSError as error:
            raise SpoolError(f"spool {self.path}: {error.strerror}: its folder must exist and be writable") from None
        except _ERRORS as error:
            raise SpoolError(f"spool {self.path}: {_told(error)}") from None
        self._made = {path: _inode(path) for path in (str(self.path), f"{self.path}-wal")}
        self._opened = time.monotonic()
        self._next_expiry = self._opened + EXPIRE_S
        self._start()
        return stored

    def _start(self) -> None:
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._wake

    @property
    def usage(self) -> messages.Usage:
        return messages.Usage(answers=self._answers, bytes=self._bytes, trouble=self._trouble, owners=self._owners)

    def ask(self, request: Request) -> None:
        self._requests.put(request)

    def replies(self) -> Iterator[Reply]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._replies:
            yield self._replies.popleft()

    def close(self) -> None:
        """Write what was asked for, as far as it can be written in `CLOSE_S`."""
        self._requests.put(None)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            os.close(self._wake)

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        more = True
        while more:
            batch, more = self._wait()
            now = time.monotonic()
            if now >= self._next_expiry:
                self._next_expiry = now + EXPIRE_S
                with contextlib.suppress(sqlite3.Error), self._commit(synchronous=False):
                    self._expire()
            self._trouble = ""
            replies = self._carry_out(batch) if batch else []
            self._trouble = self._removed() or self._trouble
            self._replies.extend([self.usage, *replies])
            os.eventfd_write(self._wake, 1)
        self._db.close()

    def _wait(self) -> tuple[list[Request], bool]:
        """What to do now, and whether to go on afterwards."""
        batch, self._unsaved = self._unsaved, []
        try:
            request = self._requests.get(timeout=RETRY_S)
            while request is not None:
                batch.append(request)
                if len(batch) >= MOST_AT_ONCE:
                    return batch, True
                request = self._requests.get_nowait()
        except queue.Empty:
            return batch, True
        return batch, False

    def _carry_out(self, batch: Sequence[Request]) -> list[Reply]:
        """In one commit; if that fails, in one each, to see which it is."""
        try:
            self._leave_reserve(sum(each.job.size for each in batch if isinstance(each, messages.Store)))
            with self._commit(synchronous=any(isinstance(each, _FOR_THE_DISK) for each in batch)):
                return [reply for each in batch for reply in self._do(each)]
        except _ERRORS as error:
            if len(batch) > 1:
                return [reply for each in batch for reply in self._carry_out([each])]
            return self._refuse(batch[0], str(error))

    def _leave_reserve(self, size: int) -> None:
        """Raises sqlite3.Error where new images of so many bytes in all would take the last of the disk."""
        if size and self._free_bytes() < RESERVE + 2 * size:  # in the log, then in the database too
            raise sqlite3.OperationalError(
                f"database or disk is full, except for {RESERVE >> 20} MiB that answers and forgetting need"
            )

    def _free_bytes(self) -> int:
        """Of the disk, and of the file, which never shrinks."""
        disk = os.statvfs(self.path.parent)
        [unused] = self._db.execute(_UNUSED).fetchone()
        return disk.f_bavail * disk.f_frsize + int(unused)

    def _refuse(self, request: Request, reason: str) -> list[Reply]:
        match request:
            case messages.Store():
                return [messages.NotKept(request.job.seq, reason)]
            case messages.Load():
                return [messages.NotLoaded(request.seq, reason)]
            case messages.Look():
                return [messages.Looked(request.client, request.name, None, (), reason)]
            case messages.Erase():
                return [messages.Erased(request.client, request.name, reason)]
        self._trouble = reason
        self._unsaved.append(request)
        return []

    def _removed(self) -> str:
        """What others have removed or replaced; empty: nothing."""
        gone = [path for path, inode in self._made.items() if inode and _inode(path) != inode]
        return f"{gone[0]} was removed or replaced by somebody else; restart the daemon" if gone else ""

    @contextlib.contextmanager
    def _commit(self, *, synchronous: bool) -> Iterator[None]:
        if removed := self._removed():  # SQLite would go on writing into what is nowhere any more
            raise sqlite3.OperationalError(removed)
        self._db.execute(f"PRAGMA synchronous = {'FULL' if synchronous else 'NORMAL'}")
        counted = self._answers, self._bytes, self._owners
        self._owners = self._owners.copy()
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._answers, self._bytes, self._owners = counted
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _do(self, request: Request) -> list[Reply]:
        match request:
            case messages.Store():
                return [self._store(request)]
            case messages.Load():
                return [self._load(request)]
            case messages.Mark(seq, attempts, losses, leased):
                self._db.execute(
                    "UPDATE jobs SET attempts = ?, losses = ?, leased = ? WHERE seq = ? AND answer IS NULL",
                    (attempts, losses, leased, seq),
                )
                return []
            case messages.StoreAnswer():
                self._store_answer(request)
                return [messages.AnswerKept(request.seq)]
            case messages.Look():
                return [self._look(request)]
            case messages.Erase():
                self._drop("name = ?", request.name)
                return [messages.Erased(request.client, request.name)]

    def _store(self, request: messages.Store) -> Reply:
        job = request.job
        row = self._db.execute("SELECT answer IS NULL FROM jobs WHERE name = ?", (job.name,)).fetchone()
        if row is not None and not row[0]:
            return messages.Known(job.seq)
        if row is not None:  # was forgotten when it could not be erased
            self._drop("name = ?", job.name)
        self._db.execute(
            "INSERT INTO jobs (seq, name, owner, submit, priority, size) VALUES (?, ?, ?, ?, ?, ?)",
            (job.seq, job.name, job.owner, msgspec.msgpack.encode(request.message), job.priority, job.size),
        )
        self._db.executemany(_PAYLOAD, [(job.seq, frame) for frame in request.payload])
        self._count("seq = ?", job.seq, 1)
        return messages.Kept(job.seq)

    def _load(self, request: messages.Load) -> Reply:
        row = self._db.execute("SELECT submit FROM jobs WHERE seq = ?", (request.seq,)).fetchone()
        if row is None:
            return messages.NotLoaded(request.seq, "it is gone")
        message = FROM_CLIENT.decoder.decode(row[0])
        assert isinstance(message, Submit)
        return messages.Loaded(request.seq, message, self._payload(request.seq))

    def _store_answer(self, request: messages.StoreAnswer) -> None:
        if not self._count("seq = ? AND answer IS NULL", request.seq, -1):
            return  # forgotten
        size = sum(len(frame) for frame in request.payload)
        self._db.execute("DELETE FROM payloads WHERE seq = ?", (request.seq,))
        self._db.executemany(_PAYLOAD, [(request.seq, frame) for frame in request.payload])
        self._db.execute(
            "UPDATE jobs SET answer = ?, answered = ?, size = ?, leased = 0 WHERE seq = ?",
            (msgspec.msgpack.encode(request.answer), self._clock(), size, request.seq),
        )
        self._count("seq = ?", request.seq, 1)
        self._answers += 1

    def _look(self, request: messages.Look) -> Reply:
        row = self._db.execute(
            "SELECT seq, answer FROM jobs WHERE name = ? AND answer IS NOT NULL", (request.name,)
        ).fetchone()
        if row is None:
            return messages.Looked(request.client, request.name, None, ())
        message = TO_CLIENT.decoder.decode(row[1])
        assert isinstance(message, Result | Failed)
        return messages.Looked(request.client, request.name, message, self._payload(row[0]))

    def _payload(self, seq: int) -> list[Any]:
        return [row[0] for row in self._db.execute("SELECT frame FROM payloads WHERE seq = ?", (seq,))]

    def _drop(self, where: str, value: Any) -> None:
        self._count(where, value, -1)
        rows = self._db.execute(f"SELECT seq, answer IS NOT NULL FROM jobs WHERE {where}", (value,)).fetchall()
        for seq, answered in rows:
            self._db.execute("DELETE FROM payloads WHERE seq = ?", (seq,))
            self._db.execute("DELETE FROM jobs WHERE seq = ?", (seq,))
            self._answers -= answered

    def _count(self, where: str, value: Any, by: int) -> int:
        """What these rows take is used from now on, or not any more. Returns how many they are."""
        rows = self._db.execute(f"SELECT owner, {_WRITTEN} FROM jobs WHERE {where}", (value,)).fetchall()
        for owner, size in rows:
            self._bytes += by * size
            self._owners[owner] += by * size
            if not self._owners[owner]:
                del self._owners[owner]
        return len(rows)

    def _expire(self) -> None:
        self._drop("answer IS NOT NULL AND answered < ?", self._clock() - self.keep_s)
        self._db.execute("UPDATE clock SET seconds = ?", (self._clock(),))

    def _clock(self) -> float:
        """Seconds that daemons have run: no change of the host's time makes answers old."""
        return self._clock_before + time.monotonic() - self._opened

    # -- opening ----------------------------------------------------------------------------------------------------

    def _read(self) -> list[messages.Stored]:
        (seconds,) = self._db.execute("SELECT seconds FROM clock").fetchone()
        newest, last, self._answers = self._db.execute(
            "SELECT coalesce(max(answered), 0), coalesce(max(seq), 0), count(answer) FROM jobs"
        ).fetchone()
        self._clock_before: float = max(seconds, newest)
        self.next_seq = last + 1
        owners = self._db.execute(f"SELECT owner, sum({_WRITTEN}) FROM jobs GROUP BY owner")
        self._owners = Counter(dict(owners.fetchall()))
        self._bytes = self._owners.total()
        rows = self._db.execute(
            "SELECT seq, name, owner, priority, size, attempts, losses, leased <> 0 FROM jobs WHERE answer IS NULL "
            "ORDER BY seq"
        )
        return [messages.Stored(*row) for row in rows]


def _inode(path: str) -> int:
    """0: there is none."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0


def _make(path: Path) -> None:
    """An empty file, ours to read, that outlives a power failure. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _connect(path: Path) -> sqlite3.Connection:
    """The file, ours alone. Raises `SpoolError` and sqlite3.Error."""
    db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        application, version, tables = (
            db.execute(text).fetchone()[0]
            for text in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if application != APPLICATION and (application or version or tables):
            raise SpoolError(f"spool {path}: a database of another program: use another file")
        if version > VERSION:
            raise SpoolError(f"spool {path}: of a newer version of this program: use that version, or another file")
        if (mode := db.execute("PRAGMA journal_mode = WAL").fetchone()[0]) != "wal":
            raise SpoolError(f"spool {path}: no write-ahead log on this file system ({mode}): use a local disk")
        if not version:
            text = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}"
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {text}; COMMIT")
    except BaseException:
        db.close()
        raise
    return db


def _told(error: Exception) -> str:
    text = str(error)
    if "locked" in text:
        return "another daemon has it: stop that daemon, or use another file"
    if "malformed" in text or "not a database" in text:
        return f"{text}: move it away to start with an empty one; `sqlite3 FILE .recover` may recover part of it"
    if "readonly" in text or "unable to open" in text:
        return f"{text}: the daemon's user must be able to write the file and its folder"
    return text
