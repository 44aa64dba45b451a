"""Every pixel format that a header can declare: the right pixels, or a refusal that names it.

Right is what an independent reader finds, mapped to 8 bits as docs/client.md says: tifffile for TIFFs, as far as it
needs no codecs (it has LZW from another package; the same samples in another compression vouch for these files). For
PNG, BMP and JPEG the samples that the file was made of.
"""
from __future__ import annotations

import io
import itertools
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from blendmaskd.images.decoding import ImageError, decode
from blendmaskd.settings import Limits
from fuzz import pictures, tiffs
from fuzz.tiffs import DEFLATE, LONG, LZMA, LZW, NONE, PACKBITS, SHORT, Layout

LIMITS = Limits()
HEIGHT, WIDTH = 20, 18
RANDOM = np.random.default_rng(3)
COLOURS = RANDOM.integers(0, 65536, (3, 256))
COLOURS[:, 0] = 40_000  # not all below 256
SAMPLES = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3, 9: 3, 10: 3, 32803: 1, 32844: 1, 32845: 3, 34892: 3}
YCBCR = {530: (SHORT, (1, 1))}  # not subsampled


def pixels_of(payload: bytes) -> np.ndarray | str:
    """RGB, or the reason of a refusal."""
    try:
        return np.asarray(decode(payload, LIMITS))
    except ImageError as refusal:
        return refusal.reason


def right(found: np.ndarray | str, expected: np.ndarray, file: str, off: int = 0) -> bool:
    """Whether it was read, and right; false for a refusal that names the format."""
    if isinstance(found, str):
        assert found.startswith(f"this {file}'s pixel format is not read: "), found
        return False
    assert np.abs(found.astype(int) - expected).max() <= off
    return True


# -- TIFF -------------------------------------------------------------------------------------------------------------


def to_8_bits(samples: np.ndarray, bits: int) -> np.ndarray:
    """The upper eight bits; of fewer bits, the largest is 255."""
    return samples >> (bits - 8) if bits >= 8 else samples * 255 // ((1 << bits) - 1)


