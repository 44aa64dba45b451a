"""TCP endpoints of a real daemon: who gets in, who is shut out, whose answers go to whom."""
from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import psutil
import pytest
import zmq
from curve import Guarded, free_port, nothing_more, start

from blendmaskd import keys, settings
from blendmaskd.client.blocking import AsyncClient, Client, HandshakeError
from blendmaskd.programs import stats, submit
from blendmaskd.protocol import Cancel, Code, GetStats, Image, Submit, encode
from blendmaskd.shell.sockets import Sockets
from blendmaskd_workers.benchmark import program as benchmark
from checkout import ROOT

IMAGE = np.zeros((48, 64, 3), np.uint8)
SUBMIT = encode(Submit(job="job", image=Image(kind="raw", shape=IMAGE.shape)), [IMAGE.tobytes()])

FEW_DESCRIPTORS = 150


@pytest.fixture(scope="module")
def guarded(start_daemons) -> Iterator[Guarded]:
    """For tests that leave keys as they find them."""
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        yield start(start_daemons, Path(folder))


@pytest.fixture
def slow(daemon) -> Iterator[Guarded]:
    """One device, 0.5 s an image, so that jobs are unanswered for a while."""
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        yield start(daemon, Path(folder), devices=["cpu:0"], timed={"latency_ms": {1: 500}})


def _submit(dealer, names) -> None:
    for name in names:
        dealer.send_multipart(encode(Submit(job=str(name), image=Image(kind="raw", shape=(1, 1, 3))), [b"\0\0\0"]))


def _answer(dealer) -> dict:
    return msgpack.unpackb(dealer.recv_multipart()[1])


# -- who gets in -------------------------------------------------------------------------------------------------------


def test_an_allowed_client_is_served(guarded: Guarded) -> None:
    with guarded.client() as client:
        assert client.segment(IMAGE).width == 64
        assert client.stats()["serving"]


def test_the_async_client_is_served_and_refused(guarded: Guarded) -> None:
    async def segment(name: str) -> int:
        options = {"server_key": guarded.server_key, "key": guarded.secret(name), "timeout_s": 20}
        async with AsyncClient(guarded.tcp, **options) as client:
            widths = await asyncio.gather(*(client.segment(IMAGE) for _ in range(3)))
            return sum(each.width for each in widths)

    assert asyncio.run(segment("alice")) == 3 * 64
    with pytest.raises(HandshakeError, match="does not allow this key"):
        asyncio.run(segment("ursula"))


def test_ipc_needs_no_key(guarded: Guarded) -> None:
    with Client(guarded.daemon.endpoint, timeout_s=20) as client:
        assert client.segment(IMAGE).width == 64
    assert guarded.daemon.client.stats()["serving"]


def test_a_refused_client_is_told_what_to_do(guarded: Guarded) -> None:
    with guarded.client("ursula") as client:
        for ask in (lambda: client.segment(IMAGE), client.stats, lambda: list(client.map([IMAGE] * 20))):
            with pytest.raises(HandshakeError, match=r"does not allow this key: copy .*ursula.key, into the folder"):
                ask()
    with guarded.client(key=None, server_key=None, timeout_s=2) as client, pytest.raises(
        (HandshakeError, TimeoutError), match=r"require.* keys"  # who hangs up first decides
    ):
        client.segment(IMAGE)
    with guarded.client(server_key=guarded.folder / "bob.key", timeout_s=1) as client, pytest.raises(
        TimeoutError, match=r"handshakes failed: is .*bob.key the public key of this daemon\?"
    ):
        client.segment(IMAGE)


def test_a_client_with_keys_meets_a_daemon_without(daemon, tmp_path) -> None:
    tcp = f"tcp://127.0.0.1:{free_port()}"
    running = daemon(endpoints={"clients": [tcp], "metrics": None}, insecure_tcp=True)
    assert "insecure_tcp: anyone who can reach" in running.log
    for name in ("alice", "server"):
        keys.write_pair(tmp_path, name)
    options = {"server_key": tmp_path / "server.key", "key": tmp_path / "alice.key_secret", "timeout_s": 2}
    refused = pytest.raises((HandshakeError, TimeoutError), match=r"does not use keys|the public key of this daemon")
    with Client(tcp, **options) as client, refused:
        client.segment(IMAGE)


