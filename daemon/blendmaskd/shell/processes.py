"""Child processes of the daemon: the workers, and the process that tries new settings before they are taken on.

Whether and when one is started or killed, supervisor and reload decide; here it is done.
"""
from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import msgspec

from blendmaskd import protocol
from blendmaskd.ascend import RESET
from blendmaskd.assignment import EXIT_DEVICE_BROKEN, EXIT_HOST_LACKS, EXIT_OVERTIME, identity
from blendmaskd.core import broker, durable, launch_plan, reload, supervisor
from blendmaskd.core.actions import Acquit, Evict
from blendmaskd.core.launch_plan import Basis, LaunchPlan
from blendmaskd.core.reload import Reload
from blendmaskd.core.stats import Stats
from blendmaskd.core.supervisor import State, Supervisor
from blendmaskd.logs import about
from blendmaskd.settings import Settings, SettingsError
from blendmaskd.shell import launch
from blendmaskd.topology import HostError, format_cpus
from blendmaskd.wanted import Actual, differences, masked, models_shown

log = logging.getLogger("blendmaskd")

CHECK = ("-m", "blendmaskd_workers", "--check")  # loads settings and weights on the CPU; ends with 0 if both are good
UNKNOWN_END = 256  # no exit code
SILENT_S = 3.0  # a worker that missed this many reports is not called ready

Action = durable.Action | reload.Action  # all that cores decide
Actions = Iterable[Action]
Decisions = Iterator[Actions]  # each is to be carried out before the next is asked for


class Child:
    """A process of ours; `pidfd` becomes readable when it has ended."""

    def __init__(self, plan: LaunchPlan, stderr: IO[bytes] | None = None) -> None:
        self.name = plan.assignment.identity
        self.slot = plan.assignment.device
        self.generation = plan.assignment.generation
        self._wanted, self._secret = plan.assignment.wanted.env, plan.assignment.settings.worker_env
        self.wanted = masked(plan.assignment.wanted, self._secret, self._wanted)
        self._stderr = stderr
        self.process = launch.launch(plan, stderr=stderr)
        self.actual: Actual | None = None  # not up yet
        try:
            self.pidfd = os.pidfd_open(self.process.pid)
        except OSError:  # out of descriptors, say: nobody would hear of its end
            self.process.kill()
            self.process.wait()
            raise

    def take_in(self, actual: Actual) -> list[str]:
        """What its process is, as it says. Returns where that is not what was wanted."""
        self.actual = masked(actual, self._secret, self._wanted)
        return differences(self.wanted, self.actual, self._secret)

    def reap(self) -> int:
        """Its exit code, negative for a signal, `UNKNOWN_END` if somebody else reaped it; waits for its end."""
        try:
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:  # for which `Popen.wait` has 0
            self.process.returncode = UNKNOWN_END
        os.close(self.pidfd)
        return self.process.wait()

    def complaint(self) -> str:
        """The end of what it said, where it has a stderr of its own."""
        assert self._stderr is not None
        with self._stderr as file:
            file.seek(0)
            return file.read().decode(errors="replace").strip()[-2000:]