def expected_of(samples: np.ndarray, layout: Layout) -> np.ndarray:
    if layout.photometric == 3:
        return COLOURS[:, samples[:, :, 0]].transpose(1, 2, 0) >> 8
    eight = to_8_bits(samples, layout.bits)
    match layout.photometric:
        case 0:
            return np.repeat(255 - eight[:, :, :1], 3, 2)
        case 1:
            return np.repeat(eight[:, :, :1], 3, 2)
        case 2 if layout.extra[:1] == (1,):
            alpha = eight[:, :, 3:4]
            return np.where(alpha, np.minimum(eight[:, :, :3] * 255 // np.maximum(alpha, 1), 255), 0)
        case 2:
            return eight[:, :, :3]
        case 5:
            return np.round((255 - eight[:, :, :3]) * (255 - eight[:, :, 3:4]) / 255)
        case 6:
            return np.asarray(Image.merge("YCbCr", [Image.fromarray(eight[:, :, i].astype(np.uint8)) for i in range(3)])
                              .convert("RGB"))  # fmt: skip
    raise AssertionError(f"no rule says what {layout} is: it must be refused")


def read_by_tifffile(payload: bytes, layout: Layout) -> np.ndarray | None:
    """The samples (height, width, samples); None where it would need codecs of another package."""
    try:
        found = tifffile.imread(io.BytesIO(payload))
    except (ValueError, NotImplementedError, tifffile.TiffFileError):
        return None
    if found.ndim == 2:
        return found[:, :, None]
    return np.moveaxis(found, 0, -1) if layout.planar == 2 and found.shape[0] < 6 else found


def samples_for(layout: Layout, count: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    shape = *size, count
    if layout.kind == 3:
        return RANDOM.random(shape)
    if layout.kind in (5, 6):
        return RANDOM.random(shape) + 1j
    return RANDOM.integers(0, 1 << min(layout.bits - (layout.kind == 2), 62), shape)


def with_colours(layout: Layout) -> Layout:
    if layout.photometric == 3:
        numbers = np.resize(COLOURS[:, : 1 << min(layout.bits, 8)], 3 << min(layout.bits, 8))
        return replace(layout, more={320: (SHORT, tuple(map(int, numbers)))})
    return replace(layout, more=YCBCR) if layout.photometric == 6 else layout


def core_layouts() -> Iterator[tuple[Layout, int]]:
    """What the samples are, with how many a pixel has: in all combinations that differ, most of them not read."""
    kinds = {1: (1, 2, 4, 8, 12, 16, 24, 32, 64), 2: (8, 16, 32, 64), 3: (16, 32, 64), 4: (8, 16, 32), 6: (64, 128)}
    extras = ((), (0,), (1,), (2,), (0, 0), (1, 0), (2, 0), (0, 0, 0), (2, 0, 0), (7,), (999,))
    for (photometric, count), (kind, depths), extra in itertools.product(SAMPLES.items(), kinds.items(), extras):
        for bits, planar, undeclared in itertools.product(depths, (1, 2)[: 2 if kind == 1 else 1], (0, 1)):
            if undeclared and (kind != 1 or extra not in ((), (0,))):
                continue
            layout = Layout(bits=bits, photometric=photometric, kind=kind, extra=extra, planar=planar)
            yield with_colours(layout), count + len(extra) + undeclared


def variants(layout: Layout) -> Iterator[Layout]:
    """How the same samples may be stored."""
    compressions = [(one, 1) for one in (NONE, LZW, DEFLATE, PACKBITS)]
    compressions += [(one, 2) for one in (LZW, DEFLATE)] if layout.bits in (8, 16, 32, 64) and layout.kind < 3 else []
    for (compression, predictor), order, fill_order, tile in itertools.product(compressions, "<>", (1, 2), (None, 16)):
        yield replace(
            layout, compression=compression, predictor=predictor, order=order, fill_order=fill_order, tile=tile
        )
    for compression in (LZMA, tiffs.OLD_DEFLATE):
        yield replace(layout, compression=compression)
    yield replace(layout, big=True)
    yield replace(layout, rows=HEIGHT)
    yield replace(layout, rows=1)


def core_name(layout: Layout) -> tuple[int, int, tuple[int, ...], bool]:
    return layout.photometric, layout.bits, layout.extra, layout.planar == 2


READ = {
    *((photometric, bits, (), planar) for photometric in (0, 1) for bits in (1, 2, 4, 8, 12, 16) for planar in (0, 1)),
    *((3, bits, (), planar) for bits in (1, 2, 4, 8) for planar in (0, 1)),
    *((photometric, bits, (), planar) for photometric in (2, 5) for bits in (8, 16) for planar in (0, 1)),
    *((2, bits, (extra,), planar) for extra in (0, 2) for bits in (8, 16) for planar in (0, 1)),
    *((photometric, 8, (extra,), False) for photometric in (1, 3) for extra in (0, 2)),
    *((2, 8, extra, False) for extra in ((1,), (0, 0), (1, 0), (2, 0), (0, 0, 0), (2, 0, 0))),
    (2, 16, (1,), False),
    (5, 8, (0,), False),
    (5, 8, (0, 0), False),
    (6, 8, (), False),
}


def test_every_tiff_is_read_right_or_refused_by_its_format() -> None:
    read, by_tifffile, files = set(), 0, 0
    for core, count in core_layouts():
        alike = core.kind == 1 and count == SAMPLES[core.photometric] + len(core.extra) and core_name(core) in READ
        for layout in variants(core) if alike else [core]:
            samples = samples_for(layout, count, (HEIGHT, WIDTH) if alike else (2, 3))
            payload = tiffs.write(samples, layout)
            files += 1
            found = pixels_of(payload)
            if isinstance(found, str):
                assert found.startswith("this TIFF's pixel format is not read: "), (layout, found)
                continue
            independent = read_by_tifffile(payload, layout)
            if independent is not None:
                np.testing.assert_array_equal(independent, samples, err_msg=str(layout))
                by_tifffile += 1
            off = 2 if layout.photometric == 6 else 0
            assert np.abs(found.astype(int) - expected_of(samples, layout)).max() <= off, layout
            read.add((core_name(layout), layout.compression, layout.predictor, layout.order, layout.tile, layout.big))
    assert {each[0] for each in read} == READ  # undeclared alpha is named as if there were none
    for name in READ:
        ways = {each[1:] for each in read if each[0] == name}
        assert len(ways) >= (27 if name[1] in (8, 16) else 19), (name, len(ways))
    assert by_tifffile > len(read) / 2
    assert files > 6000


GREY = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 1))
RGB = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3))
SMOOTH = np.stack([*np.meshgrid(np.arange(WIDTH) * 12, np.arange(HEIGHT) * 11), np.full((HEIGHT, WIDTH), 90)], -1)