@pytest.mark.parametrize(
    ("endpoint", "arguments", "reason"),
    [
        ("tcp://localhost:1", {"server_key": "server.key"}, "both keys are needed: key "),
        ("tcp://localhost:1", {"key": "alice.key_secret"}, "both keys are needed: server_key "),
        ("tcp://localhost:1", {"server_key": "none.key", "key": "alice.key_secret"}, "none.key: No such file"),
        ("tcp://localhost:1", {"server_key": "server.key", "key": "alice.key"}, "has no secret key"),
        ("ipc://x", {"server_key": "server.key", "key": "alice.key_secret"}, "keys are for tcp"),
    ],
)
def test_keys_that_cannot_be_used_are_refused_at_once(tmp_path, monkeypatch, endpoint, arguments, reason) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("alice", "server"):
        keys.write_pair(tmp_path, name)
    with pytest.raises(ValueError, match=reason):
        Client(endpoint, **arguments)


def test_programs_take_keys_from_flags_and_the_environment(guarded: Guarded, capsys, monkeypatch, tmp_path) -> None:
    flags = ["--server-key", str(guarded.server_key), "--key", str(guarded.secret("alice"))]
    assert stats.main([guarded.tcp, "--json", *flags]) == 0
    photograph = str(ROOT / "tests" / "golden" / "images" / "chelsea.png")
    assert submit.main([guarded.tcp, photograph, "--out", str(tmp_path / "out"), *flags]) == 0
    brief = ["--seconds", "0.3", "--warm-up", "0.1", "--rounds", "1", "--size", "64x64"]
    assert benchmark.main(["--endpoint", guarded.tcp, *brief, *flags]) == 0
    monkeypatch.setenv("BLENDMASKD_SERVER_KEY", str(guarded.server_key))
    monkeypatch.setenv("BLENDMASKD_KEY", str(guarded.secret("alice")))
    assert stats.main([guarded.tcp, "--json"]) == 0
    assert stats.main([guarded.daemon.endpoint, "--json"]) == 0, "they are not for ipc"
    capsys.readouterr()
    ursula = ["--key", str(guarded.secret("ursula"))]
    assert stats.main([guarded.tcp, *ursula]) == 3
    assert submit.main([guarded.tcp, photograph, "--out", str(tmp_path / "none"), *ursula]) == 3
    assert benchmark.main(["--endpoint", guarded.tcp, *brief, *ursula]) == 3
    assert capsys.readouterr().err.count("does not allow this key") == 3


