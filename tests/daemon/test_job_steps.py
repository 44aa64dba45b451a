"""What the broker's core tells of each job: a story with one beginning and one end, whatever happens."""
from __future__ import annotations

import itertools
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from blendmaskd.core.actions import SendWorker
from blendmaskd.core.broker import Broker
from blendmaskd.core.jobs import Step
from blendmaskd.core.refusals import Limits
from blendmaskd.protocol import Cancel, Code, FailedLease, Finished, Image, Lease, Started, Submit

LIMITS = Limits(max_jobs=4, max_bytes=1 << 20, max_image_bytes=100, max_attempts=2, deadline_s=50, stall_s=1000)
ENDS = {"answered", "failed", "dropped"}
FOLLOWS = {  # a step: what may come next
    "accepted": {"leased", *ENDS},
    "leased": {"started", "suspected", *ENDS},
    "started": {"suspected", *ENDS},
    "suspected": {"leased", *ENDS},
}


class Host:
    """A broker, and workers that do as they are told."""

    def __init__(self, tracing: bool = True) -> None:
        self.broker = Broker(LIMITS)
        self.broker.tracing = tracing
        self.now = 0.0
        self.leases: dict[str, list[int]] = {}
        self.lives = 0

    def take(self, actions: object) -> None:
        for action in actions:  # type: ignore[attr-defined]
            if isinstance(action, SendWorker) and isinstance(action.message, Lease):
                self.leases[action.worker].append(action.message.lease)

    def spawn(self) -> None:
        self.lives += 1
        self.leases[f"w.{self.lives}"] = []
        self.take(self.broker.ready(f"w.{self.lives}", "npu:0", 2, self.now))

    def submit(self, client: bytes, name: str, size: int = 10) -> None:
        image = f"{client!r} {name}".encode().ljust(size)  # different from all others
        self.take(self.broker.submit(client, Submit(job=name, image=Image(kind="encoded")), [image], self.now))

    def stories(self) -> dict[tuple[bytes, str, float], list[Step]]:
        told: dict[tuple[bytes, str, float], list[Step]] = defaultdict(list)
        for step in self.broker.steps:
            told[step.client, step.job, step.accepted].append(step)
        return told


events = st.lists(
    st.tuples(st.sampled_from(["submit", "start", "finish", "fail", "die", "spawn", "cancel", "leave", "wait"]),
              st.integers(0, 5)),
    min_size=25,  # or most are too short for anything to happen twice
    max_size=60,
)  # fmt: skip


@given(events)
@settings(max_examples=150, deadline=None)
def test_a_story_has_one_beginning_and_one_end(history: list[tuple[str, int]]) -> None:
    host = Host()
    host.spawn()
    for count, (event, number) in enumerate(history):
        host.now += 1 / 1024  # so that each job's story has its own time
        act(host, event, number, count)
    host.take(host.broker.end_drain())
    for story in host.stories().values():
        names = [step.what for step in story]
        if names[0] == "refused":
            assert (names, story[0].code) == (["refused"], Code.BUSY)
            continue
        assert names[0] == "accepted"
        assert [name for name in names if name in ENDS] == names[-1:]
        assert all(after in FOLLOWS[before] for before, after in itertools.pairwise(names))
        assert all(bool(step.worker) == (step.lease > 0) for step in story)
        assert (story[-1].code == "ok") == (names[-1] == "answered")


def act(host: Host, event: str, number: int, count: int) -> None:
    broker, held = host.broker, [(w, lease) for w, leases in host.leases.items() for lease in leases]
    worker, lease = held[number % len(held)] if held else ("", 0)
    match event:
        case "submit":
            host.submit(b"ab"[number % 2 :], str(count))
        case "start" if held:
            host.take(broker.started(worker, Started(leases=[lease]), host.now))
        case "finish" | "fail" if held:
            host.leases[worker].remove(lease)
            if event == "finish":
                done = Finished(lease=lease, width=1, height=1, timings={})
                host.take(broker.finished(worker, done, [b""], host.now))
            else:
                failed = FailedLease(lease=lease, code=Code.ENGINE_FAILED, reason="why")
                host.take(broker.failed(worker, failed, host.now))
        case "die" if held:
            del host.leases[worker]
            host.take(broker.exited(worker, host.now, "died"))
        case "spawn" if len(host.leases) < 2:
            host.spawn()
        case "cancel":
            host.take(broker.cancel(b"ab"[number % 2 :], Cancel(job=str(max(0, count - number))), host.now))
        case "leave":
            host.take(broker.client_gone(b"ab"[number % 2 :], host.now))
        case "wait":
            host.now += 10 * number
            host.take(broker.expire(host.now))


def test_without_tracing_only_failures_are_told() -> None:
    host = Host(tracing=False)
    host.spawn()
    for name in "123456789":
        host.submit(b"a", name)  # the last ones are refused
    [worker] = host.leases
    host.take(host.broker.finished(worker, Finished(lease=host.leases[worker][0], width=1, height=1, timings={}),
                                   [b""], 1.0))  # fmt: skip
    assert host.broker.steps == []
    host.take(host.broker.expire(60.0))
    assert {step.what for step in host.broker.steps} == {"failed"}
    assert {step.code for step in host.broker.steps} == {Code.TIMEOUT}
