"""What one client may cost the others: each bound of docs/security.md, with a polite client beside the attack."""
from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from attack import IMAGE, LONGEST_S, Polite, connect, head, is_closed, message, read_all, send_all
from curve import start
from rich.console import Console

from blendmaskd import Client, JobFailed
from blendmaskd.core.spool_messages import Store, StoreAnswer, Stored
from blendmaskd.logs import TextFormatter
from blendmaskd.programs.errors import EXIT_NO_DAEMON, NoDaemonError, guarded
from blendmaskd.programs.tables import tables
from blendmaskd.programs.watch import View
from blendmaskd.protocol import MAGIC, Cancel, Fetch, Forget, GetLimits, GetStats, Image, Result, Submit, encode
from blendmaskd.settings import SettingsError, from_tree
from blendmaskd.shell.debts import BUSY_BYTES, MARK_BYTES, MOST_BYTES, MOST_OF_ALL_BYTES, Debts
from blendmaskd.shell.job_log import CLIENTS_PER_S
from blendmaskd.shell.sockets import FRAMES_READ_AWAY, MESSAGES_PER_TURN, MOST_FRAMES, Clients
from blendmaskd.shell.spool import Spool
from blendmaskd.wanted import HIDDEN, Actual, Wanted, differences, masked

ANSWER_BYTES = 4 << 20
FETCHES = 600  # 2.4 GB of answers


def spool_with_an_answer(path: Path) -> str:
    """The name of a job whose answer is large."""
    spool, name = Spool(path, 1e6), secrets.token_hex(16)
    spool.open()
    submit = Submit(job=name, image=Image(kind="encoded"), durable=True)
    spool.ask(Store(Stored(1, name, b"somebody", 0, 1), submit, [b"x"]))
    result = Result(job=name, width=64, height=48, device="cpu:0", timings={})
    spool.ask(StoreAnswer(1, result, [msgpack.packb(["x" * ANSWER_BYTES])]))
    spool.close()
    return name


def wait_a_while(running: Any, wait_until: Any) -> None:
    """Until all that was asked for is done with, of which nothing is seen: some seconds."""
    seq = running.client.stats()["seq"]
    wait_until(lambda: running.client.stats()["seq"] > seq + 3)


@pytest.mark.slow
def test_answers_that_nobody_reads_are_bounded_in_bytes(daemon: Any, tmp_path: Path, wait_until: Any) -> None:
    name = spool_with_an_answer(tmp_path / "spool")
    running = daemon(devices=["cpu:0"], spool=str(tmp_path / "spool"))
    fetches = message(*encode(Fetch(job=name))) * FETCHES
    with contextlib.ExitStack() as stack, Polite(running):
        mute = [stack.enter_context(connect(running.endpoint, receive_bytes=4096)) for _ in range(3)]
        for peer in mute:
            peer.sendall(fetches)
        reader = running.dealer()
        reader.send_multipart(encode(Fetch(job=name)))
        assert len(reader.recv_multipart()[2]) > ANSWER_BYTES
        wait_a_while(running, wait_until)


@pytest.mark.slow
def test_statistics_that_nobody_reads_are_bounded_in_bytes(daemon: Any, wait_until: Any) -> None:
    running = daemon(devices=["cpu:0"])
    with contextlib.ExitStack() as stack, Polite(running):
        for _ in range(100):
            stack.enter_context(connect(running.endpoint, receive_bytes=4096)).sendall(
                message(*encode(GetStats())) * 1000
            )
        wait_a_while(running, wait_until)


@pytest.mark.slow
def test_who_has_too_much_to_read_is_given_no_more(daemon: Any, tmp_path: Path, wait_until: Any) -> None:
    name = spool_with_an_answer(tmp_path / "spool")
    running = daemon(devices=["cpu:0"], spool=str(tmp_path / "spool"))
    with connect(running.endpoint, receive_bytes=4096) as peer:
        peer.sendall(message(*encode(Fetch(job=name))) * 40)
        wait_a_while(running, wait_until)
        refused = 0
        while refused < 40 - BUSY_BYTES // ANSWER_BYTES - 3:
            refused += peer.recv(1 << 20).count(b"answers wait for this client")
        peer.sendall(message(*encode(Fetch(job=name))))
        received = 0
        while received < ANSWER_BYTES:
            received += len(peer.recv(1 << 20))