def tiff_refused(samples: np.ndarray, layout: Layout) -> str:
    reason = pixels_of(tiffs.write(samples, layout))
    assert isinstance(reason, str), layout
    return reason


@pytest.mark.parametrize(
    ("layout", "count", "named"),
    [
        (Layout(bits=32, kind=3, photometric=2), 3, "3 x 32-bit float, RGB, not compressed"),
        (Layout(bits=16, kind=2), 1, "1 x 16-bit signed integer, BlackIsZero, not compressed"),
        (Layout(bits=8, kind=4), 1, "1 x 8-bit undefined, BlackIsZero, not compressed"),
        (Layout(bits=64, kind=6), 1, "1 x 64-bit complex float, BlackIsZero, not compressed"),
        (Layout(photometric=8), 3, "3 x 8-bit integer, CIELab, not compressed"),
        (Layout(photometric=32803), 1, "1 x 8-bit integer, CFA, not compressed"),
        (Layout(photometric=2, extra=(1,), planar=2, compression=LZW), 4,
         "4 x 8-bit integer, RGB, extra samples associated alpha, planes apart, LZW"),
        (Layout(photometric=77, more={259: (SHORT, (6,))}), 1, "1 x 8-bit integer, photometric 77, old-style JPEG"),
        (Layout(more={259: (SHORT, (50001,))}), 1, "1 x 8-bit integer, BlackIsZero, WebP"),
        (Layout(more={258: (SHORT, (5, 6, 5))}, photometric=2), 3,
         "5-bit integer + 6-bit integer + 5-bit integer, RGB, not compressed"),
        (Layout(more={258: (SHORT, (8, 16, 8))}, photometric=2), 3, "8-bit integer + 16-bit integer + 8-bit integer"),
        (Layout(more={339: (SHORT, (1, 3, 1))}, photometric=2), 3, "8-bit integer + 8-bit float + 8-bit integer, RGB"),
        (Layout(more={258: (SHORT, (8, 8))}, photometric=2), 3, "BitsPerSample of 2 samples, where a pixel has 3"),
        (Layout(more={277: (SHORT, (60_000,))}), 1, "60000 samples"),
        (Layout(more={317: (SHORT, (2,))}), 1, "1 x 8-bit integer, BlackIsZero, not compressed, predictor 2"),
        (Layout(more={317: (SHORT, (3,))}, compression=LZW), 1, "1 x 8-bit integer, BlackIsZero, LZW, predictor 3"),
        (Layout(more={266: (SHORT, (3,))}), 1, "1 x 8-bit integer, BlackIsZero, not compressed, fill order 3"),
        (Layout(more={284: (SHORT, (3,))}), 1, "1 x 8-bit integer, BlackIsZero, planar 3, not compressed"),
        (Layout(photometric=6), 3, "3 x 8-bit integer, YCbCr, not compressed, chrominance 2 x 2"),
        (Layout(photometric=6, more={530: (SHORT, (2, 1))}), 3, "YCbCr, not compressed, chrominance 2 x 1"),
        (Layout(without=(262,)), 1, "not said (no PhotometricInterpretation)"),
        (Layout(more={254: (LONG, (1,))}), 1, "reduced or a mask (NewSubfileType)"),
        (Layout(more={332: (SHORT, (2,))}, photometric=5), 4, "of other inks (InkSet)"),
        (Layout(more={336: (SHORT, (16, 240))}, photometric=5), 4, "of reduced ink (DotRange)"),
        (Layout(more={346: (SHORT, (1,))}, photometric=2), 3, "indexed"),
        (Layout(more={32997: (LONG, (2,))}), 1, "a volume (ImageDepth)"),
        (Layout(more={32996: (SHORT, (3,))}), 1, "of an old data type"),
        (Layout(photometric=3, more={320: (SHORT, tuple(range(300)))}), 1, "a palette of 300 numbers for 8 bits"),
        (Layout(photometric=3, more={320: (SHORT, tuple(range(256)) * 3)}), 1, "a palette of 8-bit colours"),
        (Layout(photometric=3), 1, "a palette of 0 numbers for 8 bits"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_format_and_a_remedy(layout: Layout, count: int, named: str) -> None:
    samples = samples_for(replace(layout, bits=max(layout.bits, 8)), count)
    reason = tiff_refused(samples, layout)
    assert reason.startswith("this TIFF's pixel format is not read: ")
    assert named in reason
    assert reason.endswith("; convert it, for example to 8-bit RGB")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("tag", [257, 258, 259, 262, 277, 284])
def test_entries_that_readers_may_understand_differently_are_refused(tag: int, order: str) -> None:
    layout = Layout(order=order)
    whole = tiffs.write(GREY, layout)
    [value] = struct.unpack_from(order + "H", whole, _entry(whole, tag, order) + 8)
    twice = bytearray(tiffs.write(GREY, replace(layout, more={65000: (SHORT, (value,))})))
    struct.pack_into(order + "H", twice, _entry(twice, 65000, order), tag)
    assert "is there more than once" in str(pixels_of(bytes(twice)))
    as_float = replace(layout, more={tag: (11, (float(value),))})
    assert f"entry {tag} is damaged, or of a type that it must not have" in tiff_refused(GREY, as_float)
    if tag != 258:
        assert f"entry {tag} has more than one value" in tiff_refused(
            GREY, replace(layout, more={tag: (SHORT, (value, value + 1))})
        )


def _entry(whole: bytes | bytearray, tag: int, order: str) -> int:
    """Where it is in the directory."""
    [count] = struct.unpack_from(order + "H", whole, 8)
    places = [10 + 12 * number for number in range(count)]
    return next(place for place in places if struct.unpack_from(order + "H", whole, place)[0] == tag)


def test_a_big_tiff_in_big_endian_order_is_refused_by_its_format() -> None:
    assert "BigTIFF in big-endian order" in tiff_refused(GREY, Layout(big=True, order=">"))


def test_alpha_that_is_not_declared_is_taken_for_alpha() -> None:
    samples = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 4))
    np.testing.assert_array_equal(pixels_of(tiffs.write(samples, Layout(photometric=2))), samples[:, :, :3])
    assert "4 x 8-bit integer, RGB, planes apart" in tiff_refused(samples, Layout(photometric=2, planar=2))


def test_one_number_of_bits_stands_for_all_samples() -> None:
    layout = Layout(photometric=2, more={258: (SHORT, (8,))})
    np.testing.assert_array_equal(pixels_of(tiffs.write(RGB, layout)), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "layout",
    [Layout(bits=16, planar=2, photometric=2), Layout(bits=16, photometric=0), Layout(photometric=6, more=YCBCR)],
)
def test_orientation_goes_with_every_format(layout: Layout, orientation: int) -> None:
    samples = samples_for(layout, SAMPLES[layout.photometric])
    stored = pixels_of(tiffs.write(samples, layout))
    assert not isinstance(stored, str)
    turned = pixels_of(tiffs.write(samples, replace(layout, more={**layout.more, 274: (SHORT, (orientation,))})))
    upright = {1: lambda it: it, 2: lambda it: it[:, ::-1], 3: lambda it: it[::-1, ::-1], 4: lambda it: it[::-1],
               5: lambda it: it.swapaxes(0, 1), 6: lambda it: np.rot90(it, -1),
               7: lambda it: np.rot90(it, 2).swapaxes(0, 1), 8: lambda it: np.rot90(it)}  # fmt: skip
    np.testing.assert_array_equal(turned, upright[orientation](stored))


def jpeg(pixels: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(pixels.astype(np.uint8).squeeze())
    image.save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("pixels", "photometric", "options"),
    [
        (SMOOTH[:, :, :1], 1, {}),
        (SMOOTH, 2, {"keep_rgb": True}),
        (SMOOTH, 6, {"subsampling": 0}),
        (SMOOTH, 6, {"subsampling": 1}),
        (SMOOTH, 6, {"subsampling": 2}),
    ],
)  # fmt: skip
def test_a_jpeg_in_a_tiff_is_as_by_itself(pixels: np.ndarray, photometric: int, options: dict[str, Any]) -> None:
    stream = jpeg(pixels, **options)
    chrominance = {0: (1, 1), 1: (2, 1), 2: (2, 2)}.get(options.get("subsampling", 0), (1, 1))
    entries = {
        256: (SHORT, (WIDTH,)), 257: (SHORT, (HEIGHT,)), 258: (SHORT, (8,) * pixels.shape[2]), 259: (SHORT, (7,)),
        262: (SHORT, (photometric,)), 277: (SHORT, (pixels.shape[2],)), 278: (SHORT, (HEIGHT,)),
        530: (SHORT, chrominance),
    }  # fmt: skip
    found = pixels_of(tiffs.assemble(entries, [stream]))
    assert right(found, pixels_of(stream).astype(int), "TIFF", off=3)  # type: ignore[union-attr]
    for other in (0, 3, 5, 8):
        changed = {**entries, 262: (SHORT, (other,)), 320: (SHORT, (40_000,) * 768)}
        assert "pixel format is not read" in str(pixels_of(tiffs.assemble(changed, [stream])))


@pytest.mark.parametrize("compression", ["tiff_ccitt", "group3", "group4"])
def test_faxes_are_read(compression: str) -> None:
    black = RANDOM.integers(0, 2, (HEIGHT, WIDTH)).astype(bool)
    stream = io.BytesIO()
    Image.fromarray(black).save(stream, "TIFF", compression=compression)
    np.testing.assert_array_equal(pixels_of(stream.getvalue()), np.repeat(black[:, :, None] * 255, 3, 2))


# -- PNG --------------------------------------------------------------------------------------------------------------

PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
PALETTE = RANDOM.integers(0, 256, (256, 3)).astype(np.uint8)
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
LEGAL = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def png(samples: np.ndarray, colour: int, depth: int, interlace: bool, before: bytes = b"") -> bytes:
    layout = Layout(bits=depth, order=">")
    parts = [(left, top, across, down) for left, top, across, down in PASSES] if interlace else [(0, 0, 1, 1)]
    rows = b""
    for left, top, across, down in parts:
        for row in samples[top::down, left::across]:
            rows += b"\0" + tiffs._packed(row.reshape(1, -1), layout) if row.size else b""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, interlace)
    palette = pictures.chunk(b"PLTE", PALETTE[: 1 << min(depth, 8)].tobytes()) if colour == 3 else b""
    gamma = pictures.chunk(b"gAMA", struct.pack(">I", 100_000))
    start = pictures.SIGNATURE + pictures.chunk(b"IHDR", header) + gamma + palette + before
    return start + pictures.chunk(b"IDAT", zlib.compress(rows)) + pictures.chunk(b"IEND", b"")


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
def test_every_png_is_read_right_or_refused_by_its_format(interlace: bool, transparent: bool) -> None:
    read = set()
    for colour, depth in itertools.product(range(8), (1, 2, 3, 4, 8, 12, 16, 32)):
        samples = RANDOM.integers(0, 1 << depth, (HEIGHT, WIDTH, CHANNELS.get(colour, 1)))
        see_through = {0: bytes([0, 1]), 2: bytes([0, 1] * 3), 3: bytes(range(1 << min(depth, 8)))}.get(colour, b"")
        before = pictures.chunk(b"tRNS", see_through) if transparent and see_through else b""
        found = pixels_of(png(samples, colour, depth, interlace, before))
        if colour == 3:
            expected = PALETTE[samples[:, :, 0] % 256].astype(int)
        else:
            expected = to_8_bits(samples, depth)[:, :, : 3 if colour in (2, 6) else 1]
        if right(found, expected, "PNG"):
            read.add((colour, depth))
    assert read == {(colour, depth) for colour, depths in LEGAL.items() for depth in depths}


