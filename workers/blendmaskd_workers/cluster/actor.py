"""A Data actor: does tasks with a `Segmenter`, and keeps what comes of each image in the journal.

A task that was begun before was cut short by the end of another worker. Then what that one came to is not done again,
and the rest is run one at a time, so that an image that ends workers is known and fails alone.
"""
from __future__ import annotations

import logging
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from blendmaskd import settings
from blendmaskd.logs import about
from blendmaskd.programs.errors import OutputError
from blendmaskd.programs.lines import Stamp
from blendmaskd.protocol import Code, Failed, Image, Options
from blendmaskd_workers.cluster import journal, tasks
from blendmaskd_workers.cluster.channel import Answer, WorkerLost
from blendmaskd_workers.cluster.segmenter import Segmenter, leases_at_once
from blendmaskd_workers.cluster.tasks import Task
from blendmaskd_workers.loop import EXIT_ENGINE_BROKEN

log = logging.getLogger("blendmaskd.worker")

DAY_S = 86400.0  # nobody waits for one image
WATCH_S = 1.0


class SegmentTasks:
    """Callable for Ray Data: a row with a task in, a row with what came of it out."""

    def __init__(self, tree: dict[str, Any], folder: str, options: Options) -> None:
        loaded = settings.from_tree(tree)
        self._folder = Path(folder)
        self._options = options
        self._max_attempts = loaded.max_attempts
        self._segmenter = Segmenter(loaded)
        self._part = journal.open_part(self._folder, f"{self._segmenter.node}-{self._segmenter.device}")
        self._room = threading.Semaphore(leases_at_once(loaded))
        self._trouble: OutputError | None = None
        self._begun = 0.0
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        task = msgspec.json.decode(row["task"], type=Task)
        self._begun = self._begun or time.monotonic()
        attempt = journal.begin(self._folder, f"task-{task.number}")
        done = journal.index(self._folder, tasks.stamps(task)) if attempt > 1 else {}
        images, failed = 0, 0
        running: list[Future[Answer | Failed]] = []
        for place, stamp, payload in tasks.read(task):
            if place in done:
                continue
            future = self._begin(place, stamp, payload, alone=attempt > 1)
            running.append(future)
            if attempt > 1:
                future.exception()  # not the next before this one is over
        for future in running:
            failed += isinstance(future.result(), Failed)
            images += 1
        if self._trouble:
            raise self._trouble
        return {
            "node": self._segmenter.node, "device": self._segmenter.device, "images": images + len(done),
            "failed": failed, "pid": os.getpid(), "seconds": time.monotonic() - self._begun,
        }  # fmt: skip

    def _begin(self, place: int, stamp: Stamp, payload: bytes | OSError, *, alone: bool) -> Future[Answer | Failed]:
        """Start an image. Its line is in the journal before its future tells."""
        over: Future[Answer | Failed] = Future()
        if isinstance(payload, OSError):
            failed = Failed(job="", code=Code.BAD_REQUEST, reason=f"cannot be read: {payload.strerror}")
            self._end(place, stamp, failed, over)
        elif alone and journal.tries(self._folder, f"image-{place}") >= max(self._max_attempts - 1, 1):
            reason = f"{self._max_attempts} workers were lost with it"
            self._end(place, stamp, Failed(job="", code=Code.WORKER_LOST, reason=reason), over)
        else:
            self._room.acquire()
            name = f"image-{place}"
            try:
                answer = self._segmenter.submit(
                    Image(kind="encoded"), payload, self._options, DAY_S, alone=alone,
                    on_start=lambda: alone and journal.begin(self._folder, name),
                )  # fmt: skip
            except WorkerLost:
                _break()
            answer.add_done_callback(lambda done: self._over(place, stamp, done, over))
        return over

    def _over(self, place: int, stamp: Stamp, done: Future[Answer | Failed], over: Future[Answer | Failed]) -> None:
        self._room.release()
        if done.exception():
            _break()
        self._end(place, stamp, done.result(), over)

    def _end(self, place: int, stamp: Stamp, outcome: Answer | Failed, over: Future[Answer | Failed]) -> None:
        found: dict[str, Any] = {"node": self._segmenter.node, "device": self._segmenter.device}
        if isinstance(outcome, Failed):
            found |= {"code": outcome.code, "reason": outcome.reason}
        else:
            detections = msgspec.Raw(msgspec.json.encode(msgspec.msgpack.decode(outcome.detections)))
            found |= {"width": outcome.width, "height": outcome.height, "detections": detections}
        try:
            self._part.write(msgspec.json.encode(journal.Line(image=place, stamp=stamp, **found)))
        except OutputError as error:
            self._trouble = error
        over.set_result(outcome)

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH_S)
            trouble = self._segmenter.trouble()
            if trouble:
                log.error("%s: restarting the worker", trouble, extra=about(slot=self._segmenter.device))
                _break()


def _break() -> None:
    """End this process: Ray starts another, and gives its tasks to others."""
    os._exit(EXIT_ENGINE_BROKEN)
