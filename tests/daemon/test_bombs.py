"""Small files that ask for much: refused, or no dearer than their pixels. Each that is refused here once went off."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from blendmaskd.images import bombs
from blendmaskd.images import decoding as images
from blendmaskd.images.decoding import ImageError, Pixels
from blendmaskd.settings import Limits
from blendmaskd.shell import launch
from checkout import ROOT, SOURCES
from fuzz import bombs as made
from fuzz import pictures, tiffs
from fuzz.program import bomb_bound

SMALL = Limits(max_image_bytes=2 << 20, max_image_pixels=1_000_000)
quietly = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def decode(payload: bytes, limits: Limits) -> Pixels:
    return images.bgr(images.decode(payload, limits))


def refused(payload: bytes, limits: Limits = SMALL) -> ImageError:
    with pytest.raises(ImageError) as refusal:
        decode(payload, limits)
    return refusal.value


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that small files reach."""
    monkeypatch.setattr(bombs, "MOST_READS", 20_000)
    monkeypatch.setattr(bombs, "MOST_NUMBER_BYTES", 64 << 10)
    monkeypatch.setattr(bombs, "MOST_RUN_LENGTH_PIXELS", 900_000)


REASONS = {
    "png-text-inflates": "bad-image cannot be decoded: Decompressed data too large",
    "png-text-behind-inflates": "bad-image cannot be decoded: Decompressed data too large",
    "png-profile-inflates": "bad-image cannot be decoded: Decompressed data too large",
    "png-many-chunks": "too-large it has more than 20000 pieces",
    "png-many-chunks-behind": "too-large it has more than 20000 pieces",
    "png-many-data-chunks": "too-large it has more than 20000 pieces",
    "png-strip": "too-large 1000000x1 pixels: no side may be longer than 65535",
    "png-giant": "too-large 2147483648x2147483648 pixels",
    "jpeg-padding": "too-large it has more than 20000 pieces",
    "jpeg-scans": "too-large over 50 scans of 1000x1000 pixels are 50 times the limit",
    "jpeg-exif-segments": "too-large more than 100 segments of EXIF data",
    "bmp-runs": "too-large 2000x2000 pixels are over the limit",
    "bmp-line-ends": "too-large 2000x2000 pixels are over the limit",
    "bmp-giant": "too-large 2147483647x2147483649 pixels",
    "tiff-tile": "too-large 2000x2000 pixels in whole tiles are over the limit of 1000000",
    "tiff-tiles": "too-large 65520x64000 pixels in whole tiles are over the limit of 1000000",
    "tiff-strips": "bad-image",
    "tiff-deflated-strips": "bad-image cannot be decoded: StripOffsets is damaged, or has too many values",
    "tiff-shared-strips": r"bad-image cannot be decoded: its strips or tiles are \d+ bytes in a file of",
    "tiff-shared-tiles": r"bad-image cannot be decoded: its strips or tiles are \d+ bytes in a file of",
    "tiff-big-directory": "too-large it has more than 20000 pieces",
    "webp-canvas": "too-large 16383x16383 pixels",
}


@quietly
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", made.REFUSED)
def test_a_bomb_is_refused_with_its_reason(name: str) -> None:
    refusal = refused(made.make(name, SMALL))
    assert re.match(REASONS[name], f"{refusal.code} {refusal.reason}")


@pytest.mark.usefixtures("few")
def test_run_lengths_are_bounded_by_pieces_and_by_pixels() -> None:
    wide = Limits(max_image_bytes=2 << 20, max_image_pixels=10_000_000)
    assert refused(made.make("bmp-runs", wide), wide).reason == "2000x2000 pixels in run lengths: at most 900000"
    few_pixels = pictures.bmp(900, 900, b"\1\1" * 20_000, compression=1)
    assert "more than 20000 pieces" in refused(few_pixels).reason
    good = pictures.bmp(18, 24, (b"\x12\x07" + b"\0\0") * 24 + b"\0\1", compression=1)
    np.testing.assert_array_equal(decode(good, SMALL), np.full((24, 18, 3), 7))