def test_a_png_without_its_palette_and_apples_own_kind_are_refused() -> None:
    whole = png(GREY, 3, 8, False)
    palette = pictures.chunk(b"PLTE", PALETTE.tobytes())
    assert "without a palette" in str(pixels_of(whole.replace(palette, b"")))
    apple = pictures.SIGNATURE + pictures.chunk(b"CgBI", bytes(4)) + whole[8:]
    assert "Apple's for iOS (CgBI)" in str(pixels_of(apple))


# -- JPEG -------------------------------------------------------------------------------------------------------------


def cmyk_jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(SMOOTH.astype(np.uint8)).convert("CMYK").save(stream, "JPEG", quality=95)
    return stream.getvalue()


def without_adobe(whole: bytes) -> bytes:
    return re.sub(rb"\xff\xee\x00\x0eAdobe.{7}", b"", whole, flags=re.DOTALL)


def test_cmyk_is_read_where_it_says_what_ink_is() -> None:
    assert right(pixels_of(cmyk_jpeg()), SMOOTH, "JPEG", off=16)
    assert "CMYK that does not say whether 0 is ink" in str(pixels_of(without_adobe(cmyk_jpeg())))


def test_ycck_is_read() -> None:
    """The same samples as YCbCr and K, which differ from CMYK by the number in the Adobe segment alone."""
    ycbcr = Image.fromarray((255 - SMOOTH).astype(np.uint8)).convert("YCbCr")  # of the ink, as Adobe has it
    ink = Image.merge("CMYK", [*(channel.point(lambda level: 255 - level) for channel in ycbcr.split()),
                               Image.new("L", ycbcr.size, 0)])  # fmt: skip
    stream = io.BytesIO()
    ink.save(stream, "JPEG", quality=95, subsampling=0)  # Pillow stores it inverted: as YCbCr again
    whole = re.sub(rb"(Adobe.{6})\x00", lambda found: found[1] + b"\x02", stream.getvalue(), flags=re.DOTALL)
    assert right(pixels_of(whole), SMOOTH, "JPEG", off=16)


