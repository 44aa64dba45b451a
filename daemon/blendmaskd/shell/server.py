"""The shell: one loop over sockets, child processes and signals. The cores decide; this does.

A turn asks what has happened, decision by decision, and puts what was decided into the one queue of actions: messages
are carried out by `blendmaskd.shell.desk`, processes by `blendmaskd.shell.processes`, the rest here. Before a dead
worker is reaped, all that it had sent is read, so that an answer is not taken for a lost one. Signal handlers only wake
the loop. When the loop itself stood still, with its host or in a debugger, that time is nobody's fault. Once per second
it takes a snapshot, shows it everywhere, and feeds systemd's watchdog: a loop that hangs is a daemon that is restarted.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import math
import os
import signal
import time
from collections.abc import Callable

import zmq

from blendmaskd import logs
from blendmaskd.core import reload
from blendmaskd.core.health import Health
from blendmaskd.core.stats import Stats, status_line
from blendmaskd.settings import Settings, SettingsError
from blendmaskd.shell import launch, systemd
from blendmaskd.shell.addresses import is_loopback
from blendmaskd.shell.desk import DESK_ACTIONS, Desk
from blendmaskd.shell.npu_health import NpuHealth
from blendmaskd.shell.processes import Action, Actions, Child, Decisions, Processes
from blendmaskd.shell.signals import Signals
from blendmaskd.shell.sockets import Sockets, StartError
from blendmaskd.shell.spool import SpoolError
from blendmaskd.topology import HostError

log = logging.getLogger("blendmaskd")

TICK_S = 1.0
TRIM_S = 10.0
STOOD_STILL_S = 2.0  # since the last look at what is due, where there is one each second
SAME_STOP_S = 1.0  # timeout(1), a terminal and a wrapper in it, and others deliver one stop as two signals


_malloc_trim: Callable[[int], object] = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # glibc's
CANNOT_START = (StartError, SettingsError, SpoolError, HostError)


class Server:
    """`run` serves until it is drained. `load_settings` reads the settings anew, for a reload.

    Both raise what is in `CANNOT_START`, whose text says what to do.
    """

    def __init__(self, settings: Settings, load_settings: Callable[[], Settings], signals: Signals) -> None:
        self.settings = settings
        self._load_settings = load_settings
        self._signals = signals
        self._basis = launch.basis(settings)
        self._notifier = systemd.from_environment()
        self._stats = Stats(settings.window_s)
        self._poller = zmq.Poller()
        self._fds: dict[int, Callable[[], Decisions]] = {}  # pidfds and the signal pipe, among others
        self._started = time.time()
        self._next_tick = self._next_trim = 0.0
        self._last_look = math.inf  # when `_keep_house` ran last
        self._reload_asked = False
        self._stop_asked = -math.inf
        self._drain_deadline: float | None = None
        self._exit_code: int | None = None
        self._missing: list[str] = []  # files of ours that others have removed

    def run(self) -> int:
        """Serve. Returns the exit code: 0 after a drain, 1 when no worker can be started at all."""
        with contextlib.ExitStack() as owned:
            try:
                self._open(owned)
            except (OSError, zmq.ZMQError) as error:  # the host's; what we know by name says more
                raise StartError(f"cannot start: {error}") from error
            try:
                self._signals.serving = True
                self._carry_out(self._supervisor.start(time.monotonic()))
                while self._exit_code is None:
                    for actions in self._turn():
                        self._carry_out(actions)
            finally:
                self._processes.kill_all()
        self._notifier.send(STATUS="stopped")
        return self._exit_code

    def _open(self, owned: contextlib.ExitStack) -> None:
        endpoints = self.settings.endpoints
        self._sockets = sockets = owned.enter_context(Sockets(self.settings))
        log.info("serving %s on %s, engine %s, pid %d", " ".join(self.settings.devices),
                 " ".join(endpoints.clients), self.settings.engine, os.getpid())  # fmt: skip
        self._desk = desk = Desk(self.settings, sockets, self._stats)
        owned.callback(desk.close)
        self._processes = Processes(self._basis, desk.broker, self._stats, sockets.workers_endpoint, self._watch_child)
        self._supervisor, self._reload = self._processes.supervisor, self._processes.reload
        self._health, self._npu_health = Health(self._supervisor), NpuHealth(os.environ)
        self._npu_health.watch(self.settings.devices, self.settings.npu_health_s)
        self._entrance = {*(each.router for each in sockets.clients), *desk.admission.sockets}
        for socket in (*self._entrance, sockets.workers):
            self._poller.register(socket, zmq.POLLIN)
        self._watch(self._signals.fileno(), self._on_signals)
        self._watch(sockets.shared_memory.fileno(), desk.on_shared_memory)
        if desk.spool is not None:
            self._watch(desk.spool.fileno(), desk.on_spool)
        if not is_loopback(endpoints.metrics):
            log.warning("endpoints.metrics %s: open to anyone who can reach the port; use 127.0.0.1 for this host only",
                        endpoints.metrics)  # fmt: skip
        if sockets.allowed is None and any(endpoint.startswith("tcp://") for endpoint in endpoints.clients):
            log.warning("insecure_tcp: anyone who can reach the tcp endpoint can submit jobs and read the traffic")
        if sockets.no_memory:
            log.warning("no shared memory, images use the socket: %s", sockets.no_memory)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _turn(self) -> Decisions:
        """What follows from what has happened, or is due."""
        due, now = self._due(), time.monotonic()
        look = self._desk.admission.next_look(now)
        events = dict(self._poller.poll(max(0, int((min(due, look) - now) * 1000) + 1)))
        if self._sockets.workers in events:
            yield from self._desk.read_workers(self._processes)
        if look < math.inf or not self._entrance.isdisjoint(events):
            yield from self._desk.admit(events)
        for clients in self._sockets.clients:
            if clients.router in events:
                yield from self._desk.read_clients(clients)
        others = [fd for fd in events if fd in self._fds]
        for fd in others:
            yield from self._fds[fd]()
        now = time.monotonic()
        if others or now >= due or self._processes.unsettled or self._drain_deadline is not None:
            yield from self._keep_house(now)

    def _due(self) -> float:
        if self._processes.unsettled:
            return 0.0
        deadlines = [self._next_tick, self._desk.broker.next_deadline(), self._supervisor.next_deadline()]
        return min(deadline for deadline in deadlines if deadline is not None)

    def _keep_house(self, now: float) -> Decisions:
        """What time and changes ask for, rather than messages."""
        self._processes.unsettled = False
        if now - self._last_look > STOOD_STILL_S:
            self._forgive(now - self._last_look, now)
        self._last_look = now
        yield self._desk.broker.expire(now)
        yield self._supervisor.expire(now)
        if now >= self._next_tick:
            yield from self._desk.tick(now)
            self._processes.reap_orphans()
            self._health.read(self._npu_health.take())
            self._trim(now)
            self._tick(now)
        yield self._desk.durable.feed()
        if self._processes.report_changes():
            self._next_tick = 0.0  # the pages and stats show them at once, too
        if self._reload_asked and not self._reload.busy:
            self._reload_asked = False
            self._notifier.reloading()
            yield self._processes.try_out(self._load_settings)
        yield self._health.follow(now)
        yield self._reload.follow(now)
        yield self._desk.broker.set_available(self._supervisor.draining or not self._supervisor.hopeless)
        if self._drain_deadline is not None:
            yield from self._follow_drain(now, self._drain_deadline)

    def _forgive(self, seconds: float, now: float) -> None:
        """Nothing ran here for so long, and perhaps in the workers neither: no clock that watches them goes on."""
        log.warning("stood still for %.1f s, as when the host is paused: not counted against the workers", seconds)
        self._desk.broker.forgive(seconds, now)
        self._supervisor.forgive(seconds)
        self._reload.forgive(seconds)
        if self._drain_deadline is not None:
            self._drain_deadline += seconds

    def _follow_drain(self, now: float, deadline: float) -> Decisions:
        durable = self._desk.durable
        if now >= deadline and self._desk.broker.unanswered:
            log.warning("drain: %d jobs not finished in time, answered as draining", self._desk.broker.unanswered)
            yield self._desk.broker.end_drain()
        if not self._desk.broker.unanswered and not self._supervisor.draining:
            yield self._supervisor.drain(now)
        if self._supervisor.ended and not (durable.busy and now < deadline):
            yield durable.end()
            log.info("drained: every accepted job is answered, every worker has ended")
            self._exit_code = 0

    def _tick(self, now: float) -> None:
        self._next_tick = now + TICK_S
        snapshot = self._stats.snapshot(
            now,
            time.time(),
            [{**slot, "card": self._health.describe(slot["device"])} for slot in self._processes.describe(now)],
            started=self._started,
            engine=self.settings.engine,
            draining=self._drain_deadline is not None,
            missing=self._look_for_files(),
            **self._desk.describe(),
        )
        self._desk.publish(snapshot)
        if self._sockets.pages:
            self._sockets.pages.publish(snapshot)
        self._notifier.send(WATCHDOG="1", STATUS=status_line(snapshot))

    def _look_for_files(self) -> list[str]:
        missing = self._sockets.missing()
        for path in missing:
            if path not in self._missing:
                log.error("%s was removed or replaced by somebody else: restart the daemon", path)
        self._missing = missing
        return missing

    def _trim(self, now: float) -> None:
        """Give back what images held that are gone: glibc keeps it wherever something small came to lie behind."""
        if now >= self._next_trim:
            self._next_trim = now + TRIM_S
            _malloc_trim(0)

    # -- what was decided -------------------------------------------------------------------------------------------

    def _carry_out(self, actions: Actions) -> None:
        """In the order in which they were decided, with all that follows from them."""
        queue = list(actions)
        for action in queue:  # it grows meanwhile
            queue += self._desk.carry_out(action) if isinstance(action, DESK_ACTIONS) else self._do(action)
        self._desk.log_steps()

    def _do(self, action: Action) -> Actions:
        match action:
            case reload.Adopt(basis, undone):
                return self._adopt(basis.settings, undone)
            case reload.Ready():
                ready, slots = self._supervisor.ready_slots, len(self._supervisor.listed)
                log.info("ready: %d of %d devices%s", ready, slots, "" if ready == slots else ", degraded")
                self._tick(time.monotonic())  # whoever waited for this sees it in the status and at /readyz
                self._notifier.send(READY="1")
            case reload.Over(text):
                log.error("%s", text)
                self._notifier.send(READY="1", STATUS=text)
            case reload.GiveUp():
                log.error("no worker can be started; see the errors above, and `blendmaskd check` with these settings")
                self._exit_code = 1
            case _:
                return self._processes.carry_out(action)
        self._processes.unsettled = True
        return ()

    def _adopt(self, settings: Settings, undone: str) -> Actions:
        if undone:
            log.error("reload undone, the previous settings are restored: %s", undone)
        else:
            log.info("reload: accepted, replacing the workers one at a time")
        self.settings = settings
        self._stats.window_s = settings.window_s
        self._npu_health.watch(settings.devices, settings.npu_health_s)
        if not settings.npu_health_s:
            self._health.forget()
        logs.configure(settings.log)
        return self._desk.adopt(settings)

    # -- descriptors ------------------------------------------------------------------------------------------------

    def _watch(self, fd: int, handler: Callable[[], Decisions]) -> None:
        self._poller.register(fd, zmq.POLLIN)
        self._fds[fd] = handler

    def _watch_child(self, child: Child) -> None:
        self._watch(child.pidfd, functools.partial(self._on_exit, child))

    def _on_exit(self, child: Child) -> Decisions:
        self._poller.unregister(child.pidfd)
        del self._fds[child.pidfd]
        yield from self._desk.read_workers(self._processes, dead=child.name)
        yield self._processes.reap(child)

    def _on_signals(self) -> Decisions:
        for number in self._signals.take():
            if number is not signal.SIGHUP:
                yield self._drain(number, time.monotonic())
            elif self._drain_deadline is not None:
                log.warning("reload ignored: the daemon is stopping")
            else:
                if self._reload.busy:
                    log.info("reload: another one is being checked; this one follows")
                self._reload_asked = True

    def _drain(self, number: signal.Signals, now: float) -> Actions:
        if now - self._stop_asked < SAME_STOP_S:
            log.info("%s: taken for the same stop", number.name)
            return ()
        if self._drain_deadline is not None:
            log.warning("%s again: not waiting for %d jobs", number.name, self._desk.broker.unanswered)
            self._drain_deadline = now
            self._supervisor.hurry(now)
            return ()
        self._stop_asked = now
        log.info("%s: draining, %d jobs to finish", number.name, self._desk.broker.unanswered)
        self._notifier.send(STOPPING="1")
        self._drain_deadline = now + self.settings.drain_s
        self._desk.broker.drain()
        return self._reload.drain()
