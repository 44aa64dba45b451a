#!/usr/bin/env python3
"""Plant bugs in the pure cores, one at a time, and see which test catches each: `python tests/planted_bugs.py`.

Each is planted in a copy of the tree, never here. A text that is not there exactly once is refused: the code has
changed, and the bug must be planted anew. `test_planted_bugs.py` checks that, and no more, in CI; all of this program
takes some minutes. Exit codes: 0 all but `ALLOWED_TO_ESCAPE` caught · 1 more escaped, or a text was not found.

    python tests/planted_bugs.py               # a table in Markdown
    python tests/planted_bugs.py --only 3 17   # some of them, with what the test says
    python tests/planted_bugs.py --tests tests/daemon/test_daemon_machine.py   # by these alone
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALLOWED_TO_ESCAPE = 1
TIMEOUT_S = 300
BROKER = "daemon/blendmaskd/core/broker.py"
JOBS = "daemon/blendmaskd/core/jobs.py"
STATS = "daemon/blendmaskd/core/stats.py"
SUPERVISOR = "daemon/blendmaskd/core/supervisor.py"
SUSPECTS = "daemon/blendmaskd/core/suspects.py"
PROTOCOL = "daemon/blendmaskd/protocol.py"
RELOAD = "daemon/blendmaskd/core/reload.py"
BATCHING = "workers/blendmaskd_workers/batching.py"
BROKER_TESTS = ["test_broker.py", "test_broker_machine.py", "test_daemon_machine.py"]
CORE_TESTS = {
    BROKER: BROKER_TESTS,
    JOBS: BROKER_TESTS,
    SUSPECTS: ["test_suspects.py", *BROKER_TESTS],
    PROTOCOL: ["test_protocol.py", "test_daemon_machine.py"],
    SUPERVISOR: ["test_supervisor.py", "test_daemon_machine.py"],
    RELOAD: ["test_reload.py", "test_daemon_machine.py"],
    STATS: ["test_stats.py"],
    "daemon/blendmaskd/core/regions.py": ["test_broker_machine.py", "test_regions.py"],
    BATCHING: ["../workers/test_batching.py"],
}


@dataclass(frozen=True)
class Bug:
    """`new` instead of `old` in `file`, and what a user would see of it."""

    file: str
    old: str
    new: str
    why: str


BUGS = [
    Bug(BROKER, "return []  # its one answer is still to come", "pass",
        "a job that is sent again runs twice and is answered twice"),
    Bug(BROKER, "            self._suspects.appendleft(job)\n", "",
        "a job whose worker dies is never answered"),
    Bug(BROKER, "self._suspects.appendleft(job)", "self._suspects.append(job)",
        "a worker's death changes the order of its jobs"),
    Bug(SUSPECTS, "self.losses >= max(max_attempts, 2)", "self.losses >= 1",
        "window-mates of a poison image fail with it"),
    Bug(SUSPECTS, "return self.attempts >= max_attempts or self.losses >= max(max_attempts, 2)",
        "return self.attempts >= max_attempts", "an image that crashes the decoder costs one worker more"),
    Bug(BROKER, "if suspicion.guilty(self.limits.max_attempts):",
        "if suspicion.guilty(self.limits.max_attempts + 1):",
        "a poison image kills one worker more than the settings allow"),
    Bug(BROKER, "if not worker.retiring and not worker.alone]\n        while (suspects",
        "if not worker.retiring]\n        while (suspects",
        "others are leased to the worker that tries a suspect, and die with it"),
    Bug(BROKER, "        if not self._suspects:\n            return []",
        "        if not self._suspects or self._waiting:\n            return []",
        "under load a suspect is never tried again"),
    Bug(BROKER, "            open_workers.remove(min(open_workers, key=_load))  # is left",
        "            pass  # is left", "under load no worker ever empties for a suspect"),
    Bug(BROKER, "[worker for worker in open_workers if len(worker.leases) < worker.window]",
        "[worker for worker in open_workers if len(worker.leases) <= worker.window]",
        "workers are given more than their window"),
    Bug(BROKER, "                actions.append(SendWorker(job.worker, Revoke(lease=job.lease)))\n", "",
        "cancelled and overdue jobs still run on the device"),
    Bug(BROKER, "lease.identity, lease.job = self._identity(lease), None",
        "del self._workers[job.worker].leases[job.lease]",
        "a revoked lease no longer fills its window: its worker gets too many"),
    Bug(BROKER, "        if not account.jobs:\n            del self._clients[job.client]\n", "",
        "memory grows with every client that ever came"),
    Bug(BROKER, "        job.payload = ()\n", "",
        "answered images stay in memory until their deadline"),
    Bug(BROKER, "if self.waiting_bytes + size > self.limits.max_bytes:",
        "if self.waiting_bytes > self.limits.max_bytes:", "one image too many waits: the bound in bytes does not hold"),
    Bug(BROKER, "worker.evicted = worker.retiring = True", "worker.evicted = True",
        "a worker that hangs gets new leases until it is dead"),
    Bug(BROKER, "oldest = min(worker.progress, worker.heard) if worker.leases else worker.heard",
        "oldest = worker.heard", "a device that hangs while its worker still reports is never noticed"),
    Bug(BROKER, "        if not worker.leases:\n            worker.progress = now\n", "",
        "a worker that was idle for long is aborted with its first job"),
    Bug(BROKER, "if worker.retiring and not worker.leases else []", "if worker.retiring else []",
        "a worker that is replaced is stopped with jobs in its hands"),
    Bug(BROKER, "return self._give_up(Code.UNAVAILABLE, _NO_DEVICE)", "return []",
        "when all devices have failed, jobs wait for nothing"),
    Bug(BROKER, "        if self._draining:\n            return refused(",
        "        if False:\n            return refused(", "a daemon that drains accepts more, and never ends"),
    Bug(BROKER, "[*(SendWorker(worker, opening) for opening in self.regions), *self._assign(now)]",
        "self._assign(now)", "a restarted worker cannot read images in shared memory"),
    Bug(BROKER, "if job.suspicion not in tried]", "]",
        "the same image of two clients is tried by two workers at once, and kills both"),
    Bug(JOBS, "            level.move_to_end(client)\n", "            pass\n",
        "a client that floods is served alone: the others starve"),
    Bug(JOBS, "        self.payload_bytes -= job.payload_bytes\n        return job", "        return job",
        "after some gigabytes every job is refused as busy"),
    Bug(JOBS, "(self.image.place.bytes if self.image.place else 0)", "0",
        "images in shared memory do not count against the queue's bytes"),
    Bug(SUPERVISOR, "if slot.generation != generation or slot.state is not State.STARTING:",
        "if slot.state is not State.STARTING:", "a ready of an earlier life makes a worker that still loads ready"),
    Bug(SUPERVISOR, "asked = slot.state is State.STOPPING and slot.next_signal is signal.SIGABRT",
        "asked = False", "a worker that hangs while it is replaced keeps its jobs until the drain is over"),
    Bug(SUPERVISOR, "self.restarts.stable_s:\n            slot.failures = 0",
        "self.restarts.stable_s:\n            pass", "rare deaths add up over months until the slot is given up"),
    Bug(SUPERVISOR, "slot.failures += not blameless",
        "slot.failures += 1", "poison images take a healthy device out of service"),
    Bug(SUPERVISOR, "        elif asked:\n            return [self._spawn(slot, now)]\n", "",
        "a reload looks like deaths: back-off, and the slot is given up"),
    Bug(RELOAD, "if self.trying and (slot := next(failed, None)):", "if False:",
        "settings that no device can boot take one device after the other"),
    Bug(RELOAD, "if not slot.given_up and slot.state is not State.ENDED}", "if slot.state is State.READY}",
        "settings that no device can boot take all when one is on its way as they come"),
    Bug(RELOAD, "State.STOPPING, State.BACKOFF)", "State.STOPPING, State.BACKOFF, State.FAILED)",
        "a reload stops half-way when a worker dies meanwhile"),
    Bug(SUPERVISOR, "signal.SIGABRT\n        return [Stop(", "None\n        return [Stop(",
        "the loop crashes on a worker that does not stop"),
    Bug(SUPERVISOR, "now + self.restarts.stop_s, signal.SIGKILL\n        return [kill]",
        "now + self.restarts.stop_s, signal.SIGABRT\n        return [kill]",
        "a stopped worker is aborted for ever and never killed"),
    Bug(RELOAD, " and not any(slot.state in MOVING for slot in slots)", "",
        "a reload replaces all workers at once: nobody serves"),
    Bug(SUPERVISOR, "slot.state, slot.deadline = State.ENDED, None\n        return []",
        "slot.state = State.ENDED\n        return []", "a drained daemon starts workers again"),
    Bug(SUPERVISOR, "slot.deadline = now + min(doubled, self.restarts.longest_delay_s)",
        "slot.deadline = now + doubled", "after ten deaths a device waits for hours"),
    Bug(STATS, "end = newest if now - newest < FRESH_S else now", "end = newest",
        "a device that hangs keeps the FPS it had"),
    Bug(STATS, "self.images += report.images", "self.images = report.images",
        "the counter of images goes backwards"),
    Bug(BATCHING, "if runs.compiled:", "if True:",
        "the first, compiling run of a size makes its batch look slow for good"),
    Bug(BROKER, "len(account.jobs) >= limits.max_jobs_per_client",
        "len(account.jobs) > limits.max_jobs_per_client", "a client has one job more than one client may"),
    Bug(BROKER, "account.bytes + job.payload_bytes > limits.max_bytes_per_client",
        "account.bytes > limits.max_bytes_per_client", "a client has more bytes than one client may"),
    Bug(PROTOCOL, "{Code.BUSY, Code.TIMEOUT, Code.UNAVAILABLE,",
        "{Code.BUSY, Code.TIMEOUT, Code.WORKER_LOST, Code.UNAVAILABLE,",
        "clients submit an image that was given up again and again"),
    Bug(BROKER, "        job.suspicion = self.remembered.find(job.image, job.payload, now)\n", "",
        "an image that was given up kills again under another name"),
    Bug(BROKER, "        self._recognise()\n        for suspicion in suspicions:",
        "        for suspicion in suspicions:", "what waits already with the same image kills more workers"),
    Bug(BROKER, "lease.identity, lease.job = self._identity(lease), None", "lease.job = None",
        "a deadline or a client that left washes a poison image clean: it kills without end"),
    Bug(BROKER, "                lease.identity = self._identity(lease)  # while it can be had\n",
        "                pass\n", "so does a client that dies with its image in shared memory"),
    Bug(BROKER, "        self._clear(self._suspicion(lease))\n", "",
        "a good image that was beside a poison one is given up at the next death, minutes later"),
    Bug(BROKER, "for death in suspicion.deaths if death.counts and suspicion.proven]",
        "for death in suspicion.deaths if death.counts]", "a device that dies of everything is never given up"),
    Bug(BROKER, "if pair[1].device not in _devices(pair[0])), pairs[0])", "if False), pairs[0])",
        "a suspect is tried on the device that may be at fault"),
    Bug(SUSPECTS, "suspicion.until = now + KEEP_S", "suspicion.until = now",
        "what was given up is forgotten at once, and kills again"),
    Bug(SUSPECTS, "        while len(self._suspicions) > MOST:\n", "        while False:\n",
        "memory grows with every death"),
    Bug(SUSPECTS, 'return "raw", image.shape, image.dtype, image.order, length', 'return "raw", length',
        "an image of other pixels is taken for the one that was given up"),
    Bug(SUPERVISOR, "slot.failures = max(slot.failures - 1, 0)", "pass",
        "images that kill take a healthy device out of service"),
    Bug(SUPERVISOR, "elif code == EXIT_HOST_LACKS and self.proven and not slot.given_up:", "elif False:",
        "weights that are away for a second take a device out of service for a minute"),
    Bug(SUPERVISOR, "now + self.restarts.retry_failed_s", "now + 1e9",
        "a device that has failed is lost until somebody reloads"),
    Bug(SUPERVISOR, "all(slot.given_up or slot.state is State.ENDED",
        "all(slot.state in (State.FAILED, State.ENDED)", "jobs wait for a device that is only tried once more"),
    Bug(BROKER, "worker.heard = min(worker.heard + seconds, now)", "pass",
        "a host that was paused aborts its healthy workers"),
]  # fmt: skip


def problem(bug: Bug, root: Path = ROOT) -> str:
    """Why this bug cannot be planted; empty: it can."""
    found = (root / bug.file).read_text().count(bug.old)
    return "" if found == 1 else f"{bug.file}: {bug.old!r} is there {found} times, not once"


def plant(bug: Bug, root: Path) -> None:
    """Change the file below `root`; it must compile."""
    file = root / bug.file
    text = file.read_text().replace(bug.old, bug.new)
    compile(text, bug.file, "exec")
    file.write_text(text)


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
        plant(bug, root)
        argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": f"{root}/daemon:{root}/workers", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            run = subprocess.run(argv, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"no end within {TIMEOUT_S} s"
    if tell:
        print(run.stdout[-6000:], run.stderr[-2000:])
    found = re.search(r"^FAILED (\S+)", run.stdout, re.MULTILINE)
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
        own = [f"tests/daemon/{name}" for name in CORE_TESTS[bug.file] if (ROOT / "tests/daemon" / name).exists()]
        caught = try_out(bug, arguments.tests or own, tell=bool(arguments.only))
        escaped += not caught
        print(f"| {number} | `{bug.file}` | {bug.why} | {f'`{caught}`' if caught else '**escaped**'} |", flush=True)
    print(f"\n{len(chosen) - escaped} of {len(chosen)} caught")
    return int(escaped > ALLOWED_TO_ESCAPE)


if __name__ == "__main__":
    sys.exit(main())
