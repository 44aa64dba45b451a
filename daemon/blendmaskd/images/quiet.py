"""Image decoders kept from the log: what they say there, strangers would write.

One damaged fax of a few kilobytes makes libtiff write a line for each of its rows, and Python remembers every warning
whose text is new, for ever. What is wrong with an image is told to its client (`blendmaskd.images.decoding`), not to
the log.
"""
from __future__ import annotations

import ctypes
import logging
import re
import warnings
from pathlib import Path

from PIL import features


def quiet() -> None:
    """From now on, in this process. A libtiff that is not a library of its own keeps talking."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    features.check("libtiff")  # loads it
    for path in set(re.findall(r"/\S*libtiff\S*", Path("/proc/self/maps").read_text())):
        ctypes.CDLL(path).TIFFSetErrorHandler(None)