def test_the_raw_client_with_keys_runs_as_it_stands(guarded: Guarded, tmp_path) -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    [text] = [block for block in page.split("```python\n")[1:] if "curve_serverkey" in block]
    text = text.partition("```")[0]
    assert "daemon" not in text
    assert len(text.strip().splitlines()) <= 14
    (tmp_path / "raw_client.py").write_text(text)
    photograph = ROOT / "tests" / "golden" / "images" / "chelsea.png"
    done = subprocess.run(
        [sys.executable, "-I", "raw_client.py", guarded.tcp, guarded.server_key, guarded.secret("alice"), photograph],
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert "[0.0, 0.0, 451.0, 300.0]" in done.stdout


# -- keys that come and go ---------------------------------------------------------------------------------------------


def test_a_key_is_added_and_removed_without_a_restart(daemon, wait_until) -> None:
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        guarded = start(daemon, Path(folder))
        with guarded.client("ursula") as client, guarded.client("alice") as other:
            with pytest.raises(HandshakeError):
                client.segment(IMAGE)
            guarded.allow("ursula")
            assert client.segment(IMAGE).width == 64
            assert "client key ursula: may connect" in guarded.daemon.log
            guarded.forbid("ursula")
            wait_until(lambda: "client key ursula: shut out" in guarded.daemon.log)
            with pytest.raises(HandshakeError, match="does not allow this key"):
                client.segment(IMAGE)
            assert other.segment(IMAGE).width == 64
            guarded.allow("ursula")
            assert client.segment(IMAGE).width == 64


def test_jobs_of_a_removed_key_end_and_its_connection_is_closed(slow: Guarded, wait_until) -> None:
    with slow.dealer("bob", b"b" * 16) as bob, slow.client("alice") as alice:
        _submit(bob, range(20))
        wait_until(lambda: alice.stats()["queue"]["jobs"] > 10)
        slow.forbid("bob")
        answers = [_answer(bob) for _ in range(20)]
        refused = [answer for answer in answers if answer.get("code") == Code.UNAUTHORISED]
        assert len(refused) > 10
        assert {answer["job"] for answer in answers} == set(map(str, range(20)))
        assert alice.stats()["failures"][Code.UNAUTHORISED] <= len(refused)
        assert alice.segment(IMAGE).width == 64
        bob.send_multipart(SUBMIT)
        bob.set(zmq.RCVTIMEO, 300)
        with pytest.raises(zmq.Again):
            bob.recv_multipart()
        wait_until(lambda: "had a key that is not allowed" in slow.daemon.log, 30)


# -- identities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", [b"", b"alice"], ids=["ZeroMQ's own", "short"])
def test_an_identity_that_can_be_guessed_is_refused(guarded: Guarded, identity: bytes) -> None:
    with guarded.dealer("alice", identity) as dealer:
        dealer.send_multipart(SUBMIT)
        answer = _answer(dealer)
        assert (answer["job"], answer["code"]) == ("job", Code.UNAUTHORISED)
        assert "16 random bytes" in answer["reason"]
        dealer.send_multipart(encode(GetStats()))
        assert _answer(dealer)["code"] == Code.UNAUTHORISED


def test_one_client_is_refused_under_another_s_identity(slow: Guarded, wait_until) -> None:
    identity = os.urandom(16)
    with slow.client("alice") as watcher, slow.dealer("alice", identity, reconnect_ms=-1) as alice:
        _submit(alice, range(20))
        wait_until(lambda: watcher.stats()["queue"]["jobs"] > 10)
        with slow.dealer("bob", identity) as bob:
            _submit(bob, ["theirs"])
            answer = _answer(bob)
            if answer["type"] == "result":  # it was sent before the message could be judged: see docs/security.md
                answer = _answer(bob)
            assert (answer["job"], answer["code"]) == ("theirs", Code.UNAUTHORISED)
            assert "another key" in answer["reason"]
            wait_until(lambda: watcher.stats()["failures"].get(Code.CANCELLED, 0) > 10)
            watcher.segment(IMAGE)  # by then the answer of what was on the device would have come
            assert nothing_more(bob)
    assert "another key took its identity" in slow.daemon.log
    assert identity.hex() not in slow.daemon.log


@pytest.mark.slow
def test_a_client_that_reconnects_gets_its_answers(slow: Guarded, wait_until) -> None:
    """ROUTER_HANDOVER is for this: the same key comes back under the same identity."""
    identity = os.urandom(16)
    with slow.client("alice") as watcher, slow.dealer("alice", identity) as first:
        _submit(first, range(10))
        wait_until(lambda: watcher.stats()["queue"]["jobs"] > 5)
        with slow.dealer("alice", identity) as second:
            _submit(second, range(10))
            answers = [_answer(second) for _ in range(watcher.stats()["queue"]["jobs"])]
            assert {answer["type"] for answer in answers} == {"result"}
            assert len({answer["job"] for answer in answers}) == len(answers)


def test_a_local_process_cannot_pose_as_a_key(guarded: Guarded) -> None:
    """ZMTP lets a peer claim any property, User-Id too: on ipc the kernel's word decides."""
    key = keys.read_public(guarded.folder / "alice.key")
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(guarded.daemon.endpoint.removeprefix("ipc://"))
        raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\0" + bytes(31))
        stream = raw.makefile("rb")
        assert len(stream.read(64)) == 64  # the daemon's greeting
        ready = b"\x05READY" + _property(b"Socket-Type", b"DEALER") + _property(b"User-Id", key)
        raw.sendall(b"\x04" + bytes([len(ready)]) + ready)
        assert b"READY" in stream.read(8)
        frames = encode(GetStats())
        for frame, flag in zip(frames, (b"\x01", b"\x00")):
            raw.sendall(flag + bytes([len(frame)]) + frame)
        received = b""
        while b"combined_fps" not in received:
            chunk = raw.recv(65536)
            assert chunk, received
            received += chunk


def _speak_zmtp_1(endpoint: str) -> socket.socket:
    """A peer of the oldest protocol, of which ZeroMQ knows no address and no descriptor, sends what is no message."""
    raw = socket.socket(socket.AF_UNIX)
    raw.settimeout(10)
    raw.connect(endpoint.removeprefix("ipc://"))
    raw.sendall(b"\x01\0" + b"\x08\0nonsens")
    return raw


def test_a_peer_of_the_oldest_protocol_is_refused_on_ipc(shared_daemon) -> None:
    """Nobody could close its connection, whatever it sent."""
    with _speak_zmtp_1(shared_daemon.endpoint) as raw:
        received = b""
        while b"ZMTP 3" not in received:
            chunk = raw.recv(4096)
            assert chunk, received
            received += chunk
    assert shared_daemon.client.segment(IMAGE).width == 64


def test_where_keys_are_needed_a_peer_of_the_oldest_protocol_is_dropped(guarded: Guarded, wait_until) -> None:
    client = guarded.daemon.client
    before = client.stats()["failures"].get("unauthorised", 0)
    with _speak_zmtp_1(guarded.daemon.endpoint):
        wait_until(lambda: client.stats()["failures"].get("unauthorised", 0) > before)
    assert client.segment(IMAGE).width == 64


def test_no_identity_is_taken_for_one_of_the_daemon_s_own(daemon, tmp_path) -> None:
    running = daemon(devices=["cpu:0"], spool=str(tmp_path / "spool"))
    ours = (b"\0durable", b"durable", bytes(5), b"cpu:0.1", b"\0tcp:", b"\0tcp:a", b"\0ipc:a")
    for identity in (*ours, b"a", bytes(255)):
        with zmq.Context.instance().socket(zmq.DEALER) as dealer:
            dealer.set(zmq.LINGER, 0)
            dealer.set(zmq.RCVTIMEO, 10_000)
            dealer.set(zmq.IDENTITY, identity)
            dealer.connect(running.endpoint)
            _submit(dealer, ["mine"])
            assert _answer(dealer)["job"] == "mine"
    assert running.client.segment(IMAGE).width == 64


def test_a_local_client_cannot_have_the_name_of_a_remote_one(slow: Guarded) -> None:
    identity = b"0123456789abcdef"
    with slow.dealer(identity=identity) as remote, zmq.Context.instance().socket(zmq.DEALER) as local:
        local.set(zmq.LINGER, 0)
        local.set(zmq.RCVTIMEO, 10_000)
        local.set(zmq.IDENTITY, b"\0tcp:" + identity)
        local.connect(slow.daemon.endpoint)
        _submit(remote, ["first", "second"])
        assert _answer(remote)["type"] == "result"
        local.send_multipart(encode(Cancel(job="second")))
        local.send_multipart(encode(GetStats()))
        assert _answer(local)["type"] == "stats"
        answer = _answer(remote)
        assert (answer["type"], answer["job"]) == ("result", "second")


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value


# -- how many ----------------------------------------------------------------------------------------------------------


def test_the_oldest_silent_connection_makes_room(daemon, wait_until) -> None:
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        guarded = start(daemon, Path(folder), limits={"max_connections": 5})
        with guarded.client("alice") as client:
            client.segment(IMAGE)
            silent = [socket.create_connection(("127.0.0.1", guarded.port)) for _ in range(20)]
            try:
                closed = wait_until(lambda: [place for place in (0, -1) if _closed(silent[place])])
                assert 0 in closed, "the newest had to go"
                assert client.segment(IMAGE).width == 64
                with guarded.client("bob") as other:
                    assert other.segment(IMAGE).width == 64
                assert client.segment(IMAGE).width == 64
            finally:
                for connection in silent:
                    connection.close()
        wait_until(lambda: "were too many at once" in guarded.daemon.log, 30)


def test_clients_beyond_the_bound_are_turned_away_and_come_in_when_there_is_room(daemon) -> None:
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        guarded = start(daemon, Path(folder), limits={"max_connections": 2})
        first, second = guarded.client("alice"), guarded.client("alice")
        with first, guarded.client("bob", timeout_s=1) as third:
            with second:
                first.segment(IMAGE)
                second.segment(IMAGE)
                with pytest.raises(TimeoutError):
                    third.segment(IMAGE)
                assert first.segment(IMAGE).width == 64
            third.timeout_s = 20
            assert third.segment(IMAGE).width == 64


def test_a_message_that_is_too_long_ends_its_connection_and_no_other(daemon) -> None:
    """ZeroMQ reads its length and no further; a payload that is only too large for an image is answered."""
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        guarded = start(daemon, Path(folder), limits={"max_image_bytes": 1 << 20})
        with guarded.client("bob") as bob, guarded.dealer("alice", os.urandom(16)) as alice:
            assert bob.segment(IMAGE).width == 64
            head = encode(Submit(job="large", image=Image(kind="encoded")))
            alice.send_multipart([*head, bytes(2 << 20)])
            assert _answer(alice)["code"] == Code.TOO_LARGE
            with alice.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
                alice.send_multipart([*head, bytes(4 << 20)])
                assert monitor.poll(20_000)
            assert bob.segment(IMAGE).width == 64


def test_few_descriptors_leave_room_for_workers(daemon, wait_until) -> None:
    """At the limit of descriptors the daemon could not start a worker anew; strangers never get it there."""
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder, contextlib.ExitStack() as stack:
        guarded = start(daemon, Path(folder), files=FEW_DESCRIPTORS, devices=["cpu:0"])
        process = psutil.Process(guarded.daemon.process.pid)
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", guarded.port), timeout=30))
                  for _ in range(2 * FEW_DESCRIPTORS)]  # fmt: skip
        wait_until(lambda: _closed(silent[0]), 30)
        wait_until(lambda: process.num_fds() < FEW_DESCRIPTORS - 20, 30)
        before = guarded.daemon.pids()["cpu:0"]
        psutil.Process(before).kill()
        wait_until(lambda: guarded.daemon.pids()["cpu:0"] not in (None, before), 30)
        guarded.daemon.wait_ready()


