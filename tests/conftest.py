"""A real daemon for tests: its own process, real sockets, the timed engine, no process left behind.

`daemon(**settings)` starts one and waits until it is ready; `shared_daemon` is one for all tests that neither change
nor harm it. Conditions are waited for with `wait_until`, never with a sleep.
"""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import hypothesis
import psutil
import pytest
import yaml
import zmq

from blendmaskd.client.blocking import Client
from checkout import ROOT

DEFAULTS: dict[str, Any] = {
    "devices": ["cpu:0", "cpu:1"],
    "engine": "timed",
    "timed": {"latency_ms": {1: 5}},
    "drain_s": 5,
    "restarts": {"first_delay_s": 0.05, "stop_s": 2},
}
START_S = 30.0
STOP_S = 20.0

T = TypeVar("T")


def pytest_configure() -> None:
    _give_children_default_signals()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: fixtures end, and with them their processes
    any_speed = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
    hypothesis.settings.register_profile("new", any_speed)  # a busy machine is no reason to fail
    hypothesis.settings.register_profile("same", any_speed, derandomize=True)  # what failed once fails again
    hypothesis.settings.load_profile("same")


def _give_children_default_signals() -> None:
    """However these tests were started: a child keeps what is ignored or blocked, as it is after nohup, after `&` in a
    script and in some CI. What was to be ignored we still ignore, but by a handler, which ends with exec.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # Python ignores these, not its children
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, _ignore)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under ``-n`` a file stays in one process, which makes its fixtures once; so do all files that use Ray."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/cluster" if nodeid.startswith("tests/cluster/") else nodeid.partition("::")[0]

    return ByFile(config, log)


def _wait_until(condition: Callable[[], T], timeout_s: float = 10.0) -> T:
    """The condition's value as soon as it is true. Fails with its last value when that takes `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s, last: {value!r}"
        time.sleep(0.01)
    return value


class WaitUntil(Protocol):
    def __call__(self, condition: Callable[[], T], timeout_s: float = 10.0) -> T: ...


class Daemon:
    """A running daemon. `settings` is the tree in its file, which `rewrite` changes."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], environment: Mapping[str, str], files: int | None = None
    ) -> None:
        self.folder = folder
        self._limit = [] if files is None else ["sh", "-c", f'ulimit -Sn {files}; exec "$@"', "sh"]
        self.settings_file = folder / "daemon.yaml"
        self.settings: dict[str, Any] = {
            "endpoints": {"clients": [f"ipc://{folder}/client.sock"], "metrics": "127.0.0.1:0"}
        }
        self.rewrite(**{**DEFAULTS, **settings})
        self.endpoint: str = self.settings["endpoints"]["clients"][0]
        self._environment = {**os.environ, "TMPDIR": str(folder), **environment}
        self._clients: list[Client] = []
        self._sockets: list[zmq.Socket[Any]] = []
        self.start()

    def rewrite(self, **settings: Any) -> None:
        """Change settings in the file; SIGHUP makes the daemon read it."""
        self.settings |= settings
        self.settings_file.write_text(yaml.safe_dump(self.settings))

    def start(self) -> None:
        """Start it, again after it was killed, on the same endpoints."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._limit, sys.executable, "-m", "blendmaskd", "--settings", self.settings_file],
                cwd=ROOT, env=self._environment, stderr=log,
            )  # fmt: skip

    @property
    def log_file(self) -> Path:
        return self.folder / "log"

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def client(self) -> Client:
        """A client of this test, made when first asked for."""
        return self._clients[0] if self._clients else self.connect()

    def connect(self, **options: Any) -> Client:
        """Another client, closed at the end."""
        self._clients.append(Client(self.endpoint, **{"timeout_s": 20.0, **options}))
        return self._clients[-1]

    def dealer(self) -> zmq.Socket[Any]:
        """A bare socket to the daemon, as a client in any language has it, closed at the end. It waits 10 s at most."""
        socket = zmq.Context.instance().socket(zmq.DEALER)
        self._sockets.append(socket)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RCVTIMEO, 10_000)
        socket.connect(self.endpoint)
        return socket

    @property
    def metrics_url(self) -> str:
        """``http://127.0.0.1:PORT``."""
        listening = [c.laddr.port for c in psutil.Process(self.process.pid).net_connections("tcp4")
                     if c.status == psutil.CONN_LISTEN]  # fmt: skip
        ports = [port for port in listening if not self.endpoint.endswith(f":{port}")]
        return f"http://127.0.0.1:{ports[0]}"

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a page such as ``/readyz``."""
        try:
            with urllib.request.urlopen(self.metrics_url + path, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def devices(self) -> dict[str, dict[str, Any]]:
        """The latest snapshot's devices by name; empty before the first."""
        return {device["device"]: device for device in self.client.stats().get("devices", [])}

    def states(self) -> dict[str, str]:
        return {name: device["state"] for name, device in self.devices().items()}

    def pids(self) -> dict[str, int]:
        return {name: device["pid"] for name, device in self.devices().items()}

    def wait_ready(self) -> None:
        """Until every device is ready. Fails at once, with the log, when the daemon ends instead."""

        def ready() -> bool:
            assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}:\n{self.log}"
            return set(self.states().values()) == {"ready"}

        _wait_until(ready, START_S)

    def processes(self) -> list[psutil.Process]:
        """All that live of this daemon: itself and its workers, orphans too. Each has our TMPDIR."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("TMPDIR") == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def kill(self) -> None:
        """kill -9 of the daemon alone."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Drain and stop; fails when that does not work or leaves a process."""
        for client in self._clients:
            client.close()
        for socket in self._sockets:
            socket.close()
        running = self.process.poll() is None
        try:
            if running:
                self.process.send_signal(signal.SIGTERM)
                self.process.wait(STOP_S)
            _wait_until(lambda: not self.processes())
        except (subprocess.TimeoutExpired, AssertionError):
            left = [(process.pid, process.cmdline()) for process in self.processes()]
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()
            pytest.fail(f"processes were left: {left}\n{self.log}")
        assert not running or self.process.returncode == 0, self.log


