"""Durable jobs against real daemons that are killed: nothing accepted is lost, nothing is answered twice."""
from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zmq

from blendmaskd import protocol
from blendmaskd.client.blocking import AsyncClient, Client, JobFailed, ServerPath
from blendmaskd.client.exchange import Exchange
from blendmaskd.protocol import TO_CLIENT, Code
from checkout import ROOT, SOURCES

FAULTY = {"worker_env": {"PYTHONPATH": f"{ROOT / 'tests/chaos/faulty_engine'}:{ROOT}/tests:{SOURCES}"}}
KILLS = 12  # the width of an image that the faulty engine dies of


def pixels(seed: int, width: int = 40) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (30, width, 3), np.uint8)


def checksum(image: Any) -> int:
    return zlib.crc32(image.data)


def answer(client: Client, job: str) -> int:
    found = client.fetch(job)
    assert found is not None
    return int(found.detections[0]["checksum"])


def spooled(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"spool": str(folder / "spool.db"), **settings}


@pytest.fixture(scope="module")
def kept(start_daemons: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A daemon with a spool, for tests that neither kill nor fill it."""
    return start_daemons(**spooled(tmp_path_factory.mktemp("kept"), limits={"max_image_bytes": 100_000}))


# -- the life of a durable job ----------------------------------------------------------------------------------------


def test_any_client_fetches_the_answer_as_often_as_it_likes(kept: Any) -> None:
    image = pixels(1)
    with Client(kept.endpoint, timeout_s=20) as client:
        job = client.submit(image, score_threshold=0.5)
    assert len(job) == 32
    for _ in range(2):
        with Client(kept.endpoint, timeout_s=20) as other:
            assert answer(other, job) == checksum(image)
    assert kept.client.fetch(job, wait=False).device in ("cpu:0", "cpu:1")


def test_a_job_submitted_again_is_not_run_again(kept: Any) -> None:
    name = secrets.token_hex(16)
    assert kept.client.submit(pixels(1), job=name) == name
    assert answer(kept.client, name) == checksum(pixels(1))
    with Client(kept.endpoint, timeout_s=20) as other:
        assert other.submit(pixels(2), job=name) == name
        assert answer(other, name) == checksum(pixels(1))


def test_a_failed_durable_job_keeps_its_failure(kept: Any) -> None:
    job = kept.client.submit(b"no image")
    for _ in range(2):
        with pytest.raises(JobFailed, match="bad-image"):
            kept.client.fetch(job)


def test_what_is_forgotten_is_unknown(kept: Any) -> None:
    job = kept.client.submit(pixels(3))
    assert answer(kept.client, job) == checksum(pixels(3))
    kept.client.forget(job)
    with pytest.raises(JobFailed, match="unknown-job: no durable job of this name"):
        kept.client.fetch(job)
    kept.client.forget(job)
    kept.client.submit(pixels(4), job=job)
    assert answer(kept.client, job) == checksum(pixels(4))


def test_an_async_client_does_the_same(kept: Any) -> None:
    async def run() -> None:
        async with AsyncClient(kept.endpoint, timeout_s=20) as client:
            jobs = await asyncio.gather(*(client.submit(pixels(number)) for number in range(8)))
            found = await asyncio.gather(*(client.fetch(job) for job in jobs))
            sums = [segmentation.detections[0]["checksum"] for segmentation in found if segmentation]
            assert sums == [checksum(pixels(number)) for number in range(8)]
            await client.forget(jobs[0])
            with pytest.raises(JobFailed, match="unknown-job"):
                await client.fetch(jobs[0])
            assert (await client.fetch(jobs[1], wait=False)) is not None

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ({"job": "guessable"}, Code.BAD_REQUEST, "at least 32 random characters"),
        ({"image": bytes(200_000)}, Code.TOO_LARGE, "the limit is 100000"),
        ({"image": ServerPath("/etc/passwd")}, Code.BAD_REQUEST, "images by path are disabled"),
    ],
)
def test_what_cannot_be_kept_is_refused(kept: Any, change: dict[str, Any], code: Code, reason: str) -> None:
    with pytest.raises(JobFailed, match=reason) as failed:
        kept.client.submit(**{"image": pixels(1), **change})
    assert failed.value.code is code


def test_without_a_spool_the_refusal_says_how_to_have_one(shared_daemon: Any) -> None:
    client = shared_daemon.client
    for code, ask in [("bad-request", lambda: client.submit(pixels(1))),
                      ("unknown-job", lambda: client.fetch("a" * 32)),
                      ("unknown-job", lambda: client.forget("a" * 32))]:  # fmt: skip
        with pytest.raises(JobFailed, match=rf"{code}: .*set spool in the daemon's settings \(spool: PATH\)"):
            ask()


def test_an_image_in_shared_memory_is_copied(kept: Any, tmp_path: Path) -> None:
    """A client in any language may place it there; its region ends before the answer is fetched."""
    import fcntl
    import socket as sockets

    import msgpack

    image = pixels(5)
    memory = os.memfd_create("images", os.MFD_ALLOW_SEALING)
    os.write(memory, bytes(64) + image.tobytes())
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    dealer = kept.dealer()
    name = secrets.token_hex(16)
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET) as unix:
        unix.connect(kept.endpoint.removeprefix("ipc://") + protocol.MEMORY_SUFFIX)
        sockets.send_fds(unix, [b"BMD1"], [memory])
        region = msgpack.unpackb(unix.recv(4096))["region"]
        place = protocol.Place(region=region, offset=64, bytes=image.nbytes)
        placed = protocol.Image(kind="raw", shape=image.shape, place=place)
        dealer.send_multipart(protocol.encode(protocol.Submit(job=name, image=placed, durable=True)))
        accepted, _ = protocol.decode(dealer.recv_multipart(), TO_CLIENT)
    os.close(memory)
    assert accepted == protocol.Accepted(job=name)
    assert answer(kept.client, name) == checksum(image)


def test_names_of_durable_jobs_are_secrets_in_log_and_stats(daemon: Any, tmp_path: Path) -> None:
    running = daemon(**spooled(tmp_path, log={"jobs": True}))
    jobs = [running.client.submit(image) for image in (pixels(1), b"no image")]
    assert running.client.fetch(jobs[0])
    with pytest.raises(JobFailed):
        running.client.fetch(jobs[1])
    shown = running.log + str(running.client.stats())
    assert all(job[:8] in running.log for job in jobs)
    assert not any(job in shown for job in jobs)


def test_a_fetch_that_is_open_is_answered_when_its_client_or_its_job_goes_on(daemon: Any, tmp_path: Path) -> None:
    running = daemon(**spooled(tmp_path, timed={"latency_ms": {1: 1500}}))
    dealer, name = running.dealer(), secrets.token_hex(16)

    def say(message: Any, *payload: bytes) -> None:
        dealer.send_multipart(protocol.encode(message, payload))

    def hear() -> Any:
        return protocol.decode(dealer.recv_multipart(), TO_CLIENT)[0]

    say(protocol.Submit(job=name, image=protocol.Image(kind="raw", shape=(2, 2, 3)), durable=True), bytes(12))
    assert hear() == protocol.Accepted(job=name)
    say(protocol.Fetch(job=name))
    say(protocol.Cancel(job=name))
    assert hear() == protocol.Accepted(job=name), "of the fetch, as if it had not waited"
    say(protocol.Cancel(job=name))
    say(protocol.Fetch(job=name))
    say(protocol.Forget(job=name))
    assert (failed := hear()).code is Code.CANCELLED, failed
    assert hear() == protocol.Forgotten(job=name)


# -- the daemon dies --------------------------------------------------------------------------------------------------


class Writer(threading.Thread):
    """A client that leaves durable jobs with the daemon, whatever becomes of that, and remembers what was accepted."""

    def __init__(self, endpoint: str, seeds: range) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.seeds = seeds
        self.accepted: dict[int, str] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with Client(self.endpoint, timeout_s=60) as client:
                for seed in self.seeds:
                    self.accepted[seed] = client.submit(pixels(seed))
        except BaseException as error:
            self.error = error


@pytest.mark.slow
def test_kill_9_in_mid_load_loses_nothing_and_answers_nothing_twice(
    daemon: Any, wait_until: Any, tmp_path: Path
) -> None:
    """Three clients submit through three deaths of the daemon; a fourth, which was none of them, fetches it all."""
    running = daemon(**spooled(tmp_path, timed={"latency_ms": {1: 20}}))
    writers = [Writer(running.endpoint, range(100 * number, 100 * number + 60)) for number in range(3)]
    for writer in writers:
        writer.start()
    for seen in (20, 80, 140):
        wait_until(lambda seen=seen: sum(len(writer.accepted) for writer in writers) >= seen, 30)
        running.kill()
        wait_until(lambda: not running.processes())
        running.start()
    for writer in writers:
        writer.join(60)
        assert writer.error is None
        assert len(writer.accepted) == 60
    with Client(running.endpoint, timeout_s=60) as client:
        for writer in writers:
            for seed, job in writer.accepted.items():
                assert answer(client, job) == checksum(pixels(seed))
    stats = wait_until(lambda: (s := running.client.stats()["spool"])["jobs"] == 0 and s)
    assert stats["answers"] == 180, "one answer for each, none twice"
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0
    with sqlite3.connect(tmp_path / "spool.db") as db:
        assert db.execute("SELECT count(*), count(answer), count(DISTINCT name) FROM jobs").fetchone() == (180,) * 3
    db.close()


@pytest.mark.slow
def test_a_client_that_waits_is_answered_by_the_next_daemon(daemon: Any, wait_until: Any, tmp_path: Path) -> None:
    running = daemon(**spooled(tmp_path, timed={"latency_ms": {1: 1000}}, devices=["cpu:0"]))
    jobs = [running.client.submit(pixels(number)) for number in range(2)]
    found: list[int] = []
    with Client(running.endpoint, timeout_s=60) as client:
        waiting = threading.Thread(target=lambda: found.append(answer(client, jobs[1])))
        waiting.start()
        wait_until(lambda: running.client.stats()["leased"])
        running.kill()
        wait_until(lambda: not running.processes())
        running.start()
        waiting.join(60)
    assert found == [checksum(pixels(1))]


def test_a_durable_job_outlives_its_client_and_a_drain(daemon: Any, wait_until: Any, tmp_path: Path) -> None:
    running = daemon(**spooled(tmp_path, timed={"latency_ms": {1: 300}}, drain_s=0.5))
    with Client(running.endpoint, timeout_s=20) as client:
        jobs = [client.submit(pixels(number)) for number in range(12)]
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0
    running.start()
    running.wait_ready()
    assert [answer(running.client, job) for job in jobs] == [checksum(pixels(number)) for number in range(12)]


def test_a_job_that_is_damaged_in_the_spool_fails_and_the_others_do_not(
    daemon: Any, wait_until: Any, tmp_path: Path
) -> None:
    running = daemon(**spooled(tmp_path, timed={"latency_ms": {1: 300}}))
    jobs = [running.client.submit(pixels(number)) for number in range(12)]
    running.kill()
    wait_until(lambda: not running.processes())
    with sqlite3.connect(tmp_path / "spool.db") as db:
        db.execute("UPDATE jobs SET submit = x'c1' WHERE name = ?", (jobs[11],))
    db.close()
    running.start()
    with Client(running.endpoint) as client:
        for _ in range(2):
            with pytest.raises(JobFailed, match="its image cannot be read from the spool") as failed:
                client.fetch(jobs[11])
            assert failed.value.code is Code.UNAVAILABLE
        assert [answer(client, job) for job in jobs[:11]] == [checksum(pixels(number)) for number in range(11)]


def test_an_image_that_kills_workers_does_not_do_so_for_ever(daemon: Any, wait_until: Any, tmp_path: Path) -> None:
    """The daemon dies after each death of a worker, as with a host that such an image brings down."""
    running = daemon(**spooled(tmp_path, max_attempts=2, **FAULTY))
    good = running.client.submit(pixels(1))
    job = running.client.submit(pixels(2, width=KILLS))

    def attempts() -> int:
        return running.log.count("backoff: killed by SIG")

    wait_until(lambda: attempts() >= 1, 30)
    running.kill()
    wait_until(lambda: not running.processes())
    running.start()
    with pytest.raises(JobFailed) as failed:
        running.client.fetch(job)
    assert failed.value.code is Code.WORKER_LOST
    died = attempts()
    assert 1 <= died <= 3, running.log  # three: the daemon died before it could write down the first
    running.kill()
    wait_until(lambda: not running.processes())
    running.start()
    running.wait_ready()
    with pytest.raises(JobFailed, match="worker-lost"):
        running.client.fetch(job)
    assert answer(running.client, good) == checksum(pixels(1))
    assert attempts() == died


# -- the spool's troubles ---------------------------------------------------------------------------------------------


def refused(folder: Path, spool: Path) -> str:
    """What a daemon says that does not start with this spool."""
    endpoints = {"clients": [f"ipc://{folder}/s"], "metrics": None}
    tree = {"devices": ["cpu:0"], "engine": "timed", "endpoints": endpoints, "spool": str(spool)}
    (folder / "s.yaml").write_text(yaml.safe_dump(tree))
    ended = subprocess.run(
        [sys.executable, "-m", "blendmaskd", "--settings", folder / "s.yaml"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 78, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


def other_program(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()


def newer(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.executescript(f"PRAGMA application_id = {0x424D4431}; PRAGMA user_version = 99; CREATE TABLE jobs (x)")
    db.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b"hello, I am no database " * 100), "file is not a database: move it away"),
        (other_program, "a database of another program: use another file"),
        (newer, "of a newer version of this program: use that version, or another file"),
        (lambda path: path.mkdir(), "the daemon's user must be able to write the file and its folder"),
    ],
)
def test_a_file_that_cannot_be_the_spool_stops_the_start(tmp_path: Path, make: Any, reason: str) -> None:
    make(tmp_path / "spool.db")
    line = refused(tmp_path, tmp_path / "spool.db")
    assert line.startswith(f"blendmaskd: spool {tmp_path}/spool.db: ")
    assert reason in line


def test_a_missing_folder_and_a_spool_in_use_stop_the_start(kept: Any, tmp_path: Path) -> None:
    assert "No such file or directory: its folder must exist" in refused(tmp_path, tmp_path / "no/spool.db")
    assert "another daemon has it: stop that daemon" in refused(tmp_path, Path(kept.settings["spool"]))


def test_a_full_disk_hurts_durable_jobs_only_and_loses_none(
    daemon: Any, wait_until: Any, small_disk: Any, tmp_path: Path
) -> None:
    disk = small_disk(tmp_path / "disk", "12m")
    running = daemon(**spooled(disk, timed={"latency_ms": {1: 50}}))
    accepted: dict[int, str] = {}

    def fill(client: Client) -> None:
        for seed in range(1000):
            accepted[seed] = client.submit(np.resize(pixels(seed), (100, 300, 3)))

    with Client(running.endpoint, timeout_s=20, retries=0) as client, pytest.raises(JobFailed) as failed:
        fill(client)
    assert failed.value.code is Code.UNAVAILABLE
    assert "the spool cannot be written: database or disk is full" in failed.value.reason
    assert accepted
    assert running.client.segment(pixels(1)).detections
    subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
    for seed, job in accepted.items():
        assert answer(running.client, job) == checksum(np.resize(pixels(seed), (100, 300, 3)))
    assert answer(running.client, running.client.submit(pixels(1))) == checksum(pixels(1))
    wait_until(lambda: running.client.stats()["spool"]["trouble"] == "")


def test_a_full_spool_is_busy_and_what_is_forgotten_makes_room(daemon: Any, tmp_path: Path) -> None:
    running = daemon(**spooled(tmp_path, spool_bytes=20_000))
    jobs: list[str] = []

    def fill(client: Client) -> None:
        for number in range(100):
            jobs.append(client.submit(pixels(number)))
            client.fetch(jobs[-1])

    with Client(running.endpoint, timeout_s=20, retries=0) as client:
        with pytest.raises(JobFailed, match="spool_bytes") as failed:
            fill(client)
        assert failed.value.code is Code.BUSY
        for job in jobs:
            client.forget(job)
        assert client.submit(pixels(1))


def test_a_socket_without_our_client_can_do_it_too(kept: Any) -> None:
    """As the wire says: `accepted`, then the answer by `fetch`; `wait` false is answered at once."""
    dealer: zmq.Socket[Any] = kept.dealer()
    name = secrets.token_hex(16)

    def ask(message: Any, *payload: bytes) -> Any:
        dealer.send_multipart(protocol.encode(message, payload))
        return protocol.decode(dealer.recv_multipart(), TO_CLIENT)[0]

    raw = protocol.Image(kind="raw", shape=(2, 2, 3))
    assert ask(protocol.Submit(job=name, image=raw, durable=True), bytes(12)) == protocol.Accepted(job=name)
    assert isinstance(ask(protocol.Fetch(job=name, wait=False)), protocol.Accepted | protocol.Result)
    assert ask(protocol.Fetch(job=name)).job == name
    assert ask(protocol.Forget(job=name)) == protocol.Forgotten(job=name)
    assert ask(protocol.Fetch(job=name)).code is Code.UNKNOWN_JOB


def test_answers_to_an_earlier_question_are_none_to_a_submission() -> None:
    """What is asked while there is no daemon is sent twice, and answered twice."""
    exchange, name = Exchange(0, 20.0), "n" * 32

    def hear(message: protocol.ToClient) -> None:
        exchange.receive(protocol.encode(message), 0.0)

    unknown = protocol.Failed(job=name, code=Code.UNKNOWN_JOB, reason="no such job")
    asked = exchange.ask(protocol.Fetch(job=name), 0.0)
    hear(unknown)
    assert isinstance(asked.answer, JobFailed)
    submitted = exchange.add_durable(b"image", name, None, 0, protocol.Options(), 0.0)
    for message in (unknown, protocol.Forgotten(job=name)):
        hear(message)
        assert submitted.answer is None
    hear(protocol.Accepted(job=name))
    assert submitted.answer == protocol.Accepted(job=name)