def _pour(stack: contextlib.ExitStack, running: Any, parts: list[bytes]) -> None:
    """A client of its own sends these, and reads what it is told, until the stack ends."""
    peer = stack.enter_context(connect(running.endpoint))
    for target, arguments in ((send_all, (peer, parts)), (read_all, (peer,))):
        thread = threading.Thread(target=target, args=arguments)
        thread.start()
        stack.callback(thread.join)
    stack.callback(peer.shutdown, socket.SHUT_RDWR)


@pytest.mark.slow
def test_a_flood_of_forget_holds_up_no_durable_job(daemon: Any, tmp_path: Path) -> None:
    running = daemon(devices=["cpu:0"], spool=str(tmp_path / "spool"))
    flood = b"".join(message(*encode(Forget(job=secrets.token_hex(4)))) for _ in range(2000))
    with contextlib.ExitStack() as stack, Polite(running):
        for _ in range(2):
            _pour(stack, running, [flood] * 40)
        for _ in range(5):
            begun = time.monotonic()
            running.client.fetch(running.client.submit(IMAGE))
            assert time.monotonic() - begun < LONGEST_S


@pytest.mark.slow
def test_malformed_messages_hold_nobody_up(daemon: Any) -> None:
    """What makes the most work of 64 KiB, by three clients as fast as they can."""
    running = daemon(devices=["cpu:0"])
    header = {"type": "submit", "job": "x", "image": 5, "unknown": [{}] * 60_000}
    bad = message(MAGIC, msgpack.packb(header))
    with contextlib.ExitStack() as stack, Polite(running) as polite:
        for _ in range(3):
            _pour(stack, running, [bad] * 2000)
        enough, deadline = polite.answers + 40, time.monotonic() + 20
        while polite.answers < enough and time.monotonic() < deadline:
            assert running.client.stats()["serving"] == 1


class Peer:
    """A frame on its way, which `read` lets go of."""

    def __init__(self, debts: Debts) -> None:
        self.debts = debts
        self.sent: list[Any] = []

    def send(self, client: bytes, size: int) -> None:
        self.sent.append(self.debts.add(client, [b"x" * size]))

    def read(self, wait_until: Any, client: bytes) -> None:
        self.sent.clear()
        wait_until(lambda: self.debts.of(client) < MARK_BYTES)


def test_debts_end_when_what_was_sent_has_gone(wait_until: Any) -> None:
    debts = Debts()
    peer = Peer(debts)
    for _ in range(10):
        peer.send(b"a", MARK_BYTES)
    assert debts.of(b"a") >= 10 * MARK_BYTES
    assert debts.of(b"b") == 0
    peer.read(wait_until, b"a")
    assert debts.bytes < MARK_BYTES


def test_of_all_debtors_the_one_that_has_not_read_for_longest_goes() -> None:
    debts = Debts()
    peer = Peer(debts)
    for client in (b"first", b"second"):
        peer.send(client, MOST_BYTES)
        assert debts.longest() is None
    while debts.bytes <= MOST_OF_ALL_BYTES:
        peer.send(b"third", MOST_BYTES)
    assert debts.longest() == b"first"
    debts.forget(b"first")
    assert debts.longest() is None
    debts.keep(lambda client: client == b"second")
    assert debts.of(b"third") == 0
    assert debts.of(b"second") >= MOST_BYTES


def test_a_message_of_too_many_frames_costs_its_connection(daemon: Any, wait_until: Any) -> None:
    running = daemon(devices=["cpu:0"])
    with connect(running.endpoint) as peer, Polite(running):
        peer.sendall(message(*[b""] * 4 * FRAMES_READ_AWAY))
        wait_until(lambda: is_closed(peer))
    with connect(running.endpoint) as peer:
        peer.sendall(message(*[b""] * (MOST_FRAMES - 1)))  # with its sender's identity
        assert b"expected frames" in peer.recv(1 << 16)
    assert running.client.segment(IMAGE).width == 64


@pytest.mark.parametrize("place", [0, 1])
def test_a_huge_frame_before_the_image_costs_its_connection(daemon: Any, wait_until: Any, place: int) -> None:
    running = daemon(devices=["cpu:0"])
    frames = [MAGIC, encode(Cancel(job="x"))[1]]
    with connect(running.endpoint) as peer, Polite(running):
        frames[place] = bytes(2 << 20)
        send_all(peer, [message(*frames)] * 20)
        wait_until(lambda: is_closed(peer))