class MakeDaemon(Protocol):
    def __call__(
        self, *, wait: bool = True, environment: Mapping[str, str] | None = None, files: int | None = None,
        **settings: Any,
    ) -> Daemon: ...


@contextlib.contextmanager
def _daemons() -> Iterator[MakeDaemon]:
    started: list[Daemon] = []
    with contextlib.ExitStack() as folders:

        def make(
            *, wait: bool = True, environment: Mapping[str, str] | None = None, files: int | None = None,
            **settings: Any,
        ) -> Daemon:  # fmt: skip
            # Not pytest's folder: the path of a socket has at most 107 bytes.
            folder = Path(folders.enter_context(tempfile.TemporaryDirectory(prefix="bmd-")))
            started.append(Daemon(folder, settings, environment or {}, files))
            if wait:
                started[-1].wait_ready()
            return started[-1]

        try:
            yield make
        finally:
            with contextlib.ExitStack() as ends:
                for running in started:
                    ends.callback(running.end)


@pytest.fixture
def daemon() -> Iterator[MakeDaemon]:
    """Starts daemons: ``daemon(queue={"max_jobs": 2})``, ``wait=False`` to not wait until all devices are ready.

    Settings go over `DEFAULTS`, key by key at the top; `environment` over this process's own; `files` is its soft limit
    of open files.
    """
    with _daemons() as make:
        yield make


@pytest.fixture(scope="module")
def start_daemons() -> Iterator[MakeDaemon]:
    """As `daemon`, for a fixture that several tests of a module share."""
    with _daemons() as make:
        yield make


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[Daemon]:
    """One daemon for all tests that leave it as it is: two devices, 5 ms an image, batch 1."""
    with _daemons() as make:
        yield make()


@pytest.fixture(scope="session")
def wait_until() -> WaitUntil:
    """``wait_until(condition, timeout_s)`` gives the condition's value as soon as it is true."""
    return _wait_until


@pytest.fixture
def own() -> Iterator[Callable[[int], int]]:
    """Closes the descriptors that it is given, at the end."""
    with contextlib.ExitStack() as closing:

        def add(descriptor: int) -> int:
            closing.callback(os.close, descriptor)
            return descriptor

        yield add


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, str], Path]]:
    """``small_disk(folder, "64k")`` makes the folder, on a disk of that size."""
    with contextlib.ExitStack() as closing:

        def make(folder: Path, size: str) -> Path:
            folder.mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
            mounted = subprocess.run(mount, stderr=subprocess.PIPE, text=True, check=False)
            if mounted.returncode:
                pytest.skip(f"needs root that may mount a tmpfs: {mounted.stderr.strip()}")
            closing.callback(subprocess.run, ["umount", "--lazy", folder], check=True)
            return folder

        yield make
