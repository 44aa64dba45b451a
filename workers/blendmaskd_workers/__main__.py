"""A worker process: `python -m blendmaskd_workers`, started by the daemon for one device; not for people.

With ``--check`` it only loads settings and weights, on the CPU, and says on stderr what is wrong with them: the daemon
tries a reload this way first. With ``--probe`` it only opens its device and prints what it found, as JSON; `blendmaskd
check` asks so.
"""
from __future__ import annotations

import logging
import os
import signal
import sys

import msgspec

from blendmaskd import assignment, logs, probe
from blendmaskd.assignment import EXIT_CANNOT_BOOT, EXIT_HOST_LACKS, Assignment, AssignmentError
from blendmaskd.extras import lacking
from blendmaskd.probe import Cause, Probe
from blendmaskd.settings import Settings
from blendmaskd.wanted import differences
from blendmaskd_workers import process


def main(argv: list[str]) -> int:
    try:
        assigned = assignment.read(os.environ)
    except AssignmentError as error:
        print(f"workers: {error}", file=sys.stderr)
        return EXIT_CANNOT_BOOT
    logs.configure(assigned.settings.log, slot=assigned.identity)
    process.end_with_parent()
    if os.getppid() != assigned.daemon_pid:
        return 1  # it died before the kernel knew
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the daemon's business: it drains, then tells its workers
    try:
        if "--check" in argv:
            return _check(assigned.settings)
        if "--probe" in argv:
            print(probe.in_a_line(_probe(assigned)), end="", flush=True)
            return 0
        return _work(assigned)
    except ModuleNotFoundError as error:
        print(f"workers: {lacking(error)}", file=sys.stderr)
        return EXIT_CANNOT_BOOT


def _check(settings: Settings) -> int:
    from blendmaskd_workers import engines
    from blendmaskd_workers.engines import EngineError

    on_cpus = any(device.startswith("cpu:") for device in settings.devices)
    precision = settings.model.precision if on_cpus else "fp32"  # another device's is not for a CPU to judge
    model = msgspec.structs.replace(settings.model, precision=precision)
    try:
        engines.make(msgspec.structs.replace(settings, model=model), "cpu").load()
    except EngineError as error:
        print(error, file=sys.stderr)
        return EXIT_CANNOT_BOOT
    return 0


def _probe(assignment: Assignment) -> Probe:
    try:
        from blendmaskd_workers import devices
    except ModuleNotFoundError as error:
        return Probe(error=lacking(error), cause=Cause.NO_PACKAGE)
    try:
        device = devices.open_device(assignment.local_device, assignment.settings.model.precision)
    except devices.DeviceError as error:
        return Probe(error=str(error), cause=error.cause)
    wanted, secret = assignment.wanted, assignment.settings.worker_env
    return Probe(
        name=device.name(),
        memory_bytes=device.memory().total,
        bf16=device.multiplies_bf16(),
        chosen=f"{device.effects()['dtype']}: {device.why}" if device.why else "",
        differences=tuple(differences(wanted, process.observe(wanted, device), secret)),
    )


def _work(assignment: Assignment) -> int:
    log = logging.getLogger("blendmaskd.worker")
    settings = assignment.settings
    from blendmaskd.images.quiet import quiet
    from blendmaskd_workers import engines
    from blendmaskd_workers.channel import Channel
    from blendmaskd_workers.engines import EngineError
    from blendmaskd_workers.loop import Loop

    quiet()
    engine = engines.make(settings, assignment.local_device)
    batching = engines.batching(settings)
    try:
        engine.load()
        engine.warm_up(settings.warm_up, batching.target())
    except EngineError as error:
        log.error("%s", error)
        return EXIT_HOST_LACKS if _of_a_file(error) else error.exit_code
    return Loop(assignment, engine, batching, Channel(assignment.identity, assignment.endpoint)).run()


def _of_a_file(error: BaseException | None) -> bool:
    """Whether it is about a file that could not be read: on a mount that is away, it may be back."""
    return error is not None and (isinstance(error, OSError) or _of_a_file(error.__cause__))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    os._exit(code)  # pool threads may still be in a long call that nobody waits for
