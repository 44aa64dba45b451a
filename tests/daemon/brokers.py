"""What the tests of the broker share: its messages by hand, and what its actions say."""
from __future__ import annotations

from typing import Any

from blendmaskd.core.actions import Action, Answered, SendWorker
from blendmaskd.core.broker import Broker
from blendmaskd.core.refusals import Limits
from blendmaskd.protocol import Failed, Finished, Image, Lease, Result, Submit

LIMITS = Limits(
    max_jobs=4, max_bytes=1000, max_image_bytes=500, max_attempts=2, deadline_s=10.0, stall_s=5.0, paths_allowed=False
)
ANSWER = [b"detections"]


def submit(
    broker: Broker, job: str, now: float = 0.0, client: bytes = b"c", size: int = 10, user: bytes = b"", **fields: Any
) -> list[Action]:
    message = Submit(job=job, image=Image(kind="encoded"), **fields)
    actions = broker.submit(client, message, [job.encode().ljust(size, b"x")], now, user)  # an image of its own
    broker.check()
    return actions


def leases(actions: list[Action]) -> list[tuple[str, int]]:
    """Worker and number of each lease among the actions."""
    return [(a.worker, a.message.lease) for a in actions if isinstance(a, SendWorker) and isinstance(a.message, Lease)]


def answers(actions: list[Action]) -> dict[str, Result | Failed]:
    return {a.answer.job: a.answer for a in actions if isinstance(a, Answered)}


def finish(broker: Broker, worker: str, lease: int, now: float = 1.0) -> list[Action]:
    message = Finished(lease=lease, width=2, height=1, timings={"device": 0.02})
    actions = broker.finished(worker, message, ANSWER, now)
    broker.check()
    return actions


def lose(broker: Broker, worker: str, now: float = 1.0) -> list[Action]:
    actions = broker.exited(worker, now, f"{worker} killed by SIGKILL")
    broker.check()
    return actions


def with_workers(broker: Broker, *names: str, window: int = 2) -> Broker:
    for name in names:
        broker.ready(name, name.partition(".")[0], window, 0.0)
    return broker


def serve_all(broker: Broker, actions: list[Action]) -> list[str]:
    """Finish one lease after the other, all in one worker, until nothing waits; the jobs in their order."""
    given = []
    held = leases(actions)
    while held:
        [(worker, lease), *held] = held
        actions = finish(broker, worker, lease)
        given += list(answers(actions))
        held += leases(actions)
    return given


def leased_ahead(actions: list[Action]) -> list[bool]:
    return [a.message.ahead for a in actions if isinstance(a, SendWorker) and isinstance(a.message, Lease)]
