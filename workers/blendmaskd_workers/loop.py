"""The worker's loop: receive, decode, batch, run, finish, answer, so that the device does not wait.

=========  ==========================================================================================
main       takes leases in, reports each second
host       a small pool: decodes and prepares the next images, finishes and answers the last ones
express    one: does the same for images that go ahead of others, which may keep the pool for seconds
device     one: forms batches from what is prepared, runs the engine
teller     one: tells the daemon which batch has started
preview    one, where `show_last_image` is on: draws a picture now and then
overtime   one: ends the process for an image that keeps a thread for too long
=========  ==========================================================================================

A lease that comes while no other is held is lone: the device thread does all of it, because nothing could overlap and
each change of thread costs time; while such leases are quick, the main thread does. It is not reported as started as
long as it is the only one: if the worker dies, the daemon knows what it died of.

The device has work while its thread chooses what is kept of a batch's candidates: the next batch is launched before
they are waited for. So three batches are under way at most: one in its first visit, one before or in its second, and
one that is being prepared.

While the device waits, its thread must do nothing that gives the interpreter lock away, such as sending: taking the
lock back can last as long as a host thread's longest step. So a batch's start is told by a thread of its own, and only
what must be done lies between two runs.

A lease ends with exactly one `Finished` or `FailedLease`, whatever happens to its image; `_end` is the only place that
sends one. Deadlines and revocations are looked at before decoding, right before the device, and before the masks.
"""
from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import msgpack
import psutil

from blendmaskd import ascend, protocol
from blendmaskd.assignment import EXIT_DEVICE_BROKEN, EXIT_HOST_LACKS, EXIT_OVERTIME, Assignment
from blendmaskd.discovery import cpu_quota
from blendmaskd.images import decoding as images
from blendmaskd.images.decoding import ImageError
from blendmaskd.logs import about
from blendmaskd.protocol import Code, RegionError
from blendmaskd.settings import Settings
from blendmaskd_workers import process
from blendmaskd_workers.batching import Batching, ahead
from blendmaskd_workers.channel import Connection
from blendmaskd_workers.engines import Engine
from blendmaskd_workers.flight import Flight
from blendmaskd_workers.overtime import Overtime
from blendmaskd_workers.preview import Previews
from blendmaskd_workers.ready import Item, ReadyQueue
from blendmaskd_workers.regions import Regions
from blendmaskd_workers.reports import Busy, Reporter
from blendmaskd_workers.results import LateError

log = logging.getLogger("blendmaskd.worker")

EARLY = 0.8  # of a first visit: so long its end need not be looked for
QUICK_S = 0.002  # so long the main thread may be kept from receiving
SWITCH_S = 0.0005  # how long a thread that needs the interpreter lock waits until it asks for it; Python's own is 5 ms
ENGINE_FAILURES_IN_A_ROW = 3  # then the device is taken to be broken rather than the images
LONGEST_REASON = 1000  # characters, whatever a library says
LOOK_S = 0.5  # how often it is looked for overtime
LAST_S = 1.0  # for the main thread to end the process, if it is not what takes so long
EXIT_ENGINE_BROKEN = 70  # sysexits' EX_SOFTWARE

T = TypeVar("T")


