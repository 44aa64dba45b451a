#!/usr/bin/env python3
"""Plant bugs in the pure cores, one at a time, and see which test catches each: `python tests/planted_bugs.py`.

Each is planted in a copy of the tree, never here, in a function that is found by its name and by what its code means,
not by its text. What is not there exactly once is refused: the code has changed, and the bug must be planted anew.
`test_planted_bugs.py` checks that, and no more, in CI; all of this program takes some minutes. Exit codes: 0 all but
`ALLOWED_TO_ESCAPE` caught · 1 more escaped, or one could not be planted.

    python tests/planted_bugs.py               # a table in Markdown
    python tests/planted_bugs.py --only 3 17   # some of them, with what the test says
    python tests/planted_bugs.py --tests tests/daemon/test_daemon_machine.py   # by these alone
"""
from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALLOWED_TO_ESCAPE = 1
TIMEOUT_S = 300
CORE = "daemon/blendmaskd/core"
BLAME, BROKER, HEALTH, JOBS, LEASES, REFUSALS, RELOAD, STATS, SUPERVISOR, SUSPECTS, TURNS = (
    f"{CORE}/{name}.py"
    for name in (
        "blame", "broker", "health", "jobs", "leases", "refusals", "reload", "stats", "supervisor", "suspects", "turns",
    )
)
PROTOCOL = "daemon/blendmaskd/protocol.py"
BATCHING = "workers/blendmaskd_workers/batching.py"
LOOP = "workers/blendmaskd_workers/loop.py"
FLIGHT = "workers/blendmaskd_workers/flight.py"
BROKER_TESTS = ["test_broker.py", "test_broker_shares.py", "test_broker_suspects.py", "test_broker_machine.py",
                "test_daemon_machine.py"]  # fmt: skip
CORE_TESTS = {
    **dict.fromkeys((BLAME, BROKER, JOBS, LEASES, REFUSALS, TURNS), BROKER_TESTS),
    SUSPECTS: ["test_suspects.py", *BROKER_TESTS],
    PROTOCOL: ["test_protocol.py", "test_daemon_machine.py"],
    SUPERVISOR: ["test_supervisor.py", "test_daemon_machine.py"],
    HEALTH: ["test_supervisor.py"],
    RELOAD: ["test_reload.py", "test_daemon_machine.py"],
    STATS: ["test_stats.py"],
    BATCHING: ["../workers/test_batching.py"],
    LOOP: ["../workers/test_two_runs.py"],
    FLIGHT: ["../workers/test_two_runs.py"],
}

Places = Iterator[tuple[ast.AST, ast.AST]]  # what is there, and what comes instead


class CannotPlant(Exception):
    """The code is not what the bug was planted in."""


@dataclass(frozen=True)
class Change:
    """Of one place in a function."""

    name: str
    places: Callable[[ast.AST], Places]


@dataclass(frozen=True)
class Bug:
    """A change of a function, method or constant, and what a user would see of it."""

    file: str
    where: str  # its qualified name
    change: Change
    why: str


def swap(old: str, new: str) -> Change:
    """Another expression. `...` in `old` stands for any."""
    pattern = ast.parse(old, mode="eval").body
    return Change(f"swap {old} for {new}", lambda tree: (
        (node, ast.parse(new, mode="eval").body) for node in ast.walk(tree) if _matches(node, pattern)
    ))  # fmt: skip