@pytest.mark.parametrize(
    ("frame", "bits", "named"),
    [(0xC1, 12, "3 x 12-bit"), (0xC2, 12, "3 x 12-bit"), (0xC3, 8, "lossless"), (0xC5, 8, "hierarchical"),
     (0xF7, 8, "JPEG-LS")],
)  # fmt: skip
@pytest.mark.parametrize("fill", [b"", b"\xff" * 30])
def test_other_jpegs_are_refused_by_their_format(frame: int, bits: int, named: str, fill: bytes) -> None:
    whole = jpeg(SMOOTH)
    start = whole.index(b"\xff\xc0\x00\x11\x08")
    changed = whole[:start] + fill + bytes([0xFF, frame, 0, 0x11, bits]) + whole[start + 5 :]
    assert pixels_of(changed) == f"this JPEG's pixel format is not read: {named}; convert it, for example to 8-bit RGB"


def test_two_components_are_refused_by_their_format() -> None:
    whole = bytearray(jpeg(SMOOTH))
    whole[whole.index(b"\xff\xc0\x00\x11\x08") + 9] = 2
    assert "2 x 8-bit" in str(pixels_of(bytes(whole)))


@pytest.mark.parametrize("options", [{"keep_rgb": True}, {"subsampling": 0}, {"progressive": True, "subsampling": 0}])
def test_jpegs_of_colours_are_read(options: dict[str, Any]) -> None:
    assert right(pixels_of(jpeg(SMOOTH, **options)), SMOOTH, "JPEG", off=16)