def _closed(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


# -- at the start ------------------------------------------------------------------------------------------------------


def _start_fails(tmp_path: Path, *overrides: str) -> str:
    argv = [sys.executable, "-m", "blendmaskd", "--devices", "cpu:0", "--set", "engine=timed"]
    for override in overrides:
        argv += ["--set", override]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 78, done.stderr
    return done.stderr


def test_tcp_without_keys_is_refused(tmp_path) -> None:
    said = _start_fails(tmp_path, "endpoints.clients=[tcp://127.0.0.1:1]")
    assert "tcp://127.0.0.1:1' without keys is open" in said
    assert "blendmaskd-keys server FOLDER" in said
    assert "insecure_tcp: true" in said


def test_keys_that_cannot_be_used_stop_the_start(tmp_path) -> None:
    keys.main(["server", str(tmp_path)])
    tcp = f"endpoints.clients=[tcp://127.0.0.1:{free_port()}]"
    server, clients = f"curve.server_key={tmp_path}/server.key_secret", f"curve.client_keys={tmp_path}/clients"
    assert "curve.server_key is set, curve.client_keys is not" in _start_fails(tmp_path, tcp, server)
    assert "curve.client_keys is set, curve.server_key is not" in _start_fails(tmp_path, tcp, clients)
    assert "secured by curve.server_key" in _start_fails(tmp_path, tcp, server, clients, "insecure_tcp=true")
    assert "no such folder" in _start_fails(tmp_path, tcp, server, f"curve.client_keys={tmp_path}/none")
    (tmp_path / "server.key_secret").chmod(0o640)
    assert "others can read it: chmod 600" in _start_fails(tmp_path, tcp, server, clients)
    assert "No such file" in _start_fails(tmp_path, tcp, f"curve.server_key={tmp_path}/none", clients)


def test_a_reload_does_not_change_keys(daemon) -> None:
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        guarded = start(daemon, Path(folder))
        running = guarded.daemon
        running.rewrite(curve={}, insecure_tcp=True)
        running.process.send_signal(1)
        with guarded.client() as client:
            while "insecure_tcp: a change needs a restart" not in running.log and "curve: a change" not in running.log:
                client.segment(IMAGE)
            assert client.segment(IMAGE).width == 64


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077], ids="{:03o}".format)
def test_ipc_sockets_are_never_for_others(umask: int) -> None:
    """A deliberate choice: owner and group as the umask says, others never, whatever it says."""
    before = os.umask(umask)
    try:
        with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
            endpoints = {"clients": [f"ipc://{folder}/new/client.sock"], "metrics": None}
            with Sockets(settings.from_tree({"devices": ["cpu:0"], "endpoints": endpoints})) as sockets:
                modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in Path(folder).rglob("*")}
                workers = Path(sockets.workers_endpoint.removeprefix("ipc://")).parent
                assert stat.S_IMODE(workers.stat().st_mode) == 0o700
            assert os.umask(umask) == umask, "it is put back"
    finally:
        os.umask(before)
    ours = 0o777 & ~umask & ~0o007
    assert modes == {"new": ours, "client.sock": ours, "client.sock.fd": ours, "client.sock.lock": ours & 0o666}


def test_pages_that_are_open_to_all_are_warned_of(daemon) -> None:
    endpoints = {"clients": [f"tcp://127.0.0.1:{free_port()}"], "metrics": "0.0.0.0:0"}
    running = daemon(endpoints=endpoints, insecure_tcp=True)
    assert "endpoints.metrics 0.0.0.0:0: open to anyone who can reach the port" in running.log
