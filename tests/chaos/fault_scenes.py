"""Run the six scenes in which other servers were measured, and print this one's row of the table, in Markdown.

Two timed devices at 21.7 ms an image, 8 clients in a closed loop, images of 150 KB by socket, no retries.

1. kill -9 of a worker under load: what its clients see
2. images per second before, and 10 to 14 s later
3. what /healthz and /readyz say while the worker is down
4. 40 clients with a job each leave: how many of their jobs still run on a device
5. 600 jobs at once, from 600 connections: answers by code, and the slowest of each
6. SIGTERM with 8 jobs in flight: how many are answered, how long it takes, the exit code, what is left behind

  python scripts/fault_scenes.py                  # the row
  python scripts/fault_scenes.py --json row.json  # also save the figures
  python scripts/fault_scenes.py --seconds 2      # a short one: not 10 to 14 s later, but 2 to 4

Exit codes: 0 measured, whatever came out · 2 wrong arguments · 3 the daemon did not come up · 130 Ctrl-C.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import zmq
from rich.console import Console

from blendmaskd import files, protocol
from blendmaskd.output import Help
from blendmaskd.programs.arguments import output_file, seconds
from blendmaskd.programs.errors import guarded
from blendmaskd.protocol import TO_CLIENT, Failed, Options, Result
from blendmaskd_workers.benchmark import load
from blendmaskd_workers.benchmark.generator import Generator
from blendmaskd_workers.benchmark.load import ClosedLoop
from blendmaskd_workers.benchmark.load_socket import Sending
from blendmaskd_workers.benchmark.pictures import Picture, synthetic
from chaos.host import Host, own_host

LATENCY_MS = 21.7
CLIENTS, LEAVING, FLOOD = 8, 40, 600
SIZE = (200, 250)  # raw: 150 000 bytes
DEADLINE_S = 60.0
ANSWERS = ("| server | kill -9 one worker: client sees | FPS before -> {late} later | health meanwhile "
           "| 40 clients leave: model calls still run | 600 at once: codes, slowest "
           "| SIGTERM: in flight, exit, left behind |")  # fmt: skip

Figures = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    return guarded("fault_scenes", lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False)
    overrides = {
        "timed": {"latency_ms": {1: LATENCY_MS}},
        "restarts": {},  # as they are by default
        "worker_env": {},
    }
    picture = synthetic(SIZE, "raw")
    figures: Figures = {}
    with own_host(2, arguments.log, overrides, metrics="127.0.0.1:0") as host:
        for name, scene in (("kill", _kill), ("leave", _leave), ("flood", _flood), ("sigterm", _sigterm)):
            with console.status(name):
                figures[name] = scene(host, picture, arguments.seconds)
    print(row(figures, arguments.seconds))
    if arguments.json:
        files.write_json(arguments.json, figures)
    return 0


# -- the scenes -------------------------------------------------------------------------------------------------------


def _kill(host: Host, picture: Picture, seconds: float) -> Figures:
    """Load, kill -9 of a worker, and what is seen of it for `seconds` times 1.4."""
    pages: Counter[str] = Counter()
    with Generator(host.endpoint, [picture], CLIENTS, Sending("socket", Options(), DEADLINE_S, 1)) as generator:
        generator.begin(ClosedLoop(CLIENTS, time.monotonic()))
        generator.run(min(2.0, seconds))
        start = time.monotonic()
        generator.run(seconds)
        killed = time.monotonic()
        generation = generator.stats()["devices"][0]["generation"]
        host.signal_worker(host.devices[0], signal.SIGKILL)
        ready = math.inf
        while time.monotonic() < killed + seconds * 1.4:
            generator.run(0.1)
            if ready == math.inf:
                stats = generator.stats()
                seen = stats["devices"][0]["generation"] != generation and not stats["degraded"]
                ready = time.monotonic() - killed if seen else math.inf
                pages[_health(host)] += 1
        end = time.monotonic()
        generator.drain()
        failures = Counter(sample.code for sample in generator.samples if sample.code)
        late = [sample for sample in generator.samples if sample.answered != math.inf]
        return {
            "failures": dict(failures),
            "wrong": sum(sample.wrong for sample in generator.samples),
            "before_fps": load.rate(generator.samples, start, killed),
            "later_fps": load.rate(generator.samples, killed + seconds, end),
            "ready_s": ready,
            "slowest_s": max(sample.answered - sample.sent for sample in late),
            "health": list(pages),
        }


def _leave(host: Host, picture: Picture, seconds: float) -> Figures:
    """Each client sends a job, and all leave when the first two have their answers: so the daemon has them all."""
    _wait_until_idle(host)
    before = _images(host)
    answered = 0
    with _connected(host, LEAVING) as (sockets, poller):
        _submit(sockets, picture)
        while answered < 2 and (ready := poller.poll(int(DEADLINE_S * 1000))):
            for socket, _ in ready:
                socket.recv_multipart()
            answered += len(ready)
    _wait_until_idle(host)
    return {"clients": LEAVING - answered, "ran": _images(host) - before - answered}


def _flood(host: Host, picture: Picture, seconds: float) -> Figures:
    """A job from each of many connections, all at once."""
    codes: Counter[str] = Counter()
    slowest: dict[str, float] = {}
    with _connected(host, FLOOD) as (sockets, poller):
        sent = time.monotonic()
        _submit(sockets, picture)
        for code in itertools.islice(_answers(poller, DEADLINE_S), FLOOD):
            codes[code] += 1
            slowest[code] = time.monotonic() - sent
    return {"jobs": FLOOD, "codes": dict(codes), "slowest_s": slowest}


def _sigterm(host: Host, picture: Picture, seconds: float) -> Figures:
    """SIGTERM to the daemon with a job of each client in flight."""
    processes = [psutil.Process(host.process.pid), *psutil.Process(host.process.pid).children()]
    with _connected(host, CLIENTS) as (sockets, poller):
        _submit(sockets, picture)
        before, end = _images(host), time.monotonic() + 2.0
        while not (_now(host)["leased"] or _images(host) > before) and time.monotonic() < end:
            time.sleep(0.02)
        _submit(sockets, picture, "in flight ")  # the first ones are done by now
        time.sleep(0.01)  # they arrive; a signal has no order with them
        begun = time.monotonic()
        host.process.send_signal(signal.SIGTERM)
        code = host.process.wait(DEADLINE_S)
        took = time.monotonic() - begun
        answers = Counter(_answers(poller, 1.0))  # what was sent is on its way here
    left = [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    return {"jobs": 2 * CLIENTS, "answers": dict(answers), "exit": code, "took_s": took, "left": len(left)}


# -- the row ----------------------------------------------------------------------------------------------------------


def row(figures: Figures, seconds: float) -> str:
    kill, leave, flood, end = (figures[name] for name in ("kill", "leave", "flood", "sigterm"))
    seen = ", ".join(f"{number} x {code}" for code, number in kill["failures"].items()) or "nothing failed"
    wrong = f", {kill['wrong']} wrong" if kill["wrong"] else ""
    codes = ", ".join(f"{number} x {code}, slowest {flood['slowest_s'][code]:.1f} s"
                      for code, number in sorted(flood["codes"].items()))  # fmt: skip
    missing = flood["jobs"] - sum(flood["codes"].values())
    answers = ", ".join(f"{number} {code}" for code, number in sorted(end["answers"].items()))
    cells = [
        "blendmaskd",
        f"{seen}{wrong}; slowest {kill['slowest_s']:.2f} s",
        f"{kill['before_fps']:.1f} -> {kill['later_fps']:.1f}, restart within {kill['ready_s']:.1f} s",
        "; ".join(kill["health"]),
        f"{leave['ran']} of {leave['clients']}",
        codes + (f", {missing} never" if missing else ""),
        f"{sum(end['answers'].values())}/{end['jobs']} answered ({answers}), {end['took_s']:.1f} s, "
        f"exit {end['exit']}, " + (f"{end['left']} processes left" if end["left"] else "clean"),
    ]
    head = ANSWERS.format(late=f"{seconds:g}-{1.4 * seconds:g} s")
    return f"{head}\n|{'---|' * len(cells)}\n| {' | '.join(cells)} |"


# -- inside -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _connected(host: Host, number: int) -> Iterator[tuple[list[zmq.Socket[bytes]], zmq.Poller]]:
    """So many clients, all gone at once when this is left."""
    context, poller = zmq.Context(), zmq.Poller()
    context.set(zmq.MAX_SOCKETS, 2 * FLOOD)
    sockets = [context.socket(zmq.DEALER) for _ in range(number)]
    for socket in sockets:
        socket.connect(host.endpoint)
        poller.register(socket, zmq.POLLIN)
    try:
        yield sockets, poller
    finally:
        context.destroy(linger=0)


def _submit(sockets: Sequence[zmq.Socket[bytes]], picture: Picture, name: str = "") -> None:
    for number, socket in enumerate(sockets):
        submission = protocol.Submit(job=f"{name}{number}", image=picture.image)
        socket.send_multipart(protocol.encode(submission, [picture.payload or b""]))


def _answers(poller: zmq.Poller, patience_s: float) -> Iterator[str]:
    """Their codes, until for so long none comes."""
    while ready := poller.poll(int(patience_s * 1000)):
        for socket, _ in ready:
            message: protocol.ToClient
            message, _ = protocol.decode(socket.recv_multipart(), TO_CLIENT)
            assert isinstance(message, Result | Failed)
            yield "result" if isinstance(message, Result) else str(message.code)


def _now(host: Host) -> dict[str, Any]:
    """The latest snapshot; at most a second old."""
    with host.client() as client:
        return client.stats()


def _images(host: Host) -> int:
    return sum(device["images"] for device in _now(host)["devices"])


def _wait_until_idle(host: Host) -> None:
    """Until no job is there, and workers and snapshots, each a second apart, have told of all."""
    idle_since = math.inf
    while time.monotonic() < idle_since + 2.5:
        now = _now(host)
        if now["queue"]["jobs"] or now["leased"]:
            idle_since = math.inf
        elif idle_since == math.inf:
            idle_since = time.monotonic()
        time.sleep(0.05)


def _health(host: Host) -> str:
    """Both pages, as a load balancer sees them."""
    ports = [c.laddr.port for c in psutil.Process(host.process.pid).net_connections("tcp4")
             if c.status == psutil.CONN_LISTEN]  # fmt: skip
    texts = []
    for page in ("healthz", "readyz"):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/{page}", timeout=10) as response:
                texts.append(f"/{page} {response.status} `{response.read().decode().splitlines()[0]}`")
        except urllib.error.HTTPError as error:
            with error:
                texts.append(f"/{page} {error.code}")
    return ", ".join(texts)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fault_scenes", description=__doc__, formatter_class=Help)
    parser.add_argument("--seconds", metavar="S", type=seconds, default=10.0,
                        help="before the kill, and until the later rate; default 10")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", type=output_file, help="all figures")
    parser.add_argument("--log", metavar="FILE", type=output_file, help="keep the daemon's log")
    return parser.parse_args(argv)