@pytest.mark.parametrize("shape", [(1, 65_536, 3), (65_536, 1, 3)])
def test_no_side_may_be_longer_than_a_jpegs(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ImageError, match="no side may be longer than 65535") as refusal:
        images.from_raw(bytes(3 * 65_536), shape, "uint8", "bgr", SMALL)
    assert refusal.value.code == "too-large"
    shorter = [min(side, 65_535) for side in shape]
    kept = images.from_raw(bytes(3 * 65_535), shorter, "uint8", "bgr", SMALL)
    assert kept.size == 3 * 65_535


@pytest.mark.parametrize("found", [b"\xff\xda\x00\x08\x01", b"\xff\xe1..Exif\0\0"])
def test_what_is_looked_for_takes_no_memory_where_it_is_found(found: bytes) -> None:
    whole = io.BytesIO()
    Image.new("RGB", (16, 16)).save(whole, "JPEG")
    payload = whole.getvalue() + found * (1_900_000 // len(found))
    tracemalloc.start()
    refused(payload, Limits(max_image_pixels=256))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * len(payload)


def test_a_progressive_jpeg_with_its_usual_scans_is_decoded_up_to_the_limit() -> None:
    whole = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(whole, "JPEG", progressive=True)
    assert decode(whole.getvalue(), SMALL).shape == (1000, 1000, 3)


def test_a_tiff_of_many_jpegs_is_decoded_and_each_has_few_scans() -> None:
    whole = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(whole, "TIFF", compression="jpeg", strip_size=1 << 14)
    assert whole.getvalue().count(b"\xff\xda") > bombs.MOST_PASSES
    assert decode(whole.getvalue(), SMALL).shape == (1000, 1000, 3)
    usual, many = (jpeg_in_a_tiff(made.scans(64, count), 64) for count in (20, 200))
    assert decode(usual, SMALL).shape == (64, 64, 3)
    assert refused(many).code == "bad-image"


def jpeg_in_a_tiff(jpeg: bytes, side: int) -> bytes:
    entries: list[tiffs.Entry] = [
        (256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 7), (262, 3, 1, 1), (278, 4, 1, side),
        (279, 4, 1, len(jpeg)), (273, 4, 1, 0),
    ]  # fmt: skip
    entries[-1] = (273, 4, 1, len(tiffs.tiff(entries)))
    return tiffs.tiff(entries, jpeg)


def test_exif_in_several_segments_is_read() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes()[6:] + bytes(40_000)
    whole = io.BytesIO()
    Image.new("RGB", (16, 8)).save(whole, "JPEG")
    parts = b"".join(
        b"\xff\xe1" + (len(part) + 8).to_bytes(2, "big") + b"Exif\0\0" + part for part in (body[:20_000], body[20_000:])
    )
    assert decode(whole.getvalue()[:2] + parts + whole.getvalue()[2:], SMALL).shape == (16, 8, 3)


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True)])
def test_tiles_are_decoded_and_count_in_whole(order: str, big: bool) -> None:
    payload = pictures.tiled(order, big)
    found = decode(payload, SMALL)
    row = np.concatenate([np.arange(16), [0, 1]])
    np.testing.assert_array_equal(found[0, :, 0], row)
    assert decode(payload, Limits(max_image_pixels=32 * 32)).shape == (24, 18, 3)
    assert "32x32 pixels in whole tiles" in refused(payload, Limits(max_image_pixels=32 * 32 - 1)).reason


def _entries(**more: tiffs.Entry) -> bytes:
    """A tiled TIFF of 18x24 with one more entry before the rest, or one behind."""
    whole = pictures.tiled()
    count = whole[8]
    first, last = more.get("first"), more.get("last")
    entry = tiffs.tiff([first or last])[10:22]  # type: ignore[list-item]
    entries = whole[10 : 10 + 12 * count]
    both = entry + entries if first else entries + entry
    return whole[:8] + bytes([count + 1, 0]) + both + whole[10 + 12 * count :]


@pytest.mark.parametrize("entry", [(322, 4, 1, 65520), (322, 17, 1, 65520), (323, 4, 2, 8)])
@quietly
def test_what_pillow_and_libtiff_may_read_differently_is_refused(entry: tiffs.Entry) -> None:
    for place in ("first", "last"):
        refusal = refused(_entries(**{place: entry}))
        assert refusal.code == "bad-image"
        assert "is there more than once" in refusal.reason