class Loop:
    """Serves leases with a loaded engine until told to stop. `run` returns the exit code."""

    def __init__(self, assignment: Assignment, engine: Engine, batching: Batching, channel: Connection) -> None:
        self._assignment = assignment
        self._settings: Settings = assignment.settings
        self._engine = engine
        self._batching = batching
        self._lock = threading.Lock()  # for the next three
        self._held: dict[int, Item] = {}
        self._images = 0  # finished since the last report
        self._preparing_s = 0.0  # spent on images since the last report
        self._ahead = 0  # see `batching.ahead`
        self._most_held = 0, 0  # at once, in the last second and in this one
        self._lone_is_quick = False  # as the last one was
        self._failures = 0  # of the engine, in a row
        self._channel = channel
        self._regions = Regions(assignment.daemon_pid)
        self._overtime = Overtime()
        self._previews = Previews(self._send_preview) if self._settings.show_last_image else None
        self._prepared = ReadyQueue(batching, self._settings.max_wait_ms / 1000, lambda: max(self._most_held) <= 1)
        self._busy = Busy()
        # a device that works while we do something else has a clock of its own
        self._watch = contextlib.nullcontext() if engine.overlaps else self._busy
        self._exit_code: int | None = None
        self._host_threads = process.host_threads(self._settings, len(os.sched_getaffinity(0)), cpu_quota())
        self._host = ThreadPoolExecutor(self._host_threads, thread_name_prefix="host")
        self._express = ThreadPoolExecutor(1, thread_name_prefix="express")
        self._teller = ThreadPoolExecutor(1, thread_name_prefix="teller")

    def run(self) -> int:
        with self._channel:
            threading.Thread(target=self._run_device, name="device", daemon=True).start()
            threading.Thread(target=self._look_for_overtime, name="overtime", daemon=True).start()
            sys.setswitchinterval(SWITCH_S)
            gc.collect()
            gc.freeze()  # a collection that looks through all of torch would hold every thread up for 0.1 s
            engine = self._engine
            actual = process.observe(self._assignment.wanted, engine.device, engine.exact, engine.model)
            self._channel.send(
                protocol.Ready(token=self._assignment.token, pid=os.getpid(), window=self._window(), actual=actual)
            )
            reporter = Reporter(self._report)
            while self._exit_code is None:
                self._receive()
                reporter.report_if_due()
                self._channel.wait(reporter.due_ms())
        return self._exit_code

    # -- main thread ------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        for message, payload in self._channel.receive():
            match message:
                case protocol.Lease():
                    self._accept(Item(message, payload, time.monotonic()))
                case protocol.Revoke():
                    item = self._held.get(message.lease)
                    if item is not None:
                        item.revoked = True
                case protocol.OpenRegion():
                    self._regions.open(message)
                case protocol.CloseRegion():
                    self._regions.close(message.region)
                case protocol.Stop():
                    self._exit_code = 0
                    self._channel.wake()

    def _accept(self, item: Item) -> None:
        with self._lock:
            others = list(self._held.values())
            self._held[item.lease.lease] = item
        before, now = self._most_held
        self._most_held = before, max(now, len(others) + 1)
        if not others:
            item.lone = True
            if not self._lone_is_quick:
                self._prepared.put(item)
            elif self._can_run(item):  # nobody else uses the device: all that is held is this
                self._run([item])
            return
        for lone in [other for other in others if other.lone]:
            lone.lone = False
            self._channel.send(protocol.Started(leases=[lone.lease.lease]))
        self._threads_for(item).submit(self._unless_it_dies, self._prepare_and_put, item)

    def _threads_for(self, item: Item) -> ThreadPoolExecutor:
        return self._express if item.lease.ahead else self._host

    def _window(self) -> int:
        batches = 3 if self._engine.overlaps else 2  # one is already here, the others run
        return batches * self._batching.target() + self._ahead

    def _report(self, start: float, end: float) -> None:
        with self._lock:
            images, self._images = self._images, 0
            preparing_s, self._preparing_s = self._preparing_s, 0.0
        self._most_held = self._most_held[1], len(self._held)
        busy_s, idle_s = self._busy.take(end)
        if images:
            self._ahead = ahead(preparing_s, busy_s, self._host_threads)
        self._channel.send(
            protocol.Report(
                start=start,
                end=end,
                images=images,
                busy_s=busy_s,
                idle_s=idle_s,
                memory_bytes=psutil.Process().memory_info().rss,
                device_memory_bytes=self._engine.device.held_bytes() if self._engine.device else 0,
                shapes=self._batching.seen(),
                window=self._window(),
            )
        )

    # -- host threads, for a lone lease the device thread -----------------------------------------------------------

    def _prepare_and_put(self, item: Item) -> None:
        if self._prepare(item):
            self._prepared.put(item)

    def _prepare(self, item: Item) -> bool:
        """Whether the image is ready for the device; its lease is ended otherwise."""
        if self._overdue(item):
            return False
        start = time.monotonic()
        try:
            self._overtime.begin(item.lease.lease)
            photograph = self._photograph(item)
            item.preview = self._previews.take(photograph) if self._previews else None
            item.prepared = self._engine.prepare(photograph)
        except ImageError as error:
            self._fail(item, error.code, error.reason)
        except RegionError as error:
            self._fail(item, Code.BAD_REQUEST, str(error))
        except (Exception, SystemExit) as error:  # a library that wants to exit would end its thread and nothing else
            if self._lost(error):
                return False
            log.exception("preparing its image failed", extra=about(lease=item.lease.lease))
            self._fail(item, Code.ENGINE_FAILED, f"preparing the image: {type(error).__name__}: {error}")
        else:
            item.payload = ()
            item.ready_at = time.monotonic()
            item.timings["decode"] = item.ready_at - item.received
            with self._lock:
                self._preparing_s += item.ready_at - start
            return True
        finally:
            self._overtime.end(item.lease.lease)
        return False

    def _photograph(self, item: Item) -> images.Photograph:
        image, limits = item.lease.image, self._settings.limits
        match image.kind:
            case "encoded":
                return images.decode(self._payload(item), limits)
            case "raw":
                return images.from_raw(self._payload(item), image.shape or (), image.dtype, image.order, limits)
            case "path":
                return images.decode(images.read_path(image.path or "", self._settings.paths.roots, limits), limits)

    def _payload(self, item: Item) -> images.Payload:
        place = item.lease.image.place
        buffer: images.Payload = self._regions.view(place) if place else memoryview(item.payload[0])
        return buffer

    def _finish(self, item: Item, output: Any) -> None:
        if self._overdue(item):
            return
        start = time.monotonic()
        try:
            detections = self._engine.finish(output, item.prepared, item.lease.options, item.lease.deadline)
            payload = msgpack.packb(detections)
        except ImageError as error:
            self._fail(item, error.code, error.reason)
            return
        except LateError:
            self._fail(item, Code.TIMEOUT, "the deadline passed before its masks were done")
            return
        except (Exception, SystemExit) as error:
            log.exception("finishing its results failed", extra=about(lease=item.lease.lease))
            self._fail(item, Code.ENGINE_FAILED, f"finishing the results: {type(error).__name__}: {error}")
            return
        height, width = item.prepared.image_size
        item.timings["finish"] = time.monotonic() - start
        self._end(
            protocol.Finished(lease=item.lease.lease, width=width, height=height, timings=item.timings), [payload]
        )
        if self._previews and item.preview is not None:
            self._previews.draw(item.preview, detections)

    def _send_preview(self, jpeg: bytes) -> None:
        self._channel.send(protocol.Preview(), [jpeg])

    # -- overtime's thread ------------------------------------------------------------------------------------------

    def _look_for_overtime(self) -> None:
        most_s = self._settings.limits.max_decode_s
        while not (over := self._overtime.over(most_s)):
            if self._exit_code is not None:
                return
            time.sleep(LOOK_S)
        for lease in over:
            text = "decoding its image takes over %g s of a CPU (limits.max_decode_s): ending"
            log.error(text, most_s, extra=about(lease=lease))
        self._channel.send(protocol.Started(leases=over))  # so it is known which are to blame
        self._break(EXIT_OVERTIME)
        time.sleep(LAST_S)
        os._exit(EXIT_OVERTIME)

    # -- device thread ----------------------------------------------------------------------------------------------

    def _run_device(self) -> None:
        running: Flight | None = None
        try:
            while self._exit_code is None:
                following = self._launch(self._next(running))
                running = self._step(running, Flight.choose)
                following = self._step(following, Flight.complete)
                self._collect(running)
                running = following
        except BaseException:
            log.exception("the device thread died")
            self._break()

    def _next(self, running: Flight | None) -> list[Item]:
        """What to launch now; nothing when the device would wait for it."""
        if running is None:
            items = self._prepared.take()
        elif self._engine.overlaps:
            items = self._prepared.take_ahead(
                running.completed + EARLY * self._batching.first_s(*running.kind),
                running.run.arrived,
                lambda: len(self._held) > len(running.batch),
            )
        else:
            items = []
        return [item for item in items if self._can_run(item)]

    def _run(self, batch: list[Item]) -> None:
        """All of a run, with nothing else on the device."""
        flight = self._launch(batch)
        if flight is not None:
            self._answer(flight, self._guarded(batch, flight.through))

    def _launch(self, batch: list[Item]) -> Flight | None:
        if not batch:
            return None
        self._lone_is_quick = False
        if not batch[0].lone:
            started = protocol.Started(leases=[item.lease.lease for item in batch])
            self._teller.submit(self._unless_it_dies, self._channel.send, started)
        return self._guarded(batch, lambda: Flight(batch, self._engine.launch([item.prepared for item in batch])))

    def _step(self, flight: Flight | None, step: Callable[[Flight], Flight]) -> Flight | None:
        return flight and self._guarded(flight.batch, partial(step, flight))

    def _collect(self, flight: Flight | None) -> None:
        if flight is not None:
            self._answer(flight, self._guarded(flight.batch, flight.collect))

    def _guarded(self, batch: list[Item], step: Callable[[], T]) -> T | None:
        """A step of a batch's run; when the engine raises, each image is tried alone, and None is returned."""
        try:
            with self._watch:
                return step()
        except (Exception, SystemExit) as error:
            self._failures = 0 if self._try_alone(batch, error) else self._failures + 1
        if self._failures >= ENGINE_FAILURES_IN_A_ROW:
            log.error("the engine failed %d times in a row: starting anew", self._failures)
            self._break()
        return None

    def _try_alone(self, batch: list[Item], error: BaseException) -> bool:
        """What is left to do for a batch on which the engine raised; False when no image of it got an answer."""
        if self._lost(error):
            return False
        if len(batch) == 1:
            log.error("the engine failed", extra=about(lease=batch[0].lease.lease), exc_info=error)
            self._fail(batch[0], Code.ENGINE_FAILED, f"{type(error).__name__}: {error}")
            return False
        log.warning("the engine failed on a batch of %d, trying each image alone: %s", len(batch), error)
        alone = [self._run_alone(item) for item in batch]
        if all(alone):
            self._batching.refuse(batch[0].prepared.padded_size, len(batch))
        return any(alone)

    def _lost(self, error: BaseException) -> bool:
        """Whether the device itself has failed: this process ends without an answer, and others take its images."""
        code = ascend.fault_code(str(error))
        if code is None:
            return False
        if self._exit_code is None:
            log.error("the device has failed with %d, ending", code, exc_info=error)
            self._break(exit_code_of(code))
        return True

    def _run_alone(self, item: Item) -> bool:
        if self._exit_code is not None:
            return False
        try:
            with self._watch:
                flight = Flight([item], self._engine.launch([item.prepared]))
                outputs = flight.through()
        except (Exception, SystemExit) as error:
            return self._try_alone([item], error)
        self._answer(flight, outputs)
        return True

    def _answer(self, flight: Flight, outputs: list[Any] | None) -> None:
        """Hand the outputs to the host's threads; without any, the engine has failed, and that was answered."""
        if outputs is None:
            return
        self._failures = 0
        end, batch, times = time.monotonic(), flight.batch, flight.run.times()
        device_s = times.busy_s
        self._lone_is_quick = batch[0].lone and end - batch[0].received < QUICK_S
        if self._engine.overlaps:
            self._busy.add(times)  # before the images count
        for item, output in zip(batch, outputs):
            item.timings |= {"wait": max(end - item.ready_at - device_s, 0.0), "device": device_s}
            if len(self._held) == 1:
                self._finish(item, output)
            else:
                self._threads_for(item).submit(self._unless_it_dies, self._finish, item, output)
        self._batching.observe(*flight.kind, device_s, times.first_s)

    def _unless_it_dies(self, work: Callable[..., object], *arguments: Any) -> None:
        """In a thread of a pool, which keeps to itself what is raised: whatever `work` lets pass is our own fault."""
        try:
            work(*arguments)
        except BaseException:
            log.exception("a thread died")
            self._break()

    def _break(self, exit_code: int = EXIT_ENGINE_BROKEN) -> None:
        if self._exit_code is None:
            self._exit_code = exit_code
        self._channel.wake()

    def _can_run(self, item: Item) -> bool:
        return self._prepare(item) if item.prepared is None else not self._overdue(item)

    # -- any thread -------------------------------------------------------------------------------------------------

    def _overdue(self, item: Item) -> bool:
        """Whether nobody waits for it any more; its lease is ended then."""
        if item.revoked:
            self._fail(item, Code.CANCELLED, "revoked")
        elif time.monotonic() >= item.lease.deadline:
            self._fail(item, Code.TIMEOUT, "the deadline passed before it was done")
        else:
            return False
        return True

    def _fail(self, item: Item, code: Code, reason: str) -> None:
        text = reason[:LONGEST_REASON].encode("utf-8", "backslashreplace").decode()  # a file's name need not be text
        self._end(protocol.FailedLease(lease=item.lease.lease, code=code, reason=text))

    def _end(self, message: protocol.Finished | protocol.FailedLease, payload: Sequence[bytes] = ()) -> None:
        with self._lock:
            del self._held[message.lease]
            self._images += isinstance(message, protocol.Finished)
        self._channel.send(message, payload)


def exit_code_of(fault: int) -> int:
    """What follows a fault of the device: no new process before a reset, one when that lets it, or one at once."""
    if fault in ascend.NEEDS_A_RESET:
        return EXIT_DEVICE_BROKEN
    return EXIT_HOST_LACKS if fault in ascend.OUTLASTS_THE_PROCESS else EXIT_ENGINE_BROKEN
