"""`scene`: a daemon under load for one fault, and what has to hold after each of them.

After a scene every job has had exactly one answer, the right one; all devices serve; memory, descriptors, threads and
processes of the daemon are back to where they were.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from raw_load import Load, picture

from blendmaskd.client.blocking import Client

GROWTH_BYTES = 32 << 20  # allocators keep some; the floods of these tests are of hundreds of megabytes
SETTLE_S = 60.0


@dataclass
class Scene:
    """`server` is the running daemon, `load` a client's; `failures` of the load are looked at by the test."""

    server: Any
    load: Load


@dataclass(frozen=True)
class Held:
    """What the daemon's process holds."""

    descriptors: int
    threads: int
    children: int
    memory: int

    @classmethod
    def of(cls, pid: int) -> Held:
        process = psutil.Process(pid)
        with process.oneshot():
            return cls(process.num_fds(), process.num_threads(), len(process.children()), process.memory_info().rss)

    def is_back_at(self, before: Held) -> bool:
        return (
            self.descriptors <= before.descriptors
            and self.threads <= before.threads
            and self.children == before.children
            and self.memory <= before.memory + GROWTH_BYTES
        )


MakeScene = Callable[..., contextlib.AbstractContextManager[Scene]]


@pytest.fixture
def scene(daemon, wait_until) -> MakeScene:
    """``with scene(**settings) as here:`` starts both; on leaving, what has to hold is checked."""

    def settles(pid: int, before: Held) -> None:
        seen: list[Held] = []
        try:
            wait_until(lambda: seen.append(Held.of(pid)) or seen[-1].is_back_at(before), SETTLE_S)
        except AssertionError:
            pytest.fail(f"before: {before}\nafter: {seen[-1]}")

    @contextlib.contextmanager
    def make(environment: dict[str, str] | None = None, **settings: Any) -> Iterator[Scene]:
        server = daemon(environment=environment, **settings)
        assert server.client.segment(picture()).detections
        before = Held.of(server.process.pid)
        load = Load(server.endpoint)
        load.start()
        try:
            wait_until(lambda: load.answered > 20, SETTLE_S)
            yield Scene(server, load)
            load.end()
        finally:
            load.stop.set()
            load.join()
        server.wait_ready()
        with Client(server.endpoint, timeout_s=SETTLE_S) as client:
            # A snapshot that says `ready` may be a second old: what counts is who answers.
            wait_until(lambda: {each.device for each in client.map([picture()] * 16)} == set(server.pids()), SETTLE_S)
        settles(server.process.pid, before)

    return make
