"""The ledger: every job of every client, and what became of it. Pure.

A job is owed one answer from the moment it was sent until it has it, or until its client leaves. What comes for a job
that has its answer already is a duplicate; what was never asked for is a stray, and as bad.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from blendmaskd.protocol import Code

REFUSED = frozenset({Code.BUSY, Code.TOO_LARGE, Code.BAD_REQUEST, Code.DRAINING, Code.UNAVAILABLE, Code.UNAUTHORISED})
RESULT = "result"


@dataclass(slots=True)
class Ledger:
    """See the module. `codes` counts answers: `RESULT`, or an error code."""

    submitted: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    duplicated: int = 0
    strays: int = 0
    abandoned: int = 0  # their clients left, or never read
    wrong: list[str] = field(default_factory=list)  # answers that are not this job's, in words
    _owed: dict[str, float] = field(default_factory=dict)  # job: when it was sent
    _done: set[str] = field(default_factory=set)

    def submit(self, job: str, now: float) -> None:
        self.submitted += 1
        self._owed[job] = now

    def answer(self, job: str, code: str, complaint: str = "") -> None:
        """`complaint`: why this cannot be the answer to that job."""
        if job in self._owed:
            del self._owed[job]
            self._done.add(job)
            self.codes[code] += 1
            if complaint:
                self.wrong.append(f"{job}: {complaint}")
        elif job in self._done:
            self.duplicated += 1
        else:
            self.strays += 1

    def abandon(self, job: str) -> None:
        """Nobody waits for it any more."""
        if self._owed.pop(job, None) is not None:
            self.abandoned += 1

    @property
    def owed(self) -> int:
        return len(self._owed)

    @property
    def answered(self) -> int:
        return self.codes.total()

    @property
    def refused(self) -> int:
        return sum(number for code, number in self.codes.items() if code in REFUSED)

    @property
    def accepted(self) -> int:
        """Of the jobs whose fate is known, and those that are owed: all that were not refused."""
        return self.submitted - self.abandoned - self.refused

    def overdue(self, now: float, after_s: float) -> int:
        """Jobs without an answer for so long."""
        return sum(now - sent > after_s for sent in self._owed.values())
