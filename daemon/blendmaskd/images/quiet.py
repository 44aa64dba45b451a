"""Image decoders kept from the log: what they say there, strangers would write.

One damaged fax of a few kilobytes makes libtiff write a line for each of its rows, and Python remembers every warning
whose text is new, for ever. What is wrong with an image is told to its client (`blendmaskd.images.decoding`), not to
the log.
"""
from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import warnings
from pathlib import Path

from PIL import features


def quiet() -> None:
    """From now on, in this process. A libtiff that is not a library of its own, or not on Linux, keeps talking."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    features.check("libtiff")  # loads it
    with contextlib.suppress(OSError):  # not Linux, or the library's file was replaced
        for path in set(re.findall(rb"/.*/libtiff[^/\n]*", Path("/proc/self/maps").read_bytes())):
            ctypes.CDLL(os.fsdecode(path)).TIFFSetErrorHandler(None)
