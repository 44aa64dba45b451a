"""A short run of each layer of `scripts/fuzz.py`, always the same; and that the fuzzer sees what it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blendmaskd import protocol
from blendmaskd.images import decoding as images
from blendmaskd.protocol import Code
from checkout import ROOT
from fuzz import headers, pictures, rules
from fuzz.child import input_random

LONGEST_S = 240


def fuzz(*arguments: object, python_path: Path | None = None) -> tuple[int, dict[str, Any]]:
    """Exit code and the figures of one layer."""
    environment = {**os.environ, **({"PYTHONPATH": str(python_path)} if python_path else {})}
    argv = [sys.executable, "scripts/fuzz.py", "--json", *map(str, arguments)]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST_S)
    [layer] = json.loads(done.stdout)["layers"].values()
    return done.returncode, layer


INPUTS = {"headers": 8000, "images": 4000, "daemon": 2000, "memory": 400, "pages": 400, "http": 1500}


@pytest.mark.slow
@pytest.mark.parametrize("layer", INPUTS)
def test_a_short_run_breaks_no_rule(layer: str) -> None:
    code, found = fuzz("--layer", layer, "--inputs", INPUTS[layer])
    assert "broken" not in found, found["broken"]
    assert code == 0
    assert found["inputs"] == INPUTS[layer]
    assert len(found["outcomes"]) > 1
    if "good_client" in found:
        assert found["good_client"]["answered"] > 0


DIES = """
import sys
if "fuzz.child" in sys.orig_argv:
    sys.path.insert(0, {!r})
    import os, blendmaskd.images.decoding
    blendmaskd.images.decoding.from_raw = lambda *_: os.abort()
"""


@pytest.mark.slow
def test_what_kills_a_process_is_found_and_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(DIES.format(str(ROOT)))
    code, found = fuzz("--layer", "images", "--inputs", 200, python_path=tmp_path)
    assert code == 1
    number = found["broken"].split()[1]
    assert found["broken"].startswith(f"input {number} of seed 1, exit code -6: Fatal Python error: Aborted")
    code, found = fuzz("--layer", "images", "--first", number, "--inputs", 1, python_path=tmp_path)
    assert (code, found["broken"].split()[1]) == (1, number)
    assert fuzz("--layer", "images", "--first", number, "--inputs", 1)[0] == 0


def raising(error: Exception) -> Callable[..., Any]:
    def planted(*_: object) -> Any:
        raise error

    return planted


LEFT_OPEN: list[int] = []
PLANTED: dict[str, tuple[str, Any, str, Callable[..., Any], str]] = {  # layer, where, name, what, what is told
    "another error": ("images", images, "decode", raising(IndexError("planted")), "planted"),
    "another code": ("images", images, "decode", raising(images.ImageError(Code.BUSY, "x")), "busy"),
    "too many pixels": ("images", images, "decode", lambda *_: np.zeros((2000, 2000, 3), np.uint8), "shape"),
    "floats": ("images", images, "decode", lambda *_: np.zeros((2, 2, 3)), "float64"),
    "a path outside": ("images", images, "read_path", lambda *_: b"secret", "read b'secret'"),
    "a descriptor": (
        "images",
        images,
        "read_path",
        lambda *_: LEFT_OPEN.append(os.dup(0)) or b"photo",
        "was left open",
    ),
    "decode raises": ("headers", protocol, "_read_in_steps", raising(KeyError("planted")), "planted"),
    "a job's name": ("headers", protocol, "_read_in_steps", raising(protocol.ProtocolError("x", "j" * 129)), "name"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, where, function, planted, told = PLANTED[name]
    monkeypatch.setattr(where, function, planted)
    feed = rules.LAYERS[layer](tmp_path)

    def feed_many() -> None:
        for number in range(300):
            feed(input_random(1, layer, number))

    with pytest.raises(Exception, match=told):
        feed_many()
    while LEFT_OPEN:
        os.close(LEFT_OPEN.pop())


def test_an_input_follows_from_its_seed_layer_and_number() -> None:
    def made(seed: int, number: int) -> tuple[list[bytes], bytes]:
        random = input_random(seed, "layer", number)
        return headers.frames(random, "from client"), pictures.damaged(random)

    assert made(1, 5) == made(1, 5)
    assert made(1, 5) != made(1, 6)
    assert made(1, 5) != made(2, 5)


def test_good_seeds_are_messages_of_every_type_and_damaged_ones_are_of_both_kinds() -> None:
    tables = [headers.kinds(side) for side in headers.SIDES]
    assert sum(map(len, tables)) == len({name for table in tables for name in table})
    seen = set()
    for number in range(3000):
        random = input_random(1, "seeds", number)
        side = random.choice(headers.SIDES)
        try:
            message, _ = protocol.decode(headers.frames(random, side), headers.kinds(side))
        except protocol.ProtocolError:
            seen.add("refused")
        else:
            seen.add(type(message).__name__)
    assert seen >= {"refused", "Submit", "Cancel", "GetStats", "Lease", "Finished", "Result", "Report", "Stop"}
