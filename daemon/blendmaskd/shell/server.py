"""The shell: one loop over sockets, child processes and signals. The cores decide; this does.

It reads the clock, owns processes, and logs: one line per state change. What clients say is taken to the cores by
`blendmaskd.shell.traffic`. Each turn reads the workers' socket before it reaps the dead, so that an answer that was
sent is not taken for a lost one. Signal handlers only wake the loop. Once per second it takes a snapshot, shows it
everywhere, and feeds systemd's watchdog: a loop that hangs is a daemon that is restarted.
"""
from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import zmq

from blendmaskd import logs, protocol
from blendmaskd.assignment import EXIT_CANNOT_BOOT, identity
from blendmaskd.core import broker, reload, supervisor
from blendmaskd.core.reload import Reload
from blendmaskd.core.stats import Stats, status_line
from blendmaskd.logs import about
from blendmaskd.protocol import FROM_WORKER, ProtocolError
from blendmaskd.settings import Settings, SettingsError
from blendmaskd.shell import launch, systemd
from blendmaskd.shell.processes import Child, Launcher, how_it_ended
from blendmaskd.shell.sockets import Sockets, StartError, is_loopback, receive
from blendmaskd.shell.spool import SpoolError
from blendmaskd.shell.traffic import Traffic
from blendmaskd.topology import HostError
from blendmaskd.wanted import differences

log = logging.getLogger("blendmaskd")

TICK_S = 1.0
SILENT_S = 3.0  # a worker that missed this many reports is not called ready


