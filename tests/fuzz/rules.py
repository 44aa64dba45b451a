"""What may come of an input in this process: each layer feeds one, says what came of it, and raises for all else.

``headers``: `protocol.decode`, as the daemon, the client and the worker use it, gives a message of the table or raises
`ProtocolError`. ``images``: `blendmaskd.images.decoding` gives pixels within the limits or raises `ImageError`, for
encoded images, raw arrays and paths.
"""
from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np

from blendmaskd import protocol
from blendmaskd.images import decoding as images
from blendmaskd.images.decoding import ImageError
from blendmaskd.protocol import Code, ProtocolError, Submit
from blendmaskd.settings import Limits
from fuzz import headers, pictures
from fuzz.mutate import mutate

LIMITS = Limits(max_image_bytes=1 << 19, max_image_pixels=2_000_000)  # so that what is just below them is quick
IMAGE_CODES = {Code.BAD_IMAGE, Code.TOO_LARGE, Code.BAD_REQUEST}

Feed = Callable[[Random], str]


class BrokenRuleError(AssertionError):
    """What the fuzzer is looking for."""


def feed_headers(random: Random) -> str:
    side = random.choice(headers.SIDES)
    frames = headers.frames(random, side)
    kinds = headers.kinds(side)
    try:
        message, payload = protocol.decode(frames, kinds)
    except ProtocolError as error:
        _expect(len(error.job) <= 128, "a job's name of more than 128 characters")
        str(error).encode()
        protocol.encode(protocol.Failed(job=error.job, code=Code.BAD_REQUEST, reason=str(error)))
        return "refused"
    _expect(type(message) in kinds.values(), f"a {type(message).__name__}")
    _expect(payload == frames[2:], "another payload")
    protocol.encode(message, payload)
    if isinstance(message, Submit):
        _check_submit(message)
    return "a message"


def feed_images(paths: list[str], root: Path, random: Random) -> str:
    kind = random.random()
    if kind < 0.9:
        payload = pictures.damaged(random)
        return outcome_of_image(lambda: images.decode(payload, LIMITS), LIMITS)
    if kind < 0.96:
        return "raw " + outcome_of_image(lambda: _raw(random), LIMITS)
    return "path " + outcome_of_path(random, paths, root)


LAYERS: dict[str, Callable[[Path], Feed]] = {
    "headers": lambda _: feed_headers,
    "images": lambda folder: partial(feed_images, hostile_paths(folder), folder),
}


def outcome_of_image(decode: Callable[[], images.Photograph], limits: Limits) -> str:
    """A code, or ``pixels``. Raises `BrokenRuleError` for pixels over the limits, or another code."""
    try:
        pixels = images.bgr(decode())
    except ImageError as error:
        _expect(error.code in IMAGE_CODES, error.code)
        _expect(bool(error.reason), "no reason")
        error.reason.encode()
        return error.code.value
    _expect(pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, f"{pixels.dtype} {pixels.shape}")
    _expect(0 < pixels.shape[0] * pixels.shape[1] <= limits.max_image_pixels, f"shape {pixels.shape}")
    return "pixels"


def outcome_of_path(random: Random, paths: list[str], root: Path) -> str:
    path = random.choice(paths)
    if random.random() < 0.3:
        path = mutate(random, path.encode(), 2).decode(errors=random.choice(("replace", "surrogateescape")))
    before = len(os.listdir("/proc/self/fd"))
    try:
        found = images.read_path(path, [root / "allowed"], LIMITS)
    except ImageError as error:
        _expect(error.code in IMAGE_CODES, error.code)
        outcome = error.code.value
    else:
        _expect(found == b"photo", f"{path!r}: read {found[:20]!r}")
        outcome = "read"
    _expect(len(os.listdir("/proc/self/fd")) == before, "a descriptor was left open")
    return outcome


def hostile_paths(folder: Path) -> list[str]:
    """Names of what no client may read, or nobody can, beside a file that may be read; made below `folder`."""
    root, outside = folder / "allowed", folder / "outside"
    for each in (root, outside, root / "deep"):
        each.mkdir(exist_ok=True)
    (root / "photo").write_bytes(b"photo")
    (outside / "secret").write_bytes(b"secret")
    links = {
        "leak": outside / "secret",
        "up": Path(".."),
        "loop": Path("loop"),
        "zero": Path("/dev/zero"),
        "self": Path("/proc/self/mem"),
        "folder": outside,
        "alias": Path("photo"),
        "gone": Path("gone-too"),
    }
    for name, target in links.items():
        if not (root / name).is_symlink():
            (root / name).symlink_to(target)
    if not (root / "pipe").exists():
        os.mkfifo(root / "pipe")
    with open(root / "giant", "wb") as sparse:
        sparse.truncate(1 << 42)
    names = [
        *links, "photo", "pipe", "giant", "deep", "../outside/secret", "folder/secret", "./photo",
        "deep/../photo", "photo/", "photo/x", "", "x" * 300, "x/" * 3000, "photo\0", "//photo",
        "up/outside/secret",
    ]
    system = [
        "/dev/zero", "/dev/mem", "/proc/self/environ", "/proc/1/mem", "/etc/shadow", "/", "", ".", "\0",
        "photo", "~/x",
    ]
    return [*(f"{root}/{name}" for name in names), f"{root}", f"{root}-not/photo", *system]


def _raw(random: Random) -> images.Photograph:
    sides = (0, 1, 2, 3, 7, 30, -1, 1 << 31, 1 << 63, True, 2.0, None, "3")
    shape = [random.choice(sides) for _ in range(random.choice((0, 2, 3, 3, 3, 4)))]
    if random.random() < 0.6:
        shape[-1:] = [3]
    size = random.choice((0, 1, 9, 18, 63, 2700, random.randrange(3000)))
    dtype = random.choice(("uint8", "uint8", "uint8", "float32", "", "O", "\0"))
    order = random.choice(("bgr", "rgb", "", "rgba"))
    return images.from_raw(random.randbytes(size), shape, dtype, order, LIMITS)


def _check_submit(message: Submit) -> None:
    numbers = (message.deadline_s or 1.0, message.priority, message.options.score_threshold)
    _expect(all(map(math.isfinite, numbers)), f"numbers {numbers}")
    _expect(0 < len(message.job) <= 128, f"job {message.job!r}")
    place = message.image.place
    _expect(place is None or (place.offset >= 0 and place.bytes >= 0), f"place {place}")


def _expect(holds: bool, text: str) -> None:
    if not holds:
        raise BrokenRuleError(text)
