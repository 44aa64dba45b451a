"""Whether the host lets this process have its threads: where ZeroMQ may not start one, it aborts."""
from __future__ import annotations

import contextlib
import threading

NEEDED = 16  # ZeroMQ's, the spool's, the pages', and those that start processes, close and ask
REMEDY = "raise the limit (pids.max of the container, TasksMax=, ulimit -u, ulimit -v)"


def startable() -> int:
    """How many more can be started at once, counted up to `NEEDED`."""
    done, started = threading.Event(), []
    with contextlib.suppress(RuntimeError):
        for _ in range(NEEDED):
            thread = threading.Thread(target=done.wait)
            thread.start()
            started.append(thread)
    done.set()
    for thread in started:
        thread.join()
    return len(started)


def shortage(most: int) -> str:
    """What is wrong with so many; empty: a daemon can start with them."""
    return f"at most {most} threads can be started, at least {NEEDED} are needed" if most < NEEDED else ""