# -- BMP --------------------------------------------------------------------------------------------------------------

MASKS = {16: [(0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F), (0xF00, 0xF0, 0xF), (0x1F, 0x7E0, 0xF800)],
         24: [(0xFF0000, 0xFF00, 0xFF)],
         32: [(0xFF0000, 0xFF00, 0xFF), (0xFF000000, 0xFF0000, 0xFF00), (0xFF, 0xFF00, 0xFF0000),
              (0xFF000000, 0xFF00, 0xFF), (0x3FF00000, 0xFFC00, 0x3FF)]}  # fmt: skip
MASKS_READ = {(16, (0xF800, 0x7E0, 0x1F), 0), (16, (0x7C00, 0x3E0, 0x1F), 0), (32, (0xFF0000, 0xFF00, 0xFF), 0),
              (32, (0xFF0000, 0xFF00, 0xFF), 0xFF000000), (32, (0xFF000000, 0xFF0000, 0xFF00), 0),
              (32, (0xFF000000, 0xFF0000, 0xFF00), 0xFF), (32, (0xFF, 0xFF00, 0xFF0000), 0xFF000000),
              (32, (0xFF000000, 0xFF00, 0xFF), 0), (32, (0xFF000000, 0xFF00, 0xFF), 0xFF0000)}  # fmt: skip


