"""Two runs in flight: in which order the device is asked, and that this changes nothing for anybody's image."""
from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import numpy as np
import pytest

from blendmaskd import settings
from blendmaskd.assignment import EXIT_DEVICE_BROKEN, EXIT_HOST_LACKS, Assignment
from blendmaskd.images.decoding import ImageError, bgr
from blendmaskd.protocol import Code, Failed, Image, Options
from blendmaskd.wanted import Wanted
from blendmaskd_workers import engines, loop
from blendmaskd_workers.cluster.channel import Answer, LocalChannel, WorkerLost
from blendmaskd_workers.engines.timed import TimedEngine, TimedRun
from blendmaskd_workers.loop import EXIT_ENGINE_BROKEN, Loop
from blendmaskd_workers.results import LateError

SHAPE = (6, 8, 3)
STEPS = ("complete", "choose", "collect")


class Recorded(TimedEngine):
    """The timed engine, which notes what it is asked for, and fails where it is told to."""

    def __init__(self, latency_ms: float) -> None:
        super().__init__(settings.Timed(latency_ms={1: latency_ms}))
        self.steps: list[tuple[str, int]] = []
        self.fails: set[tuple[str, int]] = set()
        self.words = ""  # of what it raises
        self.started = threading.Event()
        self.given: list[Any] | None = None  # instead of the outputs

    def launch(self, batch: Sequence[Any]) -> RecordedRun:
        number = 1 + sum(step == "launch" for step, _ in self.steps)
        self.note("launch", number)
        self.started.set()
        return RecordedRun(self, batch, number)

    def finish(self, output: Any, prepared: Any, options: Options, deadline: float) -> list[Any]:
        return self.finished(super().finish(output, prepared, options, deadline))

    def finished(self, results: list[Any]) -> list[Any]:
        """To be replaced."""
        return results

    def note(self, step: str, number: int) -> None:
        self.steps.append((step, number))
        if (step, number) in self.fails:
            raise RuntimeError(f"{step} of {number}{self.words}")


class RecordedRun(TimedRun):
    def __init__(self, engine: Recorded, batch: Sequence[Any], number: int) -> None:
        super().__init__(engine, batch)
        self.recorded, self.number = engine, number

    def complete(self) -> None:
        self.recorded.note("complete", self.number)
        super().complete()

    def choose(self) -> None:
        self.recorded.note("choose", self.number)
        super().choose()

    def collect(self) -> list[Any]:
        self.recorded.note("collect", self.number)
        outputs = super().collect()
        return outputs if self.recorded.given is None else self.recorded.given


class Worker:
    """A worker's loop in a thread of the test."""

    def __init__(self, latency_ms: float) -> None:
        chosen = settings.from_tree({"devices": ["cpu:0"], "engine": "timed", "batch": 1})
        wanted = Wanted(cpus="0", threads=None, task_queue=None, preload=None, env={})
        assignment = Assignment("cpu:0", "cpu", 1, "", "", os.getpid(), chosen, wanted)
        self.engine = Recorded(latency_ms)
        self.channel = LocalChannel("here", "cpu:0", lambda _: None)
        self.loop = Loop(assignment, self.engine, engines.batching(chosen), self.channel)
        self.codes: list[int] = []
        self.thread = threading.Thread(target=lambda: self.codes.append(self.loop.run()))
        self.thread.start()
        assert isinstance(self.submit().result(10), Answer)  # from now on it is known how long a run takes
        self.engine.steps.clear()
        self.engine.started.clear()

    def submit(self, deadline_s: float = 30.0, pixel: int = 0) -> Future[Answer | Failed]:
        image = Image(kind="raw", shape=SHAPE)
        return self.channel.submit(image, np.full(SHAPE, pixel, np.uint8).tobytes(), Options(), deadline_s)

    def together(self, number: int) -> list[Future[Answer | Failed]]:
        """So many images, of which the first is on the device when the others come."""
        first = self.submit()
        assert self.engine.started.wait(10)
        return [first, *(self.submit() for _ in range(number - 1))]

    def end(self) -> int:
        self.channel.stop()
        self.thread.join(10)
        return self.codes[0]


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    interval = sys.getswitchinterval()
    worker = Worker(latency_ms=getattr(request, "param", 200))
    yield worker
    worker.end()
    gc.unfreeze()
    sys.setswitchinterval(interval)


def outcomes(futures: Sequence[Future[Answer | Failed]]) -> list[str]:
    results = [future.result(10) for future in futures]
    return [result.code if isinstance(result, Failed) else "answered" for result in results]


def test_the_next_batch_is_begun_before_the_host_chooses_and_completed_after(worker: Worker) -> None:
    assert outcomes(worker.together(3)) == ["answered"] * 3
    assert worker.engine.steps == [
        ("launch", 1), ("complete", 1),
        ("launch", 2), ("choose", 1), ("complete", 2), ("collect", 1),
        ("launch", 3), ("choose", 2), ("complete", 3), ("collect", 2),
        ("choose", 3), ("collect", 3),
    ]  # fmt: skip


