"""kill -9 of the front, the daemon and workers under load over HTTP: each request is answered once, rightly or with a
code, or its connection breaks with the front; durable jobs outlive all of them."""
from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import secrets
import signal
import threading
import time
from collections import Counter
from typing import Any

import pytest
from running_front import Front, MakeFront

from blendmaskd.client.asynchronous import AsyncClient
from blendmaskd.http import rest
from blendmaskd.http.rest import Failure
from blendmaskd.http.upstream import Upstream
from blendmaskd.protocol import Code

WAIT_S = 30.0


class Load(threading.Thread):
    """A client that keeps its connection, and counts what comes back."""

    def __init__(self, front: Front, photo: bytes) -> None:
        super().__init__()
        self._front, self._photo = front, photo
        self.counts: Counter[str] = Counter()
        self.wrong: list[object] = []
        self.slowest_s = 0.0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            begun = time.monotonic()
            try:
                reply = self._front.ask("POST", "/v1/segment?deadline_s=20", self._photo, timeout=WAIT_S)
            except (ConnectionError, http.client.HTTPException):  # also in the middle of an answer
                self.counts["broken"] += 1
                self.stop.wait(0.05)
                continue
            except OSError as error:
                self.wrong.append(error)
                continue
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
            if reply.status == 200 and reply.tree["detections"][0]["bbox"] == [0, 0, 383, 259]:
                self.counts["answered"] += 1
            elif reply.status >= 500 and reply.tree["code"] in set(Code):
                self.counts[reply.tree["code"]] += 1
                self.stop.wait(0.05)
            else:
                self.wrong.append(reply)


