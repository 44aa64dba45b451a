"""The daemon that chaos is made in: its own, with the timed engine, made faulty; and what its processes hold."""
from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from blendmaskd.client.blocking import Client
from blendmaskd.programs.errors import NoDaemonError
from blendmaskd_workers.process import end_with_parent
from chaos import poison

START_S = 60.0
STOP_S = 60.0
STALL_S = 5.0
STARTING_S = 20.0  # then a worker that was stopped while it started is killed
EXIT_CANNOT_BOOT = "78"

Held = dict[str, tuple[int, float, int]]  # of the broker and each worker: pid, resident MB, open descriptors


class Host:
    """`endpoint` is the daemon's. Signals to it and its workers, and their memory and descriptors."""

    def __init__(
        self, folder: Path, devices: int, log: Path, overrides: Mapping[str, Any], metrics: str | None = None
    ) -> None:
        self.endpoint = f"ipc://{folder}/client.sock"
        self.devices = [f"cpu:{number}" for number in range(devices)]
        self.log = log
        self._broken = folder / "broken"
        self._broken.mkdir()
        self._settings_file = folder / "daemon.yaml"
        self._settings = {
            "devices": self.devices,
            "engine": "timed",
            "endpoints": {"clients": [self.endpoint], "metrics": metrics},
            "restarts": {"first_delay_s": 0.1, "longest_delay_s": 1, "give_up_after": 1000, "stall_s": STALL_S,
                         "stop_s": 2, "start_timeout_s": STARTING_S},
            "worker_env": poison.worker_env(self._broken),
            **overrides,
        }  # fmt: skip
        self._write(self._settings)

    def start(self) -> None:
        """Raises `NoDaemonError` when it or a device does not come up."""
        argv = [sys.executable, "-m", "blendmaskd", "--settings", str(self._settings_file)]
        drain_with_parent = functools.partial(end_with_parent, signal.SIGTERM)  # however this program dies
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C is for this program, which ends the daemon in good order.
            self.process = subprocess.Popen(argv, stderr=log, start_new_session=True, preexec_fn=drain_with_parent)
        deadline = time.monotonic() + START_S
        with Client(self.endpoint, timeout_s=1.0) as client:
            while self.process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    if all_ready(client.stats()):
                        return
                time.sleep(0.05)
        self.process.kill()
        self.process.wait()
        raise NoDaemonError(f"the daemon did not come up: {self.log.read_text()[-2000:]}")

    def client(self) -> Client:
        return Client(self.endpoint, timeout_s=START_S)

    def stop(self) -> int:
        """SIGTERM, and its exit code, also when it has ended before; kills it when that takes too long."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    # -- faults -----------------------------------------------------------------------------------------------------

    def signal_worker(self, device: str, number: signal.Signals) -> int | None:
        """Its pid, if there is one."""
        for name, worker in self._workers():
            if name.startswith(f"{device}."):
                with contextlib.suppress(psutil.Error):
                    worker.send_signal(number)
                    return int(worker.pid)
        return None

    def go_on(self, pid: int) -> None:
        """SIGCONT, if it is still a worker of ours."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.ppid() == self.process.pid:
                process.send_signal(signal.SIGCONT)

    def break_device(self, device: str) -> None:
        """Its worker dies, and no other can start."""
        (self._broken / device).write_text(EXIT_CANNOT_BOOT)
        self.signal_worker(device, signal.SIGKILL)

    def mend_devices(self) -> None:
        for file in self._broken.iterdir():
            file.unlink()

    def reload(self, good: bool) -> None:
        """SIGHUP, with settings that can be used or not."""
        self._write(self._settings if good else {**self._settings, "bacth": 2})
        self.process.send_signal(signal.SIGHUP)

    def _write(self, settings: Mapping[str, Any]) -> None:
        beside = self._settings_file.with_suffix(".new")
        beside.write_text(yaml.safe_dump(dict(settings)))
        os.replace(beside, self._settings_file)

    # -- what it holds ----------------------------------------------------------------------------------------------

    def held(self) -> Held:
        found: Held = {}
        with contextlib.suppress(psutil.Error):  # it has ended; that is seen elsewhere
            found["broker"] = _held(psutil.Process(self.process.pid))
            for name, worker in self._workers():
                with contextlib.suppress(psutil.Error):
                    found[name] = _held(worker)
        return found

    def _workers(self) -> Iterator[tuple[str, psutil.Process]]:
        """Each with its generation, cpu:0.1."""
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                yield from ((argument, child) for argument in child.cmdline() if argument.startswith("cpu:"))


def all_ready(stats: Mapping[str, Any]) -> bool:
    devices = stats.get("devices", [])
    return bool(devices) and all(device["state"] == "ready" for device in devices)


def _held(process: psutil.Process) -> tuple[int, float, int]:
    with process.oneshot():
        return int(process.pid), process.memory_info().rss / 1e6, int(process.num_fds())


@contextlib.contextmanager
def own_host(
    devices: int, log: Path | None, overrides: Mapping[str, Any], metrics: str | None = None
) -> Iterator[Host]:
    """A daemon that is up; gone when this is left. Without a `log` its log goes when it goes."""
    with tempfile.TemporaryDirectory(prefix="blendmaskd-chaos-") as name:
        host = Host(Path(name), devices, log or Path(name) / "log", overrides, metrics)
        host.start()
        try:
            yield host
        finally:
            host.stop()