def test_who_goes_ahead_waits_for_no_host_thread_of_others(worker: Worker) -> None:
    prepare, tell, go_on = worker.engine.prepare, worker.channel._tell, threading.Event()

    def takes_long(photograph: Any) -> Any:
        if bgr(photograph).any():
            go_on.wait(30)
        return prepare(photograph)

    worker.engine.prepare = takes_long
    running = worker.submit()
    assert worker.engine.started.wait(10)
    others = [worker.submit(pixel=1) for _ in range(worker.loop._host_threads + 1)]
    worker.channel._tell = lambda message, payload: tell(msgspec.structs.replace(message, ahead=True), payload)
    polite = worker.submit()
    worker.channel._tell = tell
    assert outcomes([polite]) == ["answered"]
    assert not any(each.done() for each in others)
    go_on.set()
    assert outcomes([running, *others]) == ["answered"] * (1 + len(others))


def test_what_was_revoked_or_is_too_late_is_not_begun(worker: Worker) -> None:
    running = worker.together(2)
    late, unwanted, last = worker.submit(0.05), worker.submit(), worker.submit()
    unwanted.cancel()
    assert outcomes([*running, late, last]) == ["answered", "answered", Code.TIMEOUT, "answered"]
    assert sum(step == "launch" for step, _ in worker.engine.steps) == 3


@pytest.mark.parametrize("step", ["launch", *STEPS])
def test_a_run_that_fails_takes_no_other_with_it(worker: Worker, step: str) -> None:
    worker.engine.fails = {(step, 2)}
    assert outcomes(worker.together(4)) == ["answered", Code.ENGINE_FAILED, "answered", "answered"]
    assert outcomes([worker.submit()]) == ["answered"]


def raises(error: BaseException) -> Callable[[Any], Any]:
    def fail(_: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("worker", [10], indirect=True)
@pytest.mark.parametrize(
    "finished",
    [raises(SystemExit(0)), raises(RuntimeError("x" * 10_000_000)), raises(OSError("\udcff.jpg")), lambda _: [object()],
     lambda _: [2**70], lambda _: [{("a", "key"): {1, 2}}]],
)  # fmt: skip
def test_whatever_finishing_does_each_lease_ends_once(
    worker: Worker, finished: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.log, "disabled", True)  # pytest-xdist cannot pass on what is no text
    worker.engine.finished = finished
    assert outcomes(worker.together(3)) == [Code.ENGINE_FAILED] * 3
    worker.engine.finished = lambda results: results
    assert outcomes([worker.submit()]) == ["answered"]


@pytest.mark.parametrize("worker", [10], indirect=True)
@pytest.mark.parametrize(("error", "code"), [
    (LateError(), Code.TIMEOUT), (ImageError(Code.TOO_LARGE, "too many"), Code.TOO_LARGE),
])  # fmt: skip
def test_results_that_come_too_late_or_are_too_much_say_so(worker: Worker, error: Exception, code: Code) -> None:
    worker.engine.finished = raises(error)
    assert outcomes(worker.together(2)) == [code] * 2


@pytest.mark.parametrize("worker", [10], indirect=True)
@pytest.mark.parametrize("outputs", [[], [1, 2]])
def test_too_few_outputs_or_too_many_are_a_failure(worker: Worker, outputs: list[Any]) -> None:
    worker.engine.given = outputs
    assert outcomes(worker.together(2)) == [Code.ENGINE_FAILED] * 2
    worker.engine.given = None
    assert outcomes([worker.submit()]) == ["answered"]


def test_an_engine_that_always_fails_is_given_up_with_every_lease_answered(worker: Worker) -> None:
    worker.engine.fails = {("choose", number) for number in range(1, 9)}
    assert outcomes(worker.together(3)) == [Code.ENGINE_FAILED] * 3
    worker.thread.join(10)
    assert worker.codes == [EXIT_ENGINE_BROKEN]


FAULTS = {507014: EXIT_ENGINE_BROKEN, 507899: EXIT_HOST_LACKS, 507054: EXIT_DEVICE_BROKEN}


@pytest.mark.parametrize("step", ["launch", *STEPS])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_device_ends_the_worker_and_is_no_images_answer(worker: Worker, fault: int, step: str) -> None:
    """The images stay owed: whoever gave them hears that the worker has ended, and tries them elsewhere."""
    worker.engine.fails = {(step, 2)}
    worker.engine.words = f": NPU function error: stand-in, error code is {fault}[ERROR] 2026"
    _, *others = worker.together(4)
    worker.thread.join(20)
    assert worker.codes == [FAULTS[fault]]
    worker.channel.close("it has ended")
    assert {type(other.exception(10)) for other in others} == {WorkerLost}


def test_a_fault_while_an_image_is_prepared_is_not_the_images_either(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = raises(RuntimeError("copy_h2d: NPU function error: stand-in, error code is 507901"))
    monkeypatch.setattr(worker.engine, "prepare", fault)
    futures = [worker.submit() for _ in range(3)]
    worker.thread.join(20)
    assert worker.codes == [EXIT_HOST_LACKS]
    worker.channel.close("it has ended")
    assert {type(future.exception(10)) for future in futures} == {WorkerLost}