def bmp(
    values: np.ndarray,
    bits: int,
    *,
    size: int = 40,
    compression: int = 0,
    masks: tuple[int, ...] = (),
    palette: np.ndarray | None = None,
    top_down: bool = False,
) -> bytes:
    """`values`: of each pixel (height, width), as it lies in the file."""
    if bits <= 8:
        rows = [tiffs._packed(row.reshape(1, -1), Layout(bits=bits)) for row in values]
    else:
        rows = [b"".join(int(value).to_bytes(bits // 8, "little") for value in row) for row in values]
    data = b"".join(row + bytes(-len(row) % 4) for row in (rows if top_down else rows[::-1]))
    colours = b"".join(bytes(colour[::-1]) + b"\0" * (size != 12) for colour in palette) if palette is not None else b""
    masked = b"".join(struct.pack("<I", mask) for mask in masks)
    if size == 12:
        info = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, bits)
    else:
        height = -HEIGHT if top_down else HEIGHT
        number = 0 if palette is None else len(palette)
        info = struct.pack("<IiiHHIIiiII", size, WIDTH, height, 1, bits, compression, len(data), 0, 0, number, 0)
        info = (info + masked).ljust(size, b"\0") if size > 40 else info + masked
    start = 14 + len(info) + len(colours)
    return struct.pack("<2sIHHI", b"BM", start + len(data), 0, 0, start) + info + colours + data


@pytest.mark.parametrize("size", [12, 40, 52, 56, 64, 108, 124])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_bmp_with_a_palette_is_read_or_refused(size: int, bits: int) -> None:
    values = RANDOM.integers(0, 1 << bits, (HEIGHT, WIDTH))
    palettes = [PALETTE[: 1 << bits], np.repeat(np.linspace(0, 255, 1 << bits).astype(np.uint8)[:, None], 3, 1),
                np.repeat(np.arange(1 << bits, dtype=np.uint8)[:, None], 3, 1)]  # fmt: skip
    for palette in palettes:
        for top_down in (False, True) if size != 12 else (False,):
            found = pixels_of(bmp(values, bits, size=size, palette=palette, top_down=top_down))
            assert right(found, palette[values].astype(int), "BMP") == (isinstance(found, np.ndarray))
            assert (bits == 2) == isinstance(found, str) or palette is palettes[2], (size, bits, found)


def test_an_8_bit_bmp_of_two_greys_is_refused() -> None:
    values = RANDOM.integers(0, 2, (HEIGHT, WIDTH))
    palette = np.array([[0, 0, 0], [255, 255, 255]], np.uint8)
    assert "8 bits with a palette of few greys" in str(pixels_of(bmp(values, 8, palette=palette)))
    assert right(pixels_of(bmp(values, 1, palette=palette)), palette[values].astype(int), "BMP")


@pytest.mark.parametrize("size", [12, 40, 52, 56, 64, 108, 124])
@pytest.mark.parametrize("bits", [16, 24, 32])
def test_every_bmp_of_colours_is_read(size: int, bits: int) -> None:
    masks = (0x7C00, 0x3E0, 0x1F) if bits == 16 else (0xFF0000, 0xFF00, 0xFF)
    values = RANDOM.integers(0, 1 << bits, (HEIGHT, WIDTH))
    found = pixels_of(bmp(values, bits, size=size))
    assert right(found, masked(values, masks), "BMP", off=1 if bits == 16 else 0)


@pytest.mark.parametrize("size", [40, 52, 56, 64, 108, 124])
@pytest.mark.parametrize("bits", MASKS)
def test_every_bmp_with_masks_is_read_or_refused(size: int, bits: int) -> None:
    for masks in MASKS[bits]:
        rest = (1 << bits) - 1 & ~sum(masks)
        for alpha in {0, rest} if size >= 56 and bits == 32 else {0}:
            values = RANDOM.integers(0, 1 << bits, (HEIGHT, WIDTH))
            whole = bmp(values, bits, size=size, compression=3, masks=(*masks, alpha)[: 3 + (size > 52)])
            found = pixels_of(whole)
            was_read = right(found, masked(values, masks), "BMP", off=1 if bits == 16 else 0)
            assert was_read == ((bits, masks, alpha) in MASKS_READ and size != 64), (masks, alpha, found)


def masked(values: np.ndarray, masks: tuple[int, ...]) -> np.ndarray:
    shifts = [(mask & -mask).bit_length() - 1 for mask in masks]
    channels = [to_8_bits((values & mask) >> shift, mask.bit_count()) for mask, shift in zip(masks, shifts)]
    return np.stack(channels, -1)


def test_run_lengths_are_read() -> None:
    values = np.repeat(RANDOM.integers(0, 16, (HEIGHT, WIDTH // 2)), 2, 1)
    runs = [b"".join(bytes([2, level]) for level in row[::2]) for row in values[::-1]]
    as_they_are = [bytes([0, WIDTH, *row]) for row in values[::-1]]
    in_halves = [bytes([0, WIDTH, *(row[::2] << 4 | row[1::2]), 0]) for row in values[::-1]]
    for bits, compression, rows in ((8, 1, runs), (8, 1, as_they_are), (4, 2, in_halves)):
        data = b"".join(row + b"\0\0" for row in rows) + b"\0\1"  # ends of lines, and of the picture
        palette = PALETTE[: 1 << bits]
        whole = bmp(values[:0], bits, compression=compression, palette=palette) + data
        assert right(pixels_of(whole), palette[values].astype(int), "BMP"), (bits, compression)


@pytest.mark.parametrize(("bits", "compression"), [(2, 0), (24, 4), (0, 5), (24, 1), (8, 2), (64, 0), (16, 6)])
def test_other_bmps_are_refused_by_their_format(bits: int, compression: int) -> None:
    whole = bytearray(bmp(RANDOM.integers(0, 255, (HEIGHT, WIDTH)), 24))
    struct.pack_into("<HI", whole, 28, bits, compression)
    reason = str(pixels_of(bytes(whole)))
    assert reason.startswith(f"this BMP's pixel format is not read: {bits} bits, compression {compression};")