@contextlib.contextmanager
def load(front: Front, photo: bytes, wait_until: Any) -> Any:
    """Four clients; at the end all of them are answered again."""
    clients = [Load(front, photo) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        wait_until(lambda: all(client.counts["answered"] > 5 for client in clients), WAIT_S)
        yield clients
        before = [client.counts["answered"] for client in clients]
        wait_until(lambda: all(c.counts["answered"] > b + 5 for c, b in zip(clients, before)), WAIT_S)
    finally:
        for client in clients:
            client.stop.set()
        for client in clients:
            client.join()
    assert [client.wrong for client in clients] == [[]] * 4
    assert max(client.slowest_s for client in clients) < WAIT_S


@pytest.mark.slow
def test_workers_die_under_load(daemon: Any, front: MakeFront, photo: bytes, wait_until: Any) -> None:
    server = daemon()
    with load(front(server), photo, wait_until) as clients:
        for _ in range(3):
            generation = server.devices()["cpu:0"]["generation"]
            os.kill(server.pids()["cpu:0"], signal.SIGKILL)
            wait_until(lambda: server.devices()["cpu:0"]["generation"] > generation, WAIT_S)  # noqa: B023
            server.wait_ready()
    assert sum((client.counts for client in clients), Counter())["broken"] == 0


@pytest.mark.slow
def test_the_daemon_dies_under_load(daemon: Any, front: MakeFront, photo: bytes, wait_until: Any) -> None:
    server = daemon()
    with load(front(server), photo, wait_until) as clients:
        server.kill()
        server.start()
        server.wait_ready()
    total = sum((client.counts for client in clients), Counter())
    assert total["broken"] == 0
    assert set(total) <= {"answered", "broken", "unavailable", "draining", "busy"}, total


@pytest.mark.slow
def test_the_front_dies_under_load(daemon: Any, front: MakeFront, photo: bytes, wait_until: Any) -> None:
    server = daemon()
    here = front(server)
    with load(here, photo, wait_until):
        here.kill()
        here.start()
    wait_until(lambda: server.client.stats()["leased"] == 0)  # nobody is waited for


def test_a_daemon_that_is_away_is_a_503_in_time(daemon: Any, front: MakeFront, photo: bytes, wait_until: Any) -> None:
    server = daemon()
    here = front(server, daemon_wait_s=1.0)
    assert here.ask("POST", "/v1/segment", photo).status == 200
    server.kill()
    begun = time.monotonic()
    reply = here.ask("POST", "/v1/segment", photo)
    assert (reply.status, reply.tree["code"], "retry-after" in reply.headers) == (503, "unavailable", True)
    assert time.monotonic() - begun < 8
    assert here.ask("GET", "/readyz").status == 503
    assert here.log.count(f"no daemon answers at {server.endpoint}") == 1
    assert here.ask("GET", "/healthz").status == 200
    server.start()
    server.wait_ready()
    wait_until(lambda: here.ask("POST", "/v1/segment", photo).status == 200)
    wait_until(lambda: here.ask("GET", "/readyz").status == 200)  # it is asked once a second


def test_a_client_that_could_not_be_made_is_made_again(
    shared_daemon: Any, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be no thread, or no descriptor, at the moment."""

    async def fail(self: AsyncClient) -> AsyncClient:
        raise RuntimeError("can't start new thread")

    async def ask() -> int:
        upstream = Upstream(shared_daemon.endpoint, 5.0)
        with monkeypatch.context() as patch:
            patch.setattr(AsyncClient, "__aenter__", fail)
            with pytest.raises(Failure, match="can't start new thread"):
                await upstream.segment("", wanted)
        answer = await upstream.segment("", wanted)
        await upstream.close()
        return answer.width

    wanted = rest.read({}, "image/jpeg", photo, 20.0, rest.SegmentQuery)
    assert asyncio.run(ask()) == 383


@pytest.mark.slow
def test_a_front_that_starts_first_waits_for_the_daemon(
    daemon: Any, front: MakeFront, photo: bytes
) -> None:
    server = daemon()
    server.kill()
    here = front(server)
    replies: list[int] = []
    asking = threading.Thread(target=lambda: replies.append(here.ask("POST", "/v1/segment", photo).status))
    asking.start()
    server.start()
    asking.join()
    assert replies == [200]


# -- durable jobs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def durable(daemon: Any, tmp_path: Any) -> Any:
    return daemon(spool=str(tmp_path / "spool.sqlite"), timed={"latency_ms": {1: 300}}, devices=["cpu:0"])


def test_a_durable_job_is_kept_until_it_is_deleted(durable: Any, front: MakeFront, photo: bytes) -> None:
    here = front(durable)
    accepted = here.ask("POST", "/v1/jobs?mask_format=none", photo)
    job = accepted.tree["job"]
    assert (accepted.status, accepted.headers["location"]) == (202, f"/v1/jobs/{job}")
    assert here.ask("GET", f"/v1/jobs/{job}").tree == {"job": job, "state": "waiting"}
    done = here.ask("GET", f"/v1/jobs/{job}?wait=20").tree
    assert (done["state"], done["result"]["width"]) == ("done", 383)
    assert here.ask("GET", f"/v1/jobs/{job}").tree == done
    assert here.ask("DELETE", f"/v1/jobs/{job}").status == 204
    assert here.ask("GET", f"/v1/jobs/{job}").status == 404
    failed = here.ask("POST", "/v1/jobs", b"no image").tree["job"]
    found = here.ask("GET", f"/v1/jobs/{failed}?wait=20")
    assert (found.status, found.tree["state"], found.tree["error"]["code"]) == (200, "failed", "bad-image")
    assert here.ask("GET", f"/v1/jobs/{job}?wait=61").status == 400


@pytest.mark.slow
def test_many_may_wait_for_one_job(durable: Any, front: MakeFront, photo: bytes, wait_until: Any) -> None:
    here = front(durable)
    name = secrets.token_hex(16)
    assert here.ask("POST", f"/v1/jobs?job={name}", photo).tree["job"] == name
    assert here.ask("POST", f"/v1/jobs?job={name}", photo).status == 202  # again, as after a lost answer
    states: list[str] = []
    threads = [
        threading.Thread(target=lambda: states.append(here.ask("GET", f"/v1/jobs/{name}?wait=20").tree["state"]))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    assert here.ask("GET", f"/v1/jobs/{name}").tree["state"] in ("waiting", "done")
    for thread in threads:
        thread.join()
    assert states == ["done"] * 5
    assert here.ask("GET", f"/v1/jobs/{name}").tree["state"] == "done"


@pytest.mark.slow
def test_a_wait_that_ends_or_is_deleted_leaves_nothing(durable: Any, front: MakeFront, photo: bytes) -> None:
    here = front(durable)
    jobs = [here.ask("POST", "/v1/jobs", photo).tree["job"] for _ in range(6)]
    last = jobs[-1]
    assert here.ask("GET", f"/v1/jobs/{last}?wait=0.05").tree["state"] == "waiting"
    replies: list[int] = []
    waiting = threading.Thread(target=lambda: replies.append(here.ask("GET", f"/v1/jobs/{last}?wait=30").status))
    waiting.start()
    assert here.ask("DELETE", f"/v1/jobs/{last}").status == 204
    waiting.join()
    assert replies[0] in (200, 404)  # failed as cancelled; or it came after the deletion
    assert here.ask("GET", f"/v1/jobs/{jobs[0]}?wait=20").tree["state"] == "done"


@pytest.mark.slow
def test_a_job_that_was_asked_for_before_it_was_there_is_accepted_by_the_daemon_alone(
    durable: Any, front: MakeFront, photo: bytes, wait_until: Any
) -> None:
    """Whoever does not know whether its job was accepted asks for it, and sends it again: also while there is no
    daemon, whose answers to the first question come twice.
    """
    here = front(durable)
    name = secrets.token_hex(16)
    assert here.ask("GET", "/readyz").status == 200  # it is connected
    durable.kill()
    replies: dict[str, int] = {}

    def ask(method: str, path: str, body: bytes | None = None) -> threading.Thread:
        thread = threading.Thread(target=lambda: replies.update({method: here.ask(method, path, body).status}))
        thread.start()
        return thread

    with here.connect() as first:
        first.sendall(f"GET /v1/jobs/{name}?wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_until(lambda: b"in_flight 2.0" in here.ask("GET", "/metrics").body)  # beside this question
        posting = ask("POST", f"/v1/jobs?job={name}", photo)
        wait_until(lambda: b"in_flight 3.0" in here.ask("GET", "/metrics").body)
        assert replies == {}  # nobody has accepted it
        durable.start()
        assert first.recv(100).startswith(b"HTTP/1.1 404")
    posting.join()
    assert replies == {"POST": 202}
    assert here.ask("GET", f"/v1/jobs/{name}?wait=20").tree["state"] == "done"


@pytest.mark.slow
def test_durable_jobs_outlive_both(durable: Any, front: MakeFront, photo: bytes) -> None:
    here = front(durable)
    jobs = [here.ask("POST", "/v1/jobs", photo).tree["job"] for _ in range(8)]
    here.kill()
    durable.kill()
    durable.start()
    here.start()
    for job in jobs:
        found = here.ask("GET", f"/v1/jobs/{job}?wait=30").tree
        assert (found["state"], found["result"]["width"]) == ("done", 383)
