"""What callers get wrong: arguments, forks, threads, event loops, clients that are closed or forgotten."""
import asyncio
import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from clients import answered, checksum, in_thread, pixels, with_client

from blendmaskd.client.blocking import AsyncClient, Client, JobFailed, ServerPath


def test_a_window_of_nothing_and_an_endpoint_that_is_none_are_refused(shared_daemon: Any) -> None:
    with pytest.raises(ValueError, match="window = 0"):
        next(shared_daemon.client.map([pixels(0)], window=0))
    with pytest.raises(ValueError, match="on_error = 'retrun'"):
        next(shared_daemon.client.map([pixels(0)], on_error="retrun"))
    for endpoint in ("nonsense", "/run/x.sock", "http://localhost:1", "tcp://localhost"):
        with pytest.raises(ValueError, match=f"{endpoint}: .*expected ipc:///PATH or tcp://HOST:PORT"):
            Client(endpoint)

        async def connect() -> None:
            async with AsyncClient(endpoint):  # noqa: B023
                pass

        with pytest.raises(ValueError, match=endpoint):
            asyncio.run(connect())


# What cannot be sent, or would be refused: by name, the call.
WRONG: dict[str, Callable[[Any], Any]] = {
    "an int beyond 64 bits": lambda client: client.segment(pixels(0), priority=10**30),
    "an object": lambda client: client.segment(pixels(0), score_threshold=object()),
    "a complex number": lambda client: client.segment(pixels(0), score_threshold=1j),
    "text for a number": lambda client: client.segment(pixels(0), deadline_s="5"),
    "not a number": lambda client: client.segment(pixels(0), deadline_s=float("nan")),
    "infinity": lambda client: client.segment(pixels(0), deadline_s=np.inf),
    "a numpy truth": lambda client: client.segment(pixels(0), max_detections=np.bool_(True)),
    "an array": lambda client: client.segment(pixels(0), score_threshold=np.zeros(2)),
    "None for a choice": lambda client: client.segment(pixels(0), mask_format=None),
    "an unknown option": lambda client: client.segment(pixels(0), softness=1),
    "objects": lambda client: client.segment(np.zeros((4, 4, 3), object)),
    "dates": lambda client: client.segment(np.zeros((4, 4, 3), "datetime64[s]")),
    "surrogates": lambda client: client.segment(ServerPath("/caf\udce9.jpg")),
    "a path of bytes": lambda client: client.segment(ServerPath(b"/x.jpg")),  # type: ignore[arg-type]
    "a long path": lambda client: client.segment(ServerPath("/" + "x" * 5000)),
    "a long name": lambda client: client.submit(pixels(0), job="x" * 200),
    "a short name": lambda client: client.submit(pixels(0), job="x"),
    "a name that is no text": lambda client: client.submit(pixels(0), job=b"x" * 40),
    "a number as a name": lambda client: client.fetch(5),
    "no name": lambda client: client.forget(None),
}
REFUSED = (JobFailed, TypeError, ValueError, OverflowError)


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_wrong_argument_raises_in_its_call_and_nowhere_else(shared_daemon: Any, call: Callable[[Any], Any]) -> None:
    async def work(client: AsyncClient) -> None:
        others = asyncio.create_task(client.segment(pixels(1)))
        with pytest.raises(REFUSED):
            await asyncio.wait_for(call(client), 5)
        assert answered(await others) == checksum(pixels(1))
        assert answered(await client.segment(pixels(2))) == checksum(pixels(2))

    with_client(shared_daemon.endpoint, work)
    with shared_daemon.connect(timeout_s=5) as client:
        with pytest.raises(REFUSED):
            call(client)
        assert answered(client.segment(pixels(3))) == checksum(pixels(3))


@pytest.mark.parametrize(
    "options", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"timeout_s": "x"}, {"retries": 1.5}]
)
def test_a_client_that_cannot_be_is_refused_where_it_is_made(options: dict[str, Any]) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises((ValueError, TypeError)):
            make("ipc:///x", **options)


