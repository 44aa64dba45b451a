"""How many descriptors this process may have, and what may take how many of them.

At the limit ZeroMQ aborts the process as soon as a local client connects. So connections are bounded well below it, and
there is room for those that ZeroMQ may have accepted before the loop has heard of them.
"""
from __future__ import annotations

import resource

from blendmaskd.core.regions import MOST_REGIONS

OURS = 64  # for what the daemon itself has open: sockets, pages, workers, the spool
REMEDY = "raise the hard limit (ulimit -Hn, LimitNOFILE=)"
UNHEARD = 2200  # connections, local and remote, of which the loop has not heard yet, at most; see `admission.gate`


def limits() -> tuple[int, int]:
    """The soft and the hard limit of open files."""
    found = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (1 << 20 if limit == resource.RLIM_INFINITY else limit for limit in found)
    return soft, hard


def shortage(most: int) -> str:
    """What is wrong with this hard limit; empty: a daemon can start with it."""
    return f"at most {most} files may be open, at least {OURS} are needed" if most < OURS else ""


def most_regions(files: int) -> int:
    """Regions of shared memory that may be open, each two descriptors."""
    return min(max((files - OURS) // 8, 1), MOST_REGIONS)


def most_connections(files: int) -> int:
    """Clients that may be connected at once."""
    return max((files - OURS) // 2, 1)


def needed(files: int) -> int:
    """The limit with which these bounds hold whatever clients do, faster than the loop notices."""
    return OURS + most_connections(files) + 2 * most_regions(files) + UNHEARD


def make_room(files: int) -> None:
    """Raise the soft limit to what is `needed`, as far as the hard one allows."""
    soft, hard = limits()
    if soft < needed(files):
        as_it_is = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed(files), hard), as_it_is))
