"""How a program fails: its errors, their exit codes, and the one line about each on stderr."""
from __future__ import annotations

import errno
from collections.abc import Callable

from blendmaskd import output

EXIT_FAILED, EXIT_USAGE, EXIT_NO_DAEMON = 1, 2, 3
EXIT_OUTPUT, EXIT_INTERRUPTED = output.EXIT_OUTPUT, output.EXIT_INTERRUPTED


class UsageError(ValueError):
    """Arguments that cannot be followed; the text says why."""


class NoDaemonError(RuntimeError):
    """Nobody serves at the endpoint; the text says what was found."""


class OutputError(RuntimeError):
    """What a program should keep cannot be written; the text says which file and why."""


CODES = {UsageError: EXIT_USAGE, NoDaemonError: EXIT_NO_DAEMON, OutputError: EXIT_OUTPUT}


def reason(error: Exception) -> str:
    """What an error says, without the system's number for it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def guarded(name: str, run: Callable[[], int]) -> int:
    """The exit code of a program: what `run` returns, or that of its error, which is reported on stderr."""
    output.print_anything()
    try:
        return run()
    except (*CODES, OSError) as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC):
            return output.lost(name, error)
        output.complain(f"{name}: {reason(error)}")
        return next((code for kind, code in CODES.items() if isinstance(error, kind)), EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