class Processes:
    """`watch` is called with each process that was started; `reap` it when its `pidfd` is readable.

    `unsettled`: states of slots may have changed since the supervisor was asked what follows from them.
    """

    def __init__(
        self, basis: Basis, broker: broker.Broker, stats: Stats, endpoint: str, watch: Callable[[Child], None]
    ) -> None:
        settings = basis.settings
        self.supervisor = Supervisor(settings.devices, settings.restarts, settings.drain_s)
        self.reload = Reload(self.supervisor, basis)
        self.children: dict[str, Child] = {}  # workers, by name
        self.unsettled = True
        self._check: Child | None = None  # for a reload
        self._first = basis  # what sockets and files were opened by
        self._broker = broker
        self._stats = stats
        self._endpoint = endpoint
        self._watch = watch
        self._environment = dict(os.environ)
        self._token = secrets.token_hex(16)  # a worker proves with it that this run of the daemon started it
        self._reported: dict[str, tuple[int, State]] = {}  # by slot

    def carry_out(self, action: Action) -> Actions:
        """Returns what follows from it. Raises `HostError` when no worker fits this host from the start."""
        self.unsettled = True
        match action:
            case supervisor.Spawn(slot, generation):
                return self._spawn(slot, generation)
            case supervisor.Stop(slot, generation):
                return self._broker.retire(identity(slot, generation))
            case supervisor.Kill(slot, generation, number):
                name = identity(slot, generation)
                log.warning("sent %s", number.name, extra=about(slot=name))
                self.children[name].process.send_signal(number)
            case Evict(worker, reason):
                return self._evict(self.children[worker], reason)
            case Acquit(device):
                self.supervisor.acquit(device)
            case reload.StopCheck(why):
                if why:
                    log.error("reload: %s", why)
                assert self._check is not None
                self._check.process.kill()
        return ()

    def ready(self, worker: str, message: protocol.Ready, now: float) -> Actions:
        """A worker says that it serves."""
        child = self.children[worker]
        if message.token != self._token or message.pid != child.process.pid:
            log.error("an unknown process reports ready (pid %d)", message.pid, extra=about(slot=child.name))
            return ()
        self.unsettled = True
        for difference in child.take_in(message.actual):
            log.warning("%s", difference, extra=about(slot=child.name))
        if not self.supervisor.ready(child.slot, child.generation, now):
            return ()
        models = models_shown(self.describe(now))
        if len(models) > 1 and not self.reload.reloading:
            served = "; ".join(f"{model} on {', '.join(devices)}" for model, devices in models.items())
            log.warning("different models are served, a file was replaced: %s: reload to serve one", served)
        return self._broker.ready(child.name, child.slot, message.window, now)

    def reap(self, child: Child) -> Actions:
        """A process of ours has exited."""
        code, now = child.reap(), time.monotonic()
        how = how_it_ended(code)
        if child is self._check:
            self._check = None
            complaint = child.complaint() or how
            return self.reload.tried(complaint if code else None, now)
        del self.children[child.name]
        blameless = self._broker.holds_suspect(child.name)
        self._stats.exited(child.slot)
        actions = self.supervisor.exited(child.slot, child.generation, how, code, blameless, now)
        return [*self._broker.exited(child.name, now, f"{child.name} {how}"), *actions]

    def reap_orphans(self) -> None:
        """As process 1, or a subreaper, this one is given what workers leave behind, and nobody else reaps it."""
        ours = {child.process.pid for child in self._running()}
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in ours:
                os.waitpid(ended.si_pid, 0)

    def try_out(self, load_settings: Callable[[], Settings]) -> Actions:
        """Read the settings anew, and let a process of its own try them together with the weights."""
        try:
            settings = load_settings()
            reload.refuse_rebinding(self._first.settings, settings)
            candidate = launch.basis(settings, old=self.reload.basis)
            plan = launch_plan.plan("cpu:0", candidate, self._environment, arguments=CHECK)
            self._check = Child(plan, tempfile.TemporaryFile())  # noqa: SIM115 - its stderr; a pipe would keep it waiting
        except (SettingsError, HostError, OSError) as error:
            return self.reload.refuse(str(error))
        log.info("reload: checking settings and weights")
        self.reload.try_out(candidate, time.monotonic())
        self._watch(self._check)
        return ()

    def kill_all(self) -> None:
        for child in self._running():
            child.process.kill()
            child.reap()

    def _running(self) -> list[Child]:
        return [*self.children.values(), *([self._check] if self._check else [])]

    def report_changes(self) -> bool:
        """A line for each slot whose state has changed; whether there is one."""
        slots = self.supervisor.slots.values()
        changed = [slot for slot in slots if self._reported.get(slot.name) != (slot.generation, slot.state)]
        for slot in changed:
            self._reported[slot.name] = (slot.generation, slot.state)
            level = logging.ERROR if slot.state in (State.BACKOFF, State.FAILED, State.RESTING) else logging.INFO
            reason = f": {slot.reason}" if slot.reason else ""
            log.log(level, "%s%s", slot.state.value, reason, extra=about(slot=identity(slot.name, slot.generation)))
        return bool(changed)

    def describe(self, now: float) -> list[dict[str, Any]]:
        """What a snapshot shows of each slot; see `Stats.snapshot`."""
        return [self._describe(slot, now) for slot in self.supervisor.listed]

    def _describe(self, slot: supervisor.Slot, now: float) -> dict[str, Any]:
        name = identity(slot.name, slot.generation)
        child = self.children.get(name)
        heard = self._broker.last_heard(name)
        silent = slot.state is State.READY and heard is not None and now - heard > SILENT_S
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

    def _spawn(self, slot: str, generation: int) -> Actions:
        basis = self.reload.basis
        try:
            present = launch.follow_host(basis)
            plan = launch_plan.plan(
                slot, present, self._environment, generation=generation, endpoint=self._endpoint, token=self._token
            )
            child = Child(plan)
        except (OSError, HostError) as error:
            if isinstance(error, HostError) and generation == 1 and basis is self._first:
                raise  # nothing is served yet: the settings do not fit this host
            how = f"cannot be started: {error}"
            return self.supervisor.exited(slot, generation, how, EXIT_HOST_LACKS, False, time.monotonic())
        if present.available != basis.available:
            now, before = format_cpus(present.available), format_cpus(basis.available)
            log.warning("CPUs %s may be used now, before %s", now, before, extra=about(slot=child.name))
        for warning in plan.warnings:
            log.warning("%s", warning, extra=about(slot=child.name))
        self.children[child.name] = child
        self._watch(child)
        return ()

    def _evict(self, child: Child, reason: str) -> Actions:
        if actions := self.supervisor.evict(child.slot, child.generation, reason, time.monotonic()):
            log.error("%s: aborted", reason, extra=about(slot=child.name))
        return actions


def how_it_ended(code: int) -> str:
    """An exit code, as of `subprocess`, in words."""
    if -code in list(signal.Signals):
        return f"killed by {signal.Signals(-code).name}"
    if code < 0:
        return f"killed by signal {-code}"
    if code == UNKNOWN_END:
        return "ended, and nobody knows how"
    if code == EXIT_OVERTIME:
        return "ended: an image took too much of a CPU (limits.max_decode_s)"
    if code == EXIT_DEVICE_BROKEN:
        return f"ended: the device has a fault that no new process mends: {RESET}"
    return f"exited with code {code}"