def drop(what: str, instead: str = "pass") -> Change:
    """Another statement for the innermost one that mentions this."""
    return Change(f"drop the statement that mentions {what}", lambda tree: (
        (node, ast.parse(instead).body[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and _mentions(node, what)
        and not any(_mentions(child, what) for child in ast.walk(node) if isinstance(child, ast.stmt) and child != node)
    ))  # fmt: skip


def never(what: str, taken: bool = False) -> Change:
    """The branch whose condition mentions this is never taken."""
    return Change(f"{taken} for the condition that mentions {what}", lambda tree: (
        (node.test, ast.Constant(taken))
        for node in ast.walk(tree)
        if isinstance(node, ast.If | ast.While | ast.IfExp) and _mentions(node.test, what)
    ))  # fmt: skip


def always(what: str) -> Change:
    """The branch whose condition mentions this is always taken."""
    return never(what, taken=True)


def without(what: str) -> Change:
    """Conditions without the operand that mentions this."""
    return Change(f"leave out the condition that mentions {what}", lambda tree: (
        (operand, neutral) for operand, neutral in _operands(tree) if _mentions(operand, what)
    ))  # fmt: skip


def _operands(tree: ast.AST) -> Places:
    """Those of `and`, `or` and comprehensions, each with what changes nothing there."""
    for node in ast.walk(tree):
        match node:
            case ast.BoolOp(op=op, values=values):
                yield from ((value, ast.Constant(isinstance(op, ast.And))) for value in values)
            case ast.comprehension(ifs=ifs):
                yield from ((test, ast.Constant(True)) for test in ifs if not isinstance(test, ast.BoolOp))


def _mentions(tree: ast.AST, what: str) -> bool:
    """A name or attribute of this name, or this expression."""
    if what.isidentifier():
        return any(what in (getattr(node, "id", ""), getattr(node, "attr", "")) for node in ast.walk(tree))
    pattern = ast.parse(what, mode="eval").body
    return any(_matches(node, pattern) for node in ast.walk(tree))


def _matches(node: object, pattern: object) -> bool:
    match pattern:
        case ast.Constant(value=value) if value is ...:
            return True
        case ast.expr_context():
            return True
        case ast.AST():
            fields = (_matches(getattr(node, name, None), value) for name, value in ast.iter_fields(pattern))
            return type(node) is type(pattern) and all(fields)
        case [ast.Constant(value=value)] if value is ...:
            return True
        case list():
            return isinstance(node, list) and len(node) == len(pattern) and all(map(_matches, node, pattern))
    return node == pattern


BUGS = [
    Bug(BROKER, "Broker.submit", never("account"), "a job that is sent again runs twice and is answered twice"),
    Bug(BROKER, "Broker.exited", drop("appendleft"), "a job whose worker dies is never answered"),
    Bug(BROKER, "Broker.exited", swap("self.jobs.suspects.appendleft", "self.jobs.suspects.append"),
        "a worker's death changes the order of its jobs"),
    Bug(SUSPECTS, "Suspicion.guilty", swap("max(max_attempts, 2)", "1"), "window-mates of a poison image fail with it"),
    Bug(SUSPECTS, "Suspicion.guilty", without("losses"), "an image that crashes the decoder costs one worker more"),
    Bug(BROKER, "Broker.exited", swap("self.limits.max_attempts", "self.limits.max_attempts + 1"),
        "a poison image kills one worker more than the settings allow"),
    Bug(TURNS, "Turns.at_once", swap("job.suspect or self._jobs.waiting_jobs", "self._jobs.waiting_jobs"),
        "a suspect that comes again is leased in company"),
    Bug(TURNS, "Turns._open", without("alone"),
        "others are leased to the worker that tries a suspect, and die with it"),
    Bug(TURNS, "Turns.next", swap("self._jobs.suspects", "self._jobs.suspects and not self._jobs.waiting"),
        "under load a suspect is never tried again"),
    Bug(TURNS, "Turns._suspects", never("suspects and open_workers"),
        "under load no worker ever empties for a suspect"),
    Bug(TURNS, "_most_free", swap("len(worker.leases) < worker.window", "len(worker.leases) <= worker.window"),
        "workers are given more than their window"),
    Bug(BROKER, "Broker._remove", drop("Revoke"), "cancelled and overdue jobs still run on the device"),
    Bug(BROKER, "Broker._remove", drop("identity", "del self._workers[job.worker].leases[job.lease]"),
        "a revoked lease no longer fills its window: its worker gets too many"),
    Bug(JOBS, "Jobs.remove", never("not account.count"), "memory grows with every client that ever came"),
    Bug(BROKER, "Broker._remove", drop("payload"), "answered images stay in memory until their deadline"),
    Bug(REFUSALS, "Refusals.refusal", swap("waiting_bytes + size", "waiting_bytes"),
        "one image too many waits: the bound in bytes does not hold"),
    Bug(BROKER, "Broker.expire", drop("retiring", "worker.evicted = True"),
        "a worker that hangs gets new leases until it is dead"),
    Bug(LEASES, "Worker.stall_deadline", swap("min(self.progress, self.heard)", "self.heard"),
        "a device that hangs while its worker still reports is never noticed"),
    Bug(BROKER, "Broker._lease", never("not worker.leases"),
        "a worker that was idle for long is aborted with its first job"),
    Bug(BROKER, "Broker._stop_if_empty", without("leases"),
        "a worker that is replaced is stopped with jobs in its hands"),
    Bug(BROKER, "Broker.set_available", swap("self._give_up(...)", "[]"),
        "when all devices have failed, jobs wait for nothing"),
    Bug(REFUSALS, "Refusals.unfit", never("draining"), "a daemon that drains accepts more, and never ends"),
    Bug(BROKER, "Broker.ready", drop("regions", "return self._assign(now)"),
        "a restarted worker cannot read images in shared memory"),
    Bug(TURNS, "Turns._untried", without("tried"),
        "the same image of two clients is tried by two workers at once, and kills both"),
    Bug(JOBS, "Waiting.next", drop("clients.move_to_end"), "a client that floods is served alone: the others starve"),
    Bug(JOBS, "Waiting.take", drop("payload_bytes"), "after some gigabytes every job is refused as busy"),
    Bug(JOBS, "job_of", swap("placed.bytes if placed else 0", "0"),
        "images in shared memory do not count against the queue's bytes"),
    Bug(SUPERVISOR, "Supervisor.ready", without("generation"),
        "a ready of an earlier life makes a worker that still loads ready"),
    Bug(SUPERVISOR, "Supervisor.evict", swap("slot.next_signal is signal.SIGABRT", "False"),
        "a worker that hangs while it is replaced keeps its jobs until the drain is over"),
    Bug(SUPERVISOR, "Supervisor.exited", never("stable_s"),
        "rare deaths add up over months until the slot is given up"),
    Bug(SUPERVISOR, "Supervisor.exited", swap("not blameless", "True"),
        "poison images take a healthy device out of service"),
    Bug(SUPERVISOR, "Supervisor.exited", never("asked"),
        "a reload looks like deaths: back-off, and the slot is given up"),
    Bug(RELOAD, "Reload.follow", never("trying"), "settings that no device can boot take one device after the other"),
    Bug(RELOAD, "Reload.tried",
        swap("not slot.given_up and slot.state is not State.ENDED", "slot.state is State.READY"),
        "settings that no device can boot take all when one is on its way as they come"),
    Bug(RELOAD, "MOVING", swap("(State.STARTING, State.STOPPING, State.BACKOFF)",
        "(State.STARTING, State.STOPPING, State.BACKOFF, State.FAILED)"),
        "a reload stops half-way when a worker dies meanwhile"),
    Bug(SUPERVISOR, "Supervisor._ask", swap("signal.SIGABRT", "None"),
        "the loop crashes on a worker that does not stop"),
    Bug(SUPERVISOR, "Supervisor._signal", swap("signal.SIGKILL", "signal.SIGABRT"),
        "a stopped worker is aborted for ever and never killed"),
    Bug(RELOAD, "Reload.follow", without("MOVING"), "a reload replaces all workers at once: nobody serves"),
    Bug(SUPERVISOR, "Supervisor._empty", drop("into", "slot.state = into"),
        "a drained daemon starts workers again"),
    Bug(SUPERVISOR, "Supervisor._back_off", swap("min(doubled, ...)", "doubled"),
        "after ten deaths a device waits for hours"),
    Bug(STATS, "DeviceStats.rates", swap("newest if ... else now", "newest"),
        "a device that hangs keeps the FPS it had"),
    Bug(STATS, "DeviceStats.add", drop("self.images", "self.images = report.images"),
        "the counter of images goes backwards"),
    Bug(BATCHING, "Batching.observe", always("compiled"),
        "the first, compiling run of a size makes its batch look slow for good"),
    Bug(REFUSALS, "Refusals._greed", swap("account.count >= ...", "account.count > limits.max_jobs_per_client"),
        "a client has one job more than one client may"),
    Bug(REFUSALS, "Refusals._greed", swap("account.bytes + job.payload_bytes", "account.bytes"),
        "a client has more bytes than one client may"),
    Bug(PROTOCOL, "_RETRYABLE", swap("{...}", "set(Code)"),
        "clients submit an image that was given up again and again"),
    Bug(REFUSALS, "Refusals.refusal", drop("find"), "an image that was given up kills again under another name"),
    Bug(BROKER, "Broker.exited", drop("recognise"), "what waits already with the same image kills more workers"),
    Bug(BROKER, "Broker._remove", drop("identity", "lease.job = None"),
        "a deadline or a client that left washes a poison image clean: it kills without end"),
    Bug(BROKER, "Broker.end_region", drop("identity"), "so does a client that dies with its image in shared memory"),
    Bug(BROKER, "Broker.finished", drop("suspicion"),
        "a good image that was beside a poison one is given up at the next death, minutes later"),
    Bug(BROKER, "Broker._give_up_image", without("proven"), "a device that dies of everything is never given up"),
    Bug(TURNS, "_elsewhere", without("known"), "a suspect is tried on the device that may be at fault"),
    Bug(SUSPECTS, "Suspects.keep", swap("now + KEEP_S", "now"),
        "what was given up is forgotten at once, and kills again"),
    Bug(SUSPECTS, "Suspects.keep", never("MOST"), "memory grows with every death"),
    Bug(SUSPECTS, "_size", drop("image.shape", 'return "raw", length'),
        "an image of other pixels is taken for the one that was given up"),
    Bug(SUPERVISOR, "Supervisor.acquit", drop("max"), "images that kill take a healthy device out of service"),
    Bug(SUPERVISOR, "Supervisor.exited", swap("code == EXIT_HOST_LACKS", "False"),
        "weights that are away for a second take a device out of service for a minute"),
    Bug(SUPERVISOR, "Supervisor._give_up", swap("now + self.restarts.retry_failed_s", "now + 1e9"),
        "a device that has failed is lost until somebody reloads"),
    Bug(SUPERVISOR, "Supervisor.hopeless", swap("slot.given_up or slot.state is State.ENDED",
                                                "slot.state in (State.FAILED, State.ENDED)"),
        "jobs wait for a device that is only tried once more"),
    Bug(BROKER, "Broker.forgive", drop("heard"), "a host that was paused aborts its healthy workers"),
    Bug(LOOP, "Loop._next", never("overlaps"), "the device stands still while the host chooses"),
    Bug(LOOP, "Loop._can_run", swap("not self._overdue(item)", "True"), "images that nobody waits for are begun ahead"),
    Bug(LOOP, "Loop._guarded", swap("(Exception, SystemExit)", "ZeroDivisionError"),
        "a run that fails takes the one that has begun with it"),
    Bug(FLIGHT, "Flight.collect", never("len"), "an image without an output never gets an answer"),
    Bug(LOOP, "Loop._finish", swap("(Exception, SystemExit)", "Exception"),
        "a library that wants to exit ends a host's thread, and a lease never ends"),
    Bug(HEALTH, "Health.read", swap("reading.ill", "reading.health != 'OK'"), "a warning of a card ends its service"),
    Bug(HEALTH, "Health.follow", swap("READINGS", "1"), "one wrong reading ends a card's service"),
    Bug(HEALTH, "Health.follow", without("_others_serve"), "a wrong alarm of all cards ends the service"),
    Bug(HEALTH, "Health.follow", swap("up.forlorn or not self._ill.get(slot.name, 0)",
                                      "not self._ill.get(slot.name, 0)"),
        "nothing serves although an ill card could"),
    Bug(SUPERVISOR, "Supervisor.exited", never("resting"), "the worker of an ill card is started again"),
    Bug(LOOP, "Loop._try_alone", never("_lost"), "images are answered for a fault of their device"),
    Bug(JOBS, "Waiting.next", drop("level.move_to_end"), "a user with many clients is served alone: the others starve"),
]  # fmt: skip


def planted(bug: Bug, text: str) -> str:
    """The file's text with the bug in it. Raises `CannotPlant`."""
    tree = ast.parse(text)
    named = list(_named(tree, bug.where.split(".")))
    if len(named) != 1:
        raise CannotPlant(f"{bug.file}: {bug.where} is there {len(named)} times, not once")
    places = list(bug.change.places(named[0]))
    if len(places) != 1:
        raise CannotPlant(f"{bug.file}: in {bug.where}, {bug.change.name}: found {len(places)} times, not once")
    before = ast.unparse(tree)
    after = ast.unparse(_Replaced(*places[0]).visit(tree))
    if before == after:
        raise CannotPlant(f"{bug.file}: in {bug.where}, {bug.change.name}: changes nothing")
    return after


def _named(tree: ast.AST, path: Sequence[str]) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
                if name == path[0]:
                    yield from _named(node, path[1:]) if path[1:] else [node]


class _Replaced(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self._new if node is self._old else self.generic_visit(node)


def problem(bug: Bug) -> str:
    """Why this bug cannot be planted; empty: it can."""
    try:
        planted(bug, (ROOT / bug.file).read_text())
    except CannotPlant as error:
        return str(error)
    return ""


def copy_tree(folder: Path) -> Path:
    """A copy of what the core tests need."""
    root = folder / "tree"
    for name in ("daemon", "workers", "tests", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "golden", ".hypothesis"))
    shutil.copy(ROOT / "setup.cfg", root)
    return root


def try_out(bug: Bug, tests: Sequence[str], tell: bool) -> str:
    """The test that catches it; empty: none does."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        root = copy_tree(Path(folder))
        file = root / bug.file
        file.write_text(planted(bug, file.read_text()))
        argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": f"{root}/daemon:{root}/workers", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            run = subprocess.run(argv, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"no end within {TIMEOUT_S} s"
    if tell:
        print(run.stdout[-6000:], run.stderr[-2000:])
    found = re.search(r"^FAILED (.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
    if run.returncode == 1 and found:
        return found[1].removeprefix("tests/daemon/").removeprefix("tests/workers/")
    if run.returncode != 0:
        raise RuntimeError(f"{bug.why}: pytest ended with {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=int, metavar="N", help="these, by their number in the table")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="by these tests, instead of each core's own")
    arguments = parser.parse_args()
    chosen = [(number, bug) for number, bug in enumerate(BUGS, 1) if number in (arguments.only or range(len(BUGS) + 1))]
    problems = [problem(bug) for _, bug in chosen if problem(bug)]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    escaped = 0
    print("| | file | effect | caught by |\n|---:|---|---|---|")
    for number, bug in chosen:
        own = [f"tests/daemon/{name}" for name in CORE_TESTS[bug.file]]
        caught = try_out(bug, arguments.tests or own, tell=bool(arguments.only))
        escaped += not caught
        print(f"| {number} | `{bug.file}` | {bug.why} | {f'`{caught}`' if caught else '**escaped**'} |", flush=True)
    print(f"\n{len(chosen) - escaped} of {len(chosen)} caught")
    return int(escaped > ALLOWED_TO_ESCAPE)


if __name__ == "__main__":
    sys.exit(main())
