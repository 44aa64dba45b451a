"""What log lines look like: text or JSON, one line each, to stderr; in the journal with its priorities.

    log.info("ready", extra=about(slot="npu:0.1"))

    2026-05-04T10:11:12.345Z INFO ready slot=npu:0.1
    {"time": "2026-05-04T10:11:12.345Z", "level": "info", "message": "ready", "slot": "npu:0.1"}

What a line is about is never in its message but beside it, under the same names in both formats: ``slot`` (a device and
its generation), ``job``, ``client``, ``lease``, ``code``, ``seconds``. Daemon and workers use the same formats. Only
shells log.
"""
from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from blendmaskd import stderr
from blendmaskd.output import in_a_line
from blendmaskd.settings import Log

PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}  # syslog's
PLAIN = re.compile(r"[\w.:/@+-]+")  # what a value may be without quotes


def configure(settings: Log, **constant: Any) -> None:
    """Let this process log so from now on; `constant` is what all of its lines are about. May be repeated."""
    handler = stderr.Handler()
    formatter = JsonFormatter if settings.format == "json" else TextFormatter
    handler.setFormatter(formatter(about(**constant)["about"], to_journal(os.environ)))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)  # of libraries
    logging.getLogger("blendmaskd").setLevel(settings.level.upper())


def about(**what: Any) -> dict[str, Any]:
    """For `extra`: what a line is about. Empty values are left out."""
    return {"about": {name: value for name, value in what.items() if value not in ("", None)}}


def shown(client: bytes) -> str:
    """A client as lines have it: not its identity, by which another could take its place, but a digest of it."""
    return hashlib.blake2s(client, digest_size=4).hexdigest()


def to_journal(environment: Mapping[str, str]) -> bool:
    """Whether stderr is the journal's: systemd names its device and inode, and a child may have redirected it."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class TextFormatter(logging.Formatter):
    """``TIME LEVEL message key=value``, without the time in the journal; values are quoted where they need it."""

    def __init__(self, constant: Mapping[str, Any], journal: bool) -> None:
        super().__init__()
        self._constant = constant
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """One line; text that has a traceback has more."""
        text = self._text(record, {**self._constant, **getattr(record, "about", {})})
        if not self._journal:
            return text
        prefix = f"<{PRIORITIES.get(record.levelno, 6)}>"  # sd-daemon(3); the journal takes it off again
        return "\n".join(prefix + line for line in text.split("\n"))

    def _text(self, record: logging.LogRecord, about: Mapping[str, Any]) -> str:
        words = [] if self._journal else [_time(record.created)]
        words += [record.levelname, in_a_line(record.getMessage())]
        words += [f"{name}={_quoted(value)}" for name, value in about.items()]
        line = " ".join(words)
        if not record.exc_info:
            return line
        return "\n".join([line, *map(in_a_line, self.formatException(record.exc_info).split("\n"))])


class JsonFormatter(TextFormatter):
    """An object in one line: ``time``, ``level``, ``message``, what it is about, ``exception``."""

    def _text(self, record: logging.LogRecord, about: Mapping[str, Any]) -> str:
        head = {"time": _time(record.created), "level": record.levelname.lower(), "message": record.getMessage()}
        tree = {**head, **about}
        if record.exc_info:
            tree["exception"] = self.formatException(record.exc_info)
        return json.dumps(tree, default=str)


def _time(seconds: float) -> str:
    """UTC, ISO 8601, to the millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds * 1000) % 1000:03}Z"


def _quoted(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)
