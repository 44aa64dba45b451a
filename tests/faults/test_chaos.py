"""The chaos program: its arithmetic, a few seconds of it, and that it sees an answer that is lost or comes twice."""
from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from blendmaskd import protocol
from blendmaskd.protocol import TO_CLIENT, Code, Result
from chaos import growth, injector, program
from chaos.ledger import Ledger
from checkout import ROOT

SHORT = ["--minutes", "0.05", "--clients", "3", "--latency", "5"]


def test_the_ledger_knows_what_is_owed_and_what_came_too_often() -> None:
    ledger = Ledger()
    for number, job in enumerate(("result", "busy", "lost", "left", "twice", "wrong")):
        ledger.submit(job, float(number))
    ledger.answer("result", "result")
    ledger.answer("busy", Code.BUSY)
    ledger.answer("twice", "result")
    ledger.answer("twice", "result")
    ledger.answer("wrong", "result", "another image's")
    ledger.answer("never asked", "result")
    ledger.abandon("left")
    assert (ledger.submitted, ledger.answered, ledger.accepted, ledger.refused) == (6, 4, 4, 1)
    assert (ledger.owed, ledger.duplicated, ledger.strays, ledger.abandoned) == (1, 1, 1, 1)
    assert ledger.wrong == ["wrong: another image's"]
    assert (ledger.overdue(10.0, 9.0), ledger.overdue(12.0, 9.0)) == (0, 1)


@pytest.mark.parametrize(
    ("rate_mb_per_min", "minutes", "grows"), [(0.5, 30, False), (2.0, 30, True), (2.0, 1, False), (-3.0, 30, False)]
)
def test_growth_is_a_slope_that_lasts(rate_mb_per_min, minutes, grows) -> None:
    warm_up = [(float(second), 10.0 + second) for second in range(60)]  # what is not counted
    noise = itertools.cycle((0.0, 0.7, -0.7))
    steady = [(60.0 + s, 100 + rate_mb_per_min * s / 60 + next(noise)) for s in range(60 * minutes)]
    found = growth.of(warm_up + steady, 60.0)
    assert found is not None
    assert found.mb_per_min == pytest.approx(rate_mb_per_min, abs=0.1)
    assert found.grows is grows


@pytest.mark.parametrize(("leak_mb_per_min", "grows"), [(0.0, False), (2.0, True)])
def test_what_comes_and_goes_is_no_growth_wherever_in_the_run_it_is(leak_mb_per_min, grows) -> None:
    """Floods of 15 MB, most of them late; and so they hide none."""
    floods = {second for begin in (100, 190, 230, 250, 270, 285) for second in range(begin, begin + 12)}
    late = [(float(s), 50 + leak_mb_per_min * s / 60 + 15 * (s in floods)) for s in range(300)]
    early = [(float(s), 50 + leak_mb_per_min * s / 60 + 15 * (299 - s in floods)) for s in range(300)]
    for samples in (late, early):
        found = growth.of(samples, 60.0)
        assert found is not None
        assert found.grows is grows


def test_the_same_seed_gives_the_same_faults_each_kind_in_its_turn() -> None:
    def first(seed: int) -> list[injector.Fault]:
        return list(itertools.islice(injector.faults(seed, injector.KINDS, 2, 1.0), 3 * len(injector.KINDS)))

    assert first(1) == first(1) != first(2)
    assert {fault.kind for fault in first(1)[: len(injector.KINDS)]} == set(injector.KINDS)
    assert [fault.at for fault in first(1)] == sorted(fault.at for fault in first(1))
    assert next(injector.faults(1, (), 2, 1.0), None) is None