# -- whose a client is ------------------------------------------------------------------------------------------------


def test_after_a_fork_the_child_is_told_and_the_parent_is_not_harmed(shared_daemon: Any) -> None:
    client = shared_daemon.connect()
    large = pixels(1, 200, 300)
    before = answered(client.segment(large))
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        said = []
        for call in (lambda: client.segment(large), client.stats, client.close, client.close):
            try:
                said.append(str(call()))
            except BaseException as error:
                said.append(repr(error))
        os.write(writing, "\n".join(said).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read().split("\n")
    os.waitpid(pid, 0)
    assert [f"belongs to process {os.getpid()}" in each for each in said] == [True, True, False, False]
    assert said[2:] == ["None", "None"]
    for _ in range(3):
        assert answered(client.segment(large)) == before


def test_a_closed_client_says_so_and_is_closed_again_quietly(shared_daemon: Any) -> None:
    client = Client(shared_daemon.endpoint)
    results = client.map([pixels(0)] * 5)
    next(results)
    client.close()
    client.close()
    for call in (lambda: client.segment(pixels(0)), client.stats, lambda: next(results)):
        with pytest.raises(RuntimeError, match="this client is closed"):
            call()


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_client_is_not_copied(shared_daemon: Any, kind: type[Any], make: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match="a client cannot be copied or pickled: make one in each process"):
        make(kind(shared_daemon.endpoint))
    with Client(shared_daemon.endpoint) as client:
        with pytest.raises(TypeError):
            make(client)
        gc.collect()
        assert client.segment(pixels(0)).device


def test_a_client_without_descriptors_is_told_once(shared_daemon: Any) -> None:
    code = f"""
import resource, sys
from blendmaskd import Client
resource.setrlimit(resource.RLIMIT_NOFILE, (7, 7))
Client({shared_daemon.endpoint!r})
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "Too many open files" in ended.stderr.splitlines()[-1]
    assert "AttributeError" not in ended.stderr


def test_another_thread_is_told(slow_daemon: Any, wait_until: Any) -> None:
    client = slow_daemon.connect()
    result = in_thread(lambda: client.segment(pixels(1)))
    wait_until(lambda: client._exchange.jobs)
    for call in (lambda: client.segment(pixels(2)), client.stats, client.close, lambda: list(client.map([pixels(2)]))):
        with pytest.raises(RuntimeError, match="used by another thread"):
            call()
    assert answered(result()) == checksum(pixels(1))
    assert answered(client.segment(pixels(2))) == checksum(pixels(2))  # one after the other they may


def test_an_async_client_is_of_one_loop_and_of_its_block(shared_daemon: Any) -> None:
    client = AsyncClient(shared_daemon.endpoint)

    async def use() -> None:
        for call in (client.segment(pixels(0)), client.stats(), client.fetch("x" * 40)):
            with pytest.raises(RuntimeError, match=reason):
                await asyncio.wait_for(call, 5)
        with pytest.raises(RuntimeError, match=reason):
            [each async for each in client.map([pixels(0)])]

    async def enter_and_use() -> None:
        nonlocal reason
        async with client:
            with pytest.raises(RuntimeError, match="in use already"):
                await client.__aenter__()
            reason = "another event loop"
            await asyncio.to_thread(asyncio.run, use())
            assert answered(await client.segment(pixels(0))) == checksum(pixels(0))
        reason = "closed"
        await use()

    reason = "not connected"
    asyncio.run(use())
    asyncio.run(enter_and_use())


def test_a_forgotten_client_gives_back_what_it_held(shared_daemon: Any) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def forget() -> None:
        assert Client(shared_daemon.endpoint).segment(pixels(1, 200, 300)).width == 300

    forget()  # what pyzmq keeps for all
    gc.collect()
    before = held()
    for _ in range(5):
        forget()
    gc.collect()
    assert held() == before
