"""The clients of docs/examples, written from docs/wire.md alone: what they print is what the daemon answers."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from curve import start
from PIL import Image
from pycocotools import mask as coco_mask

from checkout import ROOT

EXAMPLES = ROOT / "docs" / "examples"
pytestmark = pytest.mark.slow


def node() -> list[str]:
    if not shutil.which("node"):
        pytest.skip("needs node: install nodejs and npm")
    if not (EXAMPLES / "node_modules").exists():
        pytest.skip("needs the modules of docs/examples/package.json: npm ci --prefix docs/examples")
    return ["node", f"{EXAMPLES}/client.mjs"]


def compiled(folder: Path) -> list[str]:
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler: install gcc")
    includes = "#include <zmq.h>\n#include <msgpack.h>"
    headers = subprocess.run(["cc", "-E", "-"], input=includes, capture_output=True, text=True)
    if headers.returncode:
        missing = re.findall(r"\w+\.h(?=: No such file)", headers.stderr)
        pytest.skip(f"needs {', '.join(missing)}: install libzmq3-dev and libmsgpack-dev")
    for library in ("-lmsgpackc", "-lmsgpack-c"):  # before and since version 6
        command = ["cc", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", EXAMPLES / "client.c"]
        built = subprocess.run([*command, "-o", folder / "client", "-lzmq", library], capture_output=True, text=True)
        if not built.returncode:
            return [f"{folder}/client"]
    pytest.fail(built.stderr)


@pytest.fixture(scope="module", params=["client.mjs", "client.c"])
def example(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How to start it."""
    return node() if request.param == "client.mjs" else compiled(tmp_path_factory.mktemp("compiled"))


def run(*command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment or None)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG, 451 x 300."""
    path = tmp_path_factory.mktemp("photograph") / "chelsea.jpg"
    with Image.open(ROOT / "tests" / "golden" / "images" / "chelsea.png") as image:
        image.convert("RGB").save(path)
    return path


def test_it_prints_what_a_daemon_answers(example: list[str], shared_daemon: Any, photograph: Path) -> None:
    done = run(*example, shared_daemon.endpoint, photograph)
    assert (done.stdout, done.stderr) == ("image 1.000 box 0.0 0.0 451.0 300.0 pixels 135300\n", "")


def test_it_names_why_a_daemon_refuses(example: list[str], shared_daemon: Any) -> None:
    done = run(*example, shared_daemon.endpoint, ROOT / "README.md")
    assert "bad-image: not a JPEG, PNG, WebP, BMP or TIFF image" in done.stderr
    assert (done.returncode, done.stdout) == (1, "")


def test_node_connects_with_keys(short_folder: Path, daemon: Any, photograph: Path) -> None:
    guarded = start(daemon, short_folder)

    def connect(name: str) -> subprocess.CompletedProcess[str]:
        keys = {"SERVER_KEY": str(guarded.server_key), "KEY": str(guarded.secret(name))}
        return run(*node(), guarded.tcp, photograph, **os.environ, **keys)

    done = connect("alice")
    assert (done.stdout, done.stderr) == ("image 1.000 box 0.0 0.0 451.0 300.0 pixels 135300\n", "")
    assert "this key is not allowed" in connect("ursula").stderr


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """The path of a socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        yield Path(folder)


# -- against a router that answers as the test wants ------------------------------------------------------------------


@pytest.fixture
def router(short_folder: Path) -> Iterator[Callable[[], Any]]:
    """Makes one, at ``ipc://router.sock``, after the last one was closed."""
    with zmq.Context() as context:
        sockets: list[Any] = []

        def make() -> Any:
            for before in sockets:
                before.close()
            socket = context.socket(zmq.ROUTER)
            socket.set(zmq.LINGER, 1000)
            socket.set(zmq.RCVTIMEO, 20_000)
            socket.bind(f"ipc://{short_folder}/router.sock")
            sockets.append(socket)
            return socket

        yield make
        for socket in sockets:
            socket.close()


def masks() -> list[np.ndarray[Any, Any]]:
    """Bitmaps (height, width) whose runs are long, short, shorter than those before, and of no pixel."""
    rng = np.random.default_rng(0)
    noise = rng.random((300, 451)) < 0.5
    disc = np.hypot(*np.ogrid[-150:150, -200:251]) < 130
    nothing, everything = np.zeros((300, 451), bool), np.ones((300, 451), bool)
    return [disc & noise, disc, noise, nothing, everything, np.eye(300, 451) > 0]


def test_it_decodes_masks_as_pycocotools_does_after_it_was_told_to_come_again_and_had_lost_its_daemon(
    example: list[str], router: Callable[[], Any], photograph: Path, short_folder: Path
) -> None:
    objects, lines = [], []
    for number, bitmap in enumerate(masks()):
        lines.append(f"thing {number} 0.500 box {number}.0 0.5 2.0 3.0 pixels {bitmap.sum()}")
        rle = coco_mask.encode(np.asfortranarray(bitmap, np.uint8))
        objects.append({"bbox": [number, 0.5, 2, 3], "score": 0.5, "category_name": f"thing {number}",
                        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}})  # fmt: skip
    command = [*example, f"ipc://{short_folder}/router.sock", str(photograph), str(short_folder / "mask.pgm")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = router().recv_multipart()
        again = router()  # the first has died with the job
        repeated = again.recv_multipart()
        assert repeated[1:] == first[1:]
        busy = {"type": "failed", "job": "1", "code": "busy", "reason": "full", "retry_after_s": 0.1}
        again.send_multipart([repeated[0], b"BMD1", msgpack.packb(busy)])
        assert again.recv_multipart() == repeated
        result = {"type": "result", "job": "1", "width": 451, "height": 300, "device": "npu:0", "timings": {}}
        again.send_multipart([repeated[0], b"BMD1", msgpack.packb(result), msgpack.packb(objects)])
        printed, errors = process.communicate(timeout=30)
    assert printed.splitlines() == lines, errors
    assert process.returncode == 0
    written = np.asarray(Image.open(short_folder / "mask.pgm"))
    assert np.array_equal(written, 255 * masks()[0])


def test_the_lock_file_names_no_host() -> None:
    assert "resolved" not in (EXAMPLES / "package-lock.json").read_text()