@pytest.mark.slow
def test_a_million_frames_hold_the_loop_up_for_seconds_at_most(daemon: Any, wait_until: Any) -> None:
    """What is read away is read in parts: workers, pages and clients of other sockets are served meanwhile."""
    running = daemon(devices=["cpu:0"])
    part = head(0, more=True) * (1 << 19)
    with connect(running.endpoint) as peer:
        peer.sendall(part)
        peer.sendall(part + head(0))
        assert running.get("/healthz")[0] == 200
        wait_until(lambda: is_closed(peer), 20)
    assert running.client.segment(IMAGE).width == 64


@pytest.mark.slow
@pytest.mark.parametrize("attacker", ["ipc", "tcp"])
def test_what_clients_of_one_kind_send_holds_up_none_of_the_other(daemon: Any, attacker: str, wait_until: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder, contextlib.ExitStack() as stack:
        guarded = start(daemon, Path(folder), devices=["cpu:0"])
        ipc = stack.enter_context(Client(f"ipc://{folder}/client.sock"))
        tcp = stack.enter_context(guarded.client())
        many = [b""] * (1 << 20 if attacker == "ipc" else 1 << 18)
        with Polite(guarded.daemon, tcp if attacker == "ipc" else ipc):
            if attacker == "ipc":
                peer = stack.enter_context(connect(f"ipc://{folder}/client.sock"))
                peer.sendall(message(*many))
                wait_until(lambda: is_closed(peer), 30)
            else:
                stack.enter_context(guarded.dealer("bob", os.urandom(16))).send_multipart(many)
                wait_until(lambda: "too many frames" in guarded.daemon.log, 30)


@pytest.mark.slow
def test_who_is_many_clients_holds_up_no_other(daemon: Any, wait_until: Any) -> None:
    """More jobs than the queue takes, each by a client of its own that leaves."""
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        guarded = start(daemon, Path(folder), devices=["cpu:0"], timed={"latency_ms": {1: 50}})
        submit = encode(Submit(job="x", image=Image(kind="raw", shape=IMAGE.shape)), [IMAGE.tobytes()])
        with guarded.client("alice") as alice, Polite(guarded.daemon, alice):
            for _ in range(300):
                with guarded.dealer("bob", os.urandom(16)) as dealer:
                    dealer.send_multipart(submit)
                    dealer.send_multipart(encode(GetLimits()))
                    dealer.recv_multipart()
            wait_until(lambda: guarded.daemon.client.stats()["queue"]["jobs"] > 100)


def as_another_user(run: Any) -> Any:
    """What `run` returns in a process of a user that is neither root nor the daemon's."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.setgid(65534)
        os.setuid(65534)
        os.write(theirs, msgpack.packb(run()))
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as answer:
        read = answer.read()
    os.waitpid(child, 0)
    return msgpack.unpackb(read, strict_map_key=False)


def ask_for_stats(endpoint: str) -> dict[str, Any]:
    """After a job of this client has failed."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.RCVTIMEO, 10_000)
        dealer.connect(endpoint)
        dealer.send_multipart([*encode(Submit(job="mine", image=Image(kind="encoded"))), b"no image"])
        dealer.recv_multipart()
        dealer.send_multipart(encode(GetStats()))
        stats: dict[str, Any] = msgpack.unpackb(dealer.recv_multipart()[1])["stats"]
        return stats


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_a_client_sees_its_own_jobs_and_the_operator_all_but_secrets(daemon: Any, wait_until: Any) -> None:
    running = daemon(devices=["cpu:0"], worker_env={"TOKEN": "sesame"})
    with pytest.raises(JobFailed):
        running.client.segment(b"my secret image")
    for path in (running.folder, Path(running.endpoint.removeprefix("ipc://"))):
        path.chmod(0o777)
    theirs = as_another_user(lambda: ask_for_stats(running.endpoint))
    assert [failure["job"] for failure in theirs["recent_failures"]] == ["mine"]
    assert theirs["devices"][0]["wanted"] == theirs["devices"][0]["actual"] == {}
    assert theirs["devices"][0]["pid"] is None
    wait_until(lambda: len(running.client.stats()["recent_failures"]) == 2)
    operators = ask_for_stats(running.endpoint)
    assert {failure["job"] for failure in operators["recent_failures"]} > {"mine"}
    [device] = operators["devices"]
    assert device["wanted"]["env"]["TOKEN"] == device["actual"]["env"]["TOKEN"] == HIDDEN
    for text in (str(theirs), str(operators), running.get("/stats.json")[1], running.log):
        assert "sesame" not in text
    assert operators.keys() == theirs.keys()
    assert operators["devices"][0].keys() == theirs["devices"][0].keys()


def test_that_a_secret_is_another_is_told_without_it() -> None:
    wanted = Wanted(cpus="0", threads=None, task_queue=None, preload=None, env={"TOKEN": "sesame", "PLAIN": "1"})
    actual = Actual(cpus="0", threads=None, task_queue=None, preload=None, env={"TOKEN": "other"}, thread_cpus={})
    found = differences(wanted, actual, {"TOKEN"})
    shown = masked(wanted, {"TOKEN"}, wanted.env), masked(actual, {"TOKEN"}, wanted.env)
    assert found == differences(*shown, {"TOKEN"})
    assert found == ["TOKEN: wanted '(hidden)', is '(hidden), another'", "PLAIN: wanted '1', is None"]
    with pytest.raises(SettingsError) as told:
        from_tree({"worker_env": {"TOKEN": 12345}})
    assert "12345" not in str(told.value)


def test_clients_that_come_and_go_cost_few_lines(daemon: Any, wait_until: Any) -> None:
    running = daemon(devices=["cpu:0"], timed={"latency_ms": {1: 200}})
    submit = message(*encode(Submit(job="x", image=Image(kind="encoded"))), b"x" * 100)
    before, begun, clients = running.log.count("\n"), time.monotonic(), 6 * CLIENTS_PER_S
    for _ in range(clients):
        with connect(running.endpoint) as peer:
            peer.sendall(submit * 20)
    wait_until(lambda: "more lines about clients were left out" in running.log)
    running.client.segment(IMAGE)
    seconds = time.monotonic() - begun
    assert running.log.count("\n") - before <= (CLIENTS_PER_S + 1) * (seconds + 2)


def test_a_kind_of_clients_is_behind_while_messages_of_it_are_left() -> None:
    context = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    router.bind("inproc://clients")
    dealer.connect("inproc://clients")
    clients = Clients(router, "ipc")
    for _ in range(MESSAGES_PER_TURN + 1):
        dealer.send_multipart([b"BMD1", b"header"])
    assert (len(list(clients.receive())), clients.behind) == (MESSAGES_PER_TURN, True)
    assert (len(list(clients.receive())), clients.behind) == (1, False)
    context.destroy(linger=0)


def test_jobs_of_clients_that_submit_and_leave_at_once_wait_for_nobody(daemon: Any, wait_until: Any) -> None:
    running = daemon(devices=["cpu:0"], timed={"latency_ms": {1: 2000}})
    submit = message(*encode(Submit(job="x", image=Image(kind="raw", shape=(8, 8, 3)))), bytes(8 * 8 * 3))
    for _ in range(300):
        with connect(running.endpoint) as peer:
            peer.sendall(submit)
    wait_until(lambda: running.client.stats()["failures"].get("cancelled", 0) > 290)
    assert running.client.stats()["queue"]["jobs"] < 10


def evil_error(text: str) -> int:
    raise NoDaemonError(f"the server there says {text}")


def test_no_control_character_of_another_reaches_a_terminal(shared_daemon: Any, wait_until: Any, capfd: Any) -> None:
    dealer = shared_daemon.dealer()
    evil = "j\x1b[2J\n\u202e\x9b31m"
    dealer.send_multipart([MAGIC, msgpack.packb({"type": "submit", "job": evil, "image": {"kind": evil}})])
    dealer.recv_multipart()
    wait_until(lambda: any(each["job"] == evil for each in shared_daemon.client.stats()["recent_failures"]))
    snapshot = shared_daemon.client.stats()
    view = View()
    view.update(snapshot)
    for shown in (tables(snapshot), view):
        written = io.StringIO()
        Console(file=written, width=200).print(shown)
        assert not set(evil) & set(written.getvalue()) - set("j[2J31m\n")
    assert guarded("submit", lambda: evil_error(evil)) == EXIT_NO_DAEMON
    assert not set(evil) & set(capfd.readouterr().err) - set("j[2J31m\n")
    record = logging.LogRecord("x", logging.ERROR, "", 0, evil, (), (ValueError, ValueError(evil), None))
    record.about = {"job": evil}
    line = TextFormatter({}, journal=False).format(record)
    assert not set("\x1b\u202e\x9b") & set(line)