def test_a_big_tiff_in_big_endian_order_is_refused() -> None:
    assert refused(pictures.tiled(">", big=True)).code == "bad-image"


@pytest.mark.parametrize("options", [{"lossless": True}, {}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}])
def test_a_webps_size_is_known_before_it_is_opened(options: dict[str, Any]) -> None:
    for width, height in ((1, 1), (300, 200), (16383, 2)):
        whole = io.BytesIO()
        Image.new("RGB", (width, height)).save(whole, "WEBP", **options)
        assert bombs.canvas(whole.getvalue()) == (height, width)
    assert bombs.canvas(pictures.good()[0]) is None


IN_A_PROCESS_OF_ITS_OWN = """
import json, sys, warnings
from blendmaskd.images.quiet import quiet
quiet()
from blendmaskd.settings import Limits
from fuzz import bombs, child
limits = Limits(max_image_bytes=int(sys.argv[1]), max_image_pixels=int(sys.argv[2]))
print(json.dumps({name: child.measure(name, limits) for name in [*bombs.REFUSED, *bombs.COSTLY]}))
"""


def in_a_process(code: str, *arguments: object, first: Path = ROOT / "tests") -> str:
    """What Python code prints, which imports from `first`; it says nothing on stderr and takes at most a minute."""
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    preload = launch.resolve_preload("auto").path  # a worker's allocator, where it is installed
    environment = {**os.environ, "PYTHONPATH": f"{first}:{ROOT / 'tests'}:{SOURCES}"}
    environment |= {"LD_PRELOAD": preload} if preload else {}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return done.stdout


def test_memory_is_bounded_by_pixels_and_bytes() -> None:
    """The same bound for all; 64 MiB of it are texts, as Pillow allows."""
    limits = Limits(max_image_bytes=1 << 20, max_image_pixels=3_000_000)
    found = json.loads(in_a_process(IN_A_PROCESS_OF_ITS_OWN, limits.max_image_bytes, limits.max_image_pixels))
    bound = bomb_bound(limits)
    assert len(found) == len(made.REFUSED) + len(made.COSTLY)
    assert {name: one for name, one in found.items() if one["bytes"] > bound} == {}
    assert max(one["bytes"] for one in found.values()) > 8 * limits.max_image_pixels  # something was measured


QUIET = """
import ast, sys
from blendmaskd.images.quiet import quiet
quiet()
from PIL import TiffImagePlugin
assert TiffImagePlugin.__file__.startswith(sys.argv[2])
from blendmaskd.settings import Limits
from blendmaskd.images import decoding as images
for payload in ast.literal_eval(open(sys.argv[1]).read()):
    try:
        images.decode(payload, Limits())
    except images.ImageError:
        pass
print(len(set(getattr(TiffImagePlugin, "__warningregistry__", {})) - {"version"}))
"""


@pytest.mark.parametrize("folder", [None, "with spaces", os.fsdecode(b"not \xff text"), "libtiff/x"])
def test_decoders_say_nothing_and_python_remembers_no_warning(tmp_path: Path, folder: str | None) -> None:
    """Wherever they are installed."""
    first = tmp_path / folder if folder else tmp_path
    installed = Path(PIL.__path__[0])
    for each in (installed, installed.with_name("pillow.libs")):
        if folder and each.exists():
            shutil.copytree(each, first / each.name)
    fax = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 2, (24, 18), np.uint8) * 255).convert("1").save(
        fax, "TIFF", compression="group3"
    )
    damaged = bytearray(fax.getvalue())
    damaged[8:60] = bytes(range(52))
    exif = [tiffs.tiff([(0x9000, 7, 1000 + number, 1 << 20)]) for number in range(20)]  # each warned of differently
    pngs = [made._small(before=pictures.chunk(b"eXIf", each)) for each in exif]
    (tmp_path / "payloads").write_text(repr([bytes(damaged), *pngs]))
    used = first if folder else installed.parent
    assert in_a_process(QUIET, tmp_path / "payloads", used, first=first) == "0\n"


def test_good_images_of_every_kind_are_decoded() -> None:
    kinds = {decode(payload, SMALL).shape for payload in pictures.good()[:57]}
    assert kinds == {(24, 18, 3), (18, 24, 3)}