class Server:
    """`run` serves until it is drained. `load_settings` reads the settings anew, for a reload."""

    def __init__(self, settings: Settings, load_settings: Callable[[], Settings]) -> None:
        self.settings = settings
        self._load_settings = load_settings
        self._notifier = systemd.from_environment()
        self._stats = Stats(settings.window_s)
        self._supervisor = supervisor.Supervisor(settings.devices, settings.restarts, settings.drain_s)
        self._reload = Reload(self._supervisor, launch.basis(settings))
        self._launcher = Launcher(dict(os.environ))
        self._children: dict[str, Child] = {}  # by worker name
        self._fds: dict[int, Callable[[], None]] = {}  # pidfds and the signal pipe
        self._check: Child | None = None  # for a reload
        self._opened = settings  # what sockets and files were opened by
        self._started = time.time()
        self._last_image: dict[str, Any] | None = None
        self._next_tick = 0.0
        self._told_states: dict[str, str] = {}
        self._told_available = True
        self._unsettled = True  # states of slots may have changed
        self._drain_deadline: float | None = None
        self._exit_code: int | None = None

    def run(self) -> int:
        """Serve. Returns the exit code: 0 after a drain, 1 when no worker can be started at all."""
        with contextlib.ExitStack() as owned:
            self._sockets = sockets = owned.enter_context(Sockets(self.settings))
            self._poller = zmq.Poller()
            self._poller.register(sockets.clients, zmq.POLLIN)
            self._poller.register(sockets.workers, zmq.POLLIN)
            if sockets.departures:
                self._poller.register(sockets.departures.socket, zmq.POLLIN)
            self._watch(sockets.signals.fileno(), self._on_signals)
            log.info("serving %s on %s, engine %s, pid %d", " ".join(self.settings.devices),
                     " ".join(self.settings.endpoints.clients), self.settings.engine, os.getpid())  # fmt: skip
            self._open_traffic(owned)
            if not is_loopback(self.settings.endpoints.metrics):
                log.warning("endpoints.metrics %s: open to whoever reaches the port; 127.0.0.1 is this host's alone",
                            self.settings.endpoints.metrics)  # fmt: skip
            if sockets.no_memory:
                log.warning("no shared memory, images come by socket: %s", sockets.no_memory)
            try:
                self._supervise(self._supervisor.start(time.monotonic()))
                while self._exit_code is None:
                    self._turn()
            finally:
                self._kill_all()
        self._notifier.send(STATUS="stopped")
        return self._exit_code

    def _open_traffic(self, owned: contextlib.ExitStack) -> None:
        sockets = self._sockets
        self._traffic = traffic = Traffic(self.settings, sockets, self._stats, self._evict, self._acquit)
        owned.callback(traffic.close)
        self._broker, self._durable = traffic.broker, traffic.durable
        self._watch(sockets.shared_memory.fileno(), traffic.on_shared_memory)
        if traffic.spool is not None:
            self._watch(traffic.spool.fileno(), traffic.on_spool)
        for socket in sockets.gate.sockets if sockets.gate else ():
            self._poller.register(socket, zmq.POLLIN)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        due = self._due()
        events = dict(self._poller.poll(max(0, int((due - time.monotonic()) * 1000) + 1)))
        others = [fd for fd in events if fd in self._fds]
        if others or self._sockets.workers in events:
            self._read_workers()
        if self._sockets.gate and not events.keys().isdisjoint(self._sockets.gate.sockets):
            self._sockets.gate.receive()
            self._traffic.on_keys()
        if self._sockets.departures:
            self._traffic.let_go(self._sockets.departures.take())
        if self._sockets.clients in events:
            self._traffic.read_clients()
        for fd in others:
            self._fds[fd]()
        now = time.monotonic()
        if others or now >= due or self._unsettled or self._drain_deadline is not None:
            self._keep_house(now)

    def _due(self) -> float:
        if self._unsettled:
            return 0.0
        deadlines = [self._next_tick, self._broker.next_deadline(), self._supervisor.next_deadline()]
        return min(deadline for deadline in deadlines if deadline is not None)

    def _keep_house(self, now: float) -> None:
        """What time and changes ask for, rather than messages."""
        self._unsettled = False
        self._traffic.carry_out(self._broker.expire(now))
        self._supervise(self._supervisor.expire(now))
        if now >= self._next_tick:
            self._tick(now)
        self._traffic.carry_out(self._durable.feed())
        self._follow(now)

    def _tick(self, now: float) -> None:
        self._next_tick = now + TICK_S
        self._traffic.tick(now)
        self._traffic.snapshot = snapshot = self._stats.snapshot(
            now,
            time.time(),
            [self._describe(slot, now) for slot in self._supervisor.listed],
            started=self._started,
            engine=self.settings.engine,
            draining=self._drain_deadline is not None,
            last_image=self._last_image,
            **self._traffic.describe(),
        )
        self._broker.served_per_s = snapshot["combined_fps"]
        if self._sockets.pages:
            self._sockets.pages.publish(snapshot)
        self._notifier.send(WATCHDOG="1", STATUS=status_line(snapshot))

    def _describe(self, slot: supervisor.Slot, now: float) -> dict[str, Any]:
        name = identity(slot.name, slot.generation)
        child = self._children.get(name)
        heard = self._broker.last_heard(name)
        silent = slot.state is supervisor.State.READY and heard is not None and now - heard > SILENT_S
        return {
            "device": slot.name,
            "slot": slot.name,
            "generation": slot.generation,
            "pid": child.process.pid if child else None,
            "state": "silent" if silent else slot.state.value,
            "reason": slot.reason,
            "restarts": slot.restarts,
            "wanted": msgspec.to_builtins(child.wanted) if child else {},
            "actual": msgspec.to_builtins(child.actual) if child and child.actual else {},
        }

    def _follow(self, now: float) -> None:
        """What follows from where things are now: report changes, go on with a reload, end a drain."""
        self._tell_states()
        self._supervise(self._reload.follow(now))
        hopeless = self._supervisor.hopeless and not self._supervisor.draining
        if hopeless == self._told_available:
            self._told_available = not hopeless
            self._traffic.carry_out(self._broker.set_available(not hopeless))
        if self._drain_deadline is not None:
            self._follow_drain(now)

    def _follow_drain(self, now: float) -> None:
        assert self._drain_deadline is not None
        if now >= self._drain_deadline and self._broker.unanswered:
            log.warning("drain: %d jobs not done in time, answered as draining", self._broker.unanswered)
            self._traffic.carry_out(self._broker.end_drain())
        if not self._broker.unanswered and not self._supervisor.draining:
            self._supervise(self._supervisor.drain(now))
        if self._supervisor.ended and not (self._durable.busy and now < self._drain_deadline):
            self._traffic.carry_out(self._durable.end())
            log.info("drained: every accepted job is answered, every worker has ended")
            self._exit_code = 0

    # -- workers ---------------------------------------------------------------------------------------------------

    def _read_workers(self) -> None:
        for frames in receive(self._sockets.workers):
            name = frames[0].bytes.decode(errors="replace")
            if name not in self._children:
                continue  # of another run, or dead and reaped
            message: protocol.FromWorker
            try:
                message, payload = protocol.decode(frames[1:], FROM_WORKER)
            except ProtocolError as error:
                log.error("%s", error, extra=about(slot=name))
                continue
            self._on_worker(self._children[name], message, payload, time.monotonic())

    def _on_worker(self, child: Child, message: protocol.FromWorker, payload: Sequence[Any], now: float) -> None:
        name = child.name
        self._broker.heard(name, now)
        match message:
            case protocol.Ready():
                self._on_ready(child, message, now)
            case protocol.Started():
                self._traffic.carry_out(self._broker.started(name, message, now))
            case protocol.Finished():
                self._traffic.carry_out(self._broker.finished(name, message, payload, now))
            case protocol.FailedLease():
                self._traffic.carry_out(self._broker.failed(name, message, now))
            case protocol.Report():
                self._stats.report(child.slot, message)
                self._traffic.carry_out(self._broker.set_window(name, message.window, now))
            case protocol.Preview() if self.settings.show_last_image and payload:
                self._show_image({"device": child.slot, "time": time.time()}, payload[0].bytes)

    def _show_image(self, last: dict[str, Any] | None, jpeg: bytes | None) -> None:
        self._last_image = last
        if self._sockets.pages:
            self._sockets.pages.show_image(jpeg)

    def _on_ready(self, child: Child, message: protocol.Ready, now: float) -> None:
        if message.token != self._launcher.token or message.pid != child.process.pid:
            log.error("a stranger says it is ready (pid %d)", message.pid, extra=about(slot=child.name))
            return
        self._unsettled = True
        child.actual = message.actual
        for difference in differences(child.wanted, message.actual):
            log.warning("%s", difference, extra=about(slot=child.name))
        if self._supervisor.ready(child.slot, child.generation, now):
            self._traffic.carry_out(self._broker.ready(child.name, child.slot, message.window, now))

    def _evict(self, action: broker.Evict) -> None:
        child = self._children[action.worker]
        actions = self._supervisor.evict(child.slot, child.generation, action.reason, time.monotonic())
        if actions:
            log.error("%s: aborted", action.reason, extra=about(slot=action.worker))
            self._supervise(actions)

    def _acquit(self, action: broker.Acquit) -> None:
        self._supervisor.acquit(action.device)

    # -- processes --------------------------------------------------------------------------------------------------

    def _supervise(self, actions: Iterable[reload.Action]) -> None:
        for action in actions:
            self._unsettled = True
            match action:
                case supervisor.Spawn(slot, generation):
                    self._spawn(slot, generation)
                case supervisor.Stop(slot, generation):
                    self._traffic.carry_out(self._broker.retire(identity(slot, generation)))
                case supervisor.Kill(slot, generation, number):
                    name = identity(slot, generation)
                    log.warning("sent %s", number.name, extra=about(slot=name))
                    self._children[name].process.send_signal(number)
                case reload.StopCheck(why):
                    if why:
                        log.error("reload: %s", why)
                    assert self._check is not None
                    self._check.process.kill()
                case reload.Adopt(basis, undone):
                    self._adopt(basis.settings, undone)
                case reload.Ready():
                    self._tell_ready()
                case reload.Over(text):
                    log.error("%s", text)
                    self._notifier.send(READY="1", STATUS=text)
                case reload.GiveUp():
                    log.error("no worker can be started; see above")
                    self._exit_code = 1

    def _spawn(self, slot: str, generation: int) -> None:
        try:
            child = self._launcher.worker(slot, generation, self._reload.basis, self._sockets.workers_endpoint)
        except (OSError, HostError) as error:
            if isinstance(error, HostError) and not self._traffic.snapshot:
                raise  # nothing is served yet: the settings do not fit this host
            how = f"cannot be started: {error}"
            self._supervise(self._supervisor.exited(slot, generation, how, 1, False, time.monotonic()))
            return
        for warning in child.warnings:
            log.warning("%s", warning, extra=about(slot=child.name))
        self._children[child.name] = child
        self._watch(child.pidfd, functools.partial(self._reap, child))

    def _reap(self, child: Child) -> None:
        self._unwatch(child.pidfd)
        code = child.reap()
        del self._children[child.name]
        now = time.monotonic()
        how = how_it_ended(code)
        blameless = self._broker.holds_suspect(child.name)
        self._stats.lost(child.slot)
        actions = self._supervisor.exited(child.slot, child.generation, how, code, blameless, now)
        self._traffic.carry_out(self._broker.lose(child.name, now, f"{child.name} {how}"))
        self._supervise(actions)

    def _kill_all(self) -> None:
        for child in [*self._children.values(), *([self._check] if self._check else [])]:
            child.process.kill()
            child.reap()

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._poller.register(fd, zmq.POLLIN)
        self._fds[fd] = handler

    def _unwatch(self, fd: int) -> None:
        self._poller.unregister(fd)
        del self._fds[fd]

    # -- signals, reload --------------------------------------------------------------------------------------------

    def _on_signals(self) -> None:
        for number in self._sockets.signals.recv(64):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._drain(signal.Signals(number))
            elif number == signal.SIGHUP:
                self._on_reload()

    def _drain(self, number: signal.Signals) -> None:
        if self._drain_deadline is not None:
            log.warning("%s again: not waiting for %d jobs", number.name, self._broker.unanswered)
            self._drain_deadline = time.monotonic()
            return
        log.info("%s: draining, %d jobs to finish", number.name, self._broker.unanswered)
        self._notifier.send(STOPPING="1")
        self._drain_deadline = time.monotonic() + self.settings.drain_s
        self._broker.drain()
        self._supervise(self._reload.drain())

    def _on_reload(self) -> None:
        """Read the settings anew, and let a process of its own try them together with the weights."""
        if self._reload.busy:
            log.warning("reload: not now, another reload or a drain is under way")
            return
        self._notifier.reloading()
        try:
            settings = self._load_settings()
            reload.refuse_rebinding(self._opened, settings)
            candidate = launch.basis(settings, old=self._reload.basis)
            self._check = self._launcher.check(candidate)
        except (SettingsError, HostError, OSError) as error:
            self._supervise(self._reload.refuse(str(error)))
            return
        log.info("reload: checking settings and weights")
        self._reload.try_out(candidate, time.monotonic())
        self._watch(self._check.pidfd, self._on_tried)

    def _on_tried(self) -> None:
        assert self._check is not None
        check, self._check = self._check, None
        self._unwatch(check.pidfd)
        code = check.reap()
        complaint = check.complaint() or how_it_ended(code)
        self._supervise(self._reload.tried(complaint if code else None, time.monotonic()))

    def _adopt(self, settings: Settings, undone: str) -> None:
        if undone:
            log.error("reload undone, the settings before it are back: %s", undone)
        else:
            log.info("reload: accepted, replacing the workers one at a time")
        self.settings = settings
        self._traffic.adopt(settings)
        self._traffic.carry_out(self._broker.forget_suspects(time.monotonic()))
        self._stats.window_s = settings.window_s
        logs.configure(settings.log)
        if not settings.show_last_image:
            self._show_image(None, None)

    # -- telling ----------------------------------------------------------------------------------------------------

    def _tell_states(self) -> None:
        """Of changes; the pages and stats show them at once, too."""
        for slot in self._supervisor.slots.values():
            told = f"{slot.generation} {slot.state.value}"
            if self._told_states.get(slot.name) != told:
                self._told_states[slot.name] = told
                self._next_tick = 0.0
                bad = slot.state in (supervisor.State.BACKOFF, supervisor.State.FAILED)
                reason = f": {slot.reason}" if slot.reason else ""
                level, name = logging.ERROR if bad else logging.INFO, identity(slot.name, slot.generation)
                log.log(level, "%s%s", slot.state.value, reason, extra=about(slot=name))

    def _tell_ready(self) -> None:
        ready, slots = self._supervisor.ready_slots, len(self._supervisor.listed)
        log.info("ready: %d of %d devices%s", ready, slots, "" if ready == slots else ", degraded")
        self._tick(time.monotonic())  # whoever waited for this sees it in the status and at /readyz
        self._notifier.send(READY="1")


def main_loop(settings: Settings, load_settings: Callable[[], Settings]) -> int:
    """Serve with these settings; see `Server.run`. Says what is wrong, on stderr, when it cannot start."""
    try:
        return Server(settings, load_settings).run()
    except (StartError, SettingsError, SpoolError, HostError) as error:
        print(f"blendmaskd: {error}", file=sys.stderr)
        return EXIT_CANNOT_BOOT