@pytest.mark.slow
def test_a_few_seconds_of_chaos(tmp_path, capsys) -> None:
    file = tmp_path / "chaos.json"
    kinds = "kill,crash,poison,exit,raise,bad-image,device,reload,bad-reload,vanish,mute,flood"
    code = program.main([*SHORT, "--every", "0.2", "--faults", kinds, "--json", str(file)])
    told = capsys.readouterr().out
    assert code == 0, told
    report = json.loads(file.read_text())
    assert report["failures"] == []
    assert report["jobs"]["lost"] == report["jobs"]["duplicated"] == 0
    assert report["jobs"]["answered"] == sum(report["codes"].values()) > 0
    assert sum(report["faults"].values()) >= 5
    assert "nothing lost, nothing duplicated, nothing grows" in told


class Tampering:
    """Stands between clients and daemon, and treats one result in fifty otherwise."""

    def __init__(self, daemon: str, folder: Path, how: str) -> None:
        self.endpoint = f"ipc://{folder}/tampering.sock"
        self._daemon = daemon
        self._times = {"drop": 0, "double": 2}[how]
        self._stop = threading.Event()
        self._bound = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> str:
        self._thread.start()
        self._bound.wait()
        return self.endpoint

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with zmq.Context() as context, contextlib.ExitStack() as sockets:

            def opened(kind: int) -> zmq.Socket[bytes]:
                socket = sockets.enter_context(context.socket(kind))
                socket.linger = 0
                return socket

            self._pass_on(opened)

    def _pass_on(self, opened: Callable[[int], zmq.Socket[bytes]]) -> None:
        front = opened(zmq.ROUTER)
        front.bind(self.endpoint)
        self._bound.set()
        poller = zmq.Poller()
        poller.register(front, zmq.POLLIN)
        clients: dict[bytes, zmq.Socket[bytes]] = {}
        results = 0
        while not self._stop.is_set():
            ready = dict(poller.poll(50))
            if front in ready:
                client, *frames = front.recv_multipart()
                if client not in clients:
                    clients[client] = opened(zmq.DEALER)
                    clients[client].connect(self._daemon)
                    poller.register(clients[client], zmq.POLLIN)
                clients[client].send_multipart(frames)
            for client, socket in clients.items():
                if socket in ready:
                    frames = socket.recv_multipart()
                    message: protocol.ToClient
                    message, _ = protocol.decode(frames, TO_CLIENT)
                    results += isinstance(message, Result)
                    tampered = isinstance(message, Result) and results % 50 == 0
                    for _ in range(self._times if tampered else 1):
                        front.send_multipart([client, *frames])


@pytest.mark.slow
@pytest.mark.parametrize(("how", "seen"), [("drop", "lost"), ("double", "duplicated")])
def test_it_sees_an_answer_that_is_lost_or_comes_twice(tmp_path, capsys, how, seen) -> None:
    file = tmp_path / "chaos.json"
    arguments = [*SHORT, "--faults", "none", "--deadline", "4", "--json", str(file)]
    assert program.main(arguments, lambda daemon: Tampering(daemon, tmp_path, how)) == 1
    jobs = json.loads(file.read_text())["jobs"]
    assert jobs[seen] > 0
    assert jobs["lost"] + jobs["duplicated"] == jobs[seen]
    assert "failed" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_ends_it_with_the_report_so_far() -> None:
    argv = [sys.executable, "scripts/chaos.py", "--minutes", "60", "--faults", "none", "--clients", "1"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert "sent" in run.stdout.readline()
        run.send_signal(signal.SIGINT)
        told = run.stdout.read()
    assert run.returncode == 130
    assert "(interrupted)" in told
    assert "\nlost        0\n" in told


@pytest.mark.parametrize("arguments", [["--faults", "kil"], ["--minutes", "0"], ["--every", "-1"]])
def test_wrong_arguments(arguments) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(arguments)
    assert ended.value.code == 2


def test_help_explains_every_fault(capsys) -> None:
    with pytest.raises(SystemExit):
        program.main(["--help"])
    told = capsys.readouterr().out
    assert all(f"\n{kind} " in told for kind in injector.KINDS)
