import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blendmaskd.images import decoding as images
from blendmaskd.images.decoding import ImageError, Pixels, bgr, from_raw, read_path
from blendmaskd.settings import Limits

LIMITS = Limits()
HEIGHT, WIDTH = 30, 40
RANDOM = np.random.default_rng(7)
RGB = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GRID = np.meshgrid(np.arange(WIDTH) * 6, np.arange(HEIGHT) * 8)
SMOOTH = np.stack([*GRID, np.full((HEIGHT, WIDTH), 90)], -1).astype(np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def picture(pixels: np.ndarray = RGB) -> Image.Image:
    return Image.fromarray(pixels)


def png(width: int, height: int) -> bytes:
    """A PNG of that size in its header, with data for no more than a few rows."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def decode(payload: images.Payload, limits: Limits = LIMITS) -> Pixels:
    return bgr(images.decode(payload, limits))


def refused(payload: bytes, limits: Limits = LIMITS) -> ImageError:
    with pytest.raises(ImageError) as refusal:
        decode(payload, limits)
    return refusal.value


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_give_the_pixels_as_bgr(format: str, options: dict[str, object]) -> None:
    found = decode(encoded(picture(), format, **options), LIMITS)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, RGB[:, :, ::-1])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_is_close_to_its_pixels(progressive: bool) -> None:
    found = decode(encoded(picture(SMOOTH), "JPEG", quality=95, subsampling=0, progressive=progressive), LIMITS)
    assert np.abs(found.astype(int) - SMOOTH[:, :, ::-1]).max() < 20


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda data: memoryview(np.frombuffer(data, np.uint8))])
def test_any_buffer_is_decoded(wrap) -> None:
    np.testing.assert_array_equal(decode(wrap(encoded(picture(), "PNG")), LIMITS), RGB[:, :, ::-1])


# What a camera held the other way stores: orientation N undone by these turns of the stored pixels.
TURNS = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied_once(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    found = decode(encoded(picture(), format, exif=exif, **options), LIMITS)
    np.testing.assert_array_equal(found, TURNS[orientation](RGB)[:, :, ::-1])
    assert found.flags.c_contiguous


def test_exif_orientation_of_a_jpeg_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    payload = encoded(picture(SMOOTH), "JPEG", quality=95, exif=exif)
    assert decode(payload, LIMITS).shape == (WIDTH, HEIGHT, 3)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_damaged_exif_is_as_if_there_were_none(exif: bytes) -> None:
    np.testing.assert_array_equal(decode(encoded(picture(), "PNG", exif=exif), LIMITS), RGB[:, :, ::-1])


def test_grey_palette_and_transparent_images_become_bgr_in_silence() -> None:
    grey = Image.fromarray(RGB[:, :, 0])
    rgba = Image.fromarray(np.dstack([RGB, RGB[:, :, 0]]))
    palette = picture().quantize(16)
    plain = palette.convert("RGB")
    cases = {
        "grey": (encoded(grey, "PNG"), np.repeat(RGB[:, :, :1], 3, axis=2)),
        "one bit": (encoded(grey.convert("1"), "PNG"), np.asarray(grey.convert("1").convert("RGB"))),
        "alpha": (encoded(rgba, "PNG"), RGB),
        "grey alpha": (encoded(Image.merge("LA", [grey, grey]), "PNG"), np.repeat(RGB[:, :, :1], 3, axis=2)),
        "palette": (encoded(palette, "PNG", transparency=bytes(range(16))), np.asarray(plain)),
        "one transparent colour": (encoded(picture(), "PNG", transparency=(1, 2, 3)), RGB),
    }
    for name, (payload, wanted) in cases.items():
        np.testing.assert_array_equal(decode(payload, LIMITS), wanted[:, :, ::-1], err_msg=name)


def test_a_cmyk_jpeg_is_converted() -> None:
    assert decode(encoded(picture(SMOOTH).convert("CMYK"), "JPEG"), LIMITS).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_upper_bits(format: str) -> None:
    deep = RANDOM.integers(0, 1 << 16, (HEIGHT, WIDTH), dtype=np.uint16)
    found = decode(encoded(Image.fromarray(deep), format), LIMITS)
    np.testing.assert_array_equal(found, np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_32_bits_are_refused(dtype: type) -> None:
    refusal = refused(encoded(Image.fromarray(np.zeros((4, 4), dtype)), "TIFF"))
    assert refusal.code == "bad-image"
    assert "1 x 32-bit" in refusal.reason


def test_an_empty_payload_is_refused() -> None:
    refusal = refused(b"")
    assert refusal.code == "bad-image"
    assert "0 bytes" in refusal.reason


@pytest.mark.parametrize("payload", [b"\0", b"hello, world", bytes(100), b"\xff\xd8\xff\xe0", b"II*\0", b"BM", b"RIFF"])
def test_what_is_no_image_is_refused_with_its_first_bytes(payload: bytes) -> None:
    refusal = refused(payload)
    assert refusal.code == "bad-image"
    assert payload[:8].hex(" ") in refusal.reason


@pytest.mark.parametrize("format", ["GIF", "PPM", "ICNS", "JPEG2000", "TGA"])
def test_other_formats_are_refused(format: str) -> None:
    image = picture().resize((64, 64))
    refusal = refused(encoded(image, format))
    assert refusal.code == "bad-image"
    assert "JPEG, PNG, WebP, BMP or TIFF" in refusal.reason


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_an_image_cut_anywhere_in_its_pixels_is_refused(format: str) -> None:
    whole = encoded(picture(), format)
    for share in (0.02, 0.1, 0.5, 0.9):
        assert refused(whole[: int(len(whole) * share)]).code == "bad-image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_give_an_image_or_a_refusal_and_nothing_else(format: str) -> None:
    whole = np.frombuffer(encoded(picture(), format), np.uint8)
    random = np.random.default_rng(1)
    codes = set()
    for _ in range(150):
        damaged = whole.copy()
        places = random.integers(0, min(len(whole), 400), random.integers(1, 12))
        damaged[places] = random.integers(0, 256, len(places))
        try:
            assert decode(damaged.tobytes(), LIMITS).ndim == 3
        except ImageError as refusal:
            codes.add(refusal.code)
    assert "bad-image" in codes
    assert codes <= {"bad-image", "too-large"}


@pytest.mark.parametrize("side", [8000, 12000, 60000])
def test_a_large_header_is_refused_before_decoding(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refusal = refused(png(side, side))
    assert refusal.code == "too-large"
    assert f"{side}x{side}" in refusal.reason
    assert "50000000" in refusal.reason


def test_above_pillows_own_bound_only_our_limit_counts() -> None:
    raised = Limits(max_image_pixels=10**10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refusal = refused(png(10000, 10000), raised)
    assert refusal.code == "bad-image"


def test_the_limits_are_inclusive() -> None:
    payload = encoded(picture(), "PNG")
    exact = Limits(max_image_bytes=len(payload), max_image_pixels=HEIGHT * WIDTH)
    assert decode(payload, exact).shape == (HEIGHT, WIDTH, 3)
    assert refused(payload, Limits(max_image_bytes=len(payload) - 1)).code == "too-large"
    assert refused(payload, Limits(max_image_pixels=HEIGHT * WIDTH - 1)).code == "too-large"


def raw_refused(payload: bytes, shape: object, dtype: str = "uint8", order: str = "bgr") -> ImageError:
    with pytest.raises(ImageError) as refusal:
        from_raw(payload, shape, dtype, order, LIMITS)
    return refusal.value


def test_a_raw_bgr_array_is_a_view_of_its_payload() -> None:
    payload = bytearray(RGB.tobytes())
    pixels = from_raw(payload, (HEIGHT, WIDTH, 3), "uint8", "bgr", LIMITS)
    np.testing.assert_array_equal(pixels, RGB)
    payload[0] ^= 255
    assert pixels[0, 0, 0] == payload[0]


def test_a_raw_rgb_array_is_reversed() -> None:
    pixels = bgr(from_raw(memoryview(RGB), [HEIGHT, WIDTH, 3], "uint8", "rgb", LIMITS))
    np.testing.assert_array_equal(pixels, RGB[:, :, ::-1])
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize(
    "shape",
    [(), (30,), (30, 40), (30, 40, 4), (3, 30, 40), (30, 40, 3, 1), (0, 40, 3), (-30, -40, 3), (True, 40, 3),
     (30.0, 40, 3), ("30", 40, 3), (None, 40, 3)],
)  # fmt: skip
def test_a_raw_array_of_another_shape_is_refused(shape: tuple[object, ...]) -> None:
    refusal = raw_refused(RGB.tobytes(), shape)
    assert refusal.code == "bad-image"
    assert "expected [height, width, 3]" in refusal.reason


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_raw_array_of_another_length_is_refused_with_both_lengths(extra: int) -> None:
    refusal = raw_refused(bytes(3600 + extra), (HEIGHT, WIDTH, 3))
    assert refusal.code == "bad-image"
    assert "expected 3600 bytes" in refusal.reason
    assert f"found {3600 + extra}" in refusal.reason


def test_a_raw_array_of_another_type_order_or_size_is_refused() -> None:
    assert raw_refused(RGB.tobytes(), RGB.shape, dtype="float32").code == "bad-image"
    assert raw_refused(RGB.tobytes(), RGB.shape, order="rgba").code == "bad-request"
    assert raw_refused(b"", (60000, 60000, 3)).code == "too-large"
    assert raw_refused(b"", (1 << 40, 1 << 40, 3)).code == "too-large"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with an image in it, beside a folder that no root allows."""
    root = tmp_path / "allowed"
    root.mkdir()
    (root / "photo.png").write_bytes(b"photo")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_bytes(b"secret")
    (tmp_path / "allowed-not").mkdir()
    (tmp_path / "allowed-not" / "secret.png").write_bytes(b"secret")
    return root


def path_refused(path: object, *roots: Path, limits: Limits = LIMITS) -> str:
    with pytest.raises(ImageError) as refusal:
        read_path(str(path), roots, limits)
    assert refusal.value.code == "bad-request"
    return refusal.value.reason


def test_a_file_below_a_root_is_read(root: Path) -> None:
    (root / "deep").mkdir()
    (root / "deep" / "other.png").write_bytes(b"other")
    assert read_path(str(root / "photo.png"), [root], LIMITS) == b"photo"
    assert read_path(str(root / "deep" / "other.png"), [root.parent / "absent", str(root) + "/"], LIMITS) == b"other"


def test_links_are_followed_as_long_as_they_stay_below_a_root(root: Path) -> None:
    (root / "alias.png").symlink_to("photo.png")
    linked_root = root.parent / "linked"
    linked_root.symlink_to(root)
    assert read_path(str(root / "alias.png"), [root], LIMITS) == b"photo"
    assert read_path(str(linked_root / "photo.png"), [linked_root], LIMITS) == b"photo"
    assert read_path(str(root / "photo.png"), [linked_root], LIMITS) == b"photo"


def test_without_roots_every_path_is_refused(root: Path) -> None:
    assert "paths.roots" in path_refused(root / "photo.png")


def test_outside_the_roots_the_answer_is_the_same_whether_a_file_exists_or_not(root: Path) -> None:
    outside = root.parent / "outside"
    (root / "leak.png").symlink_to(outside / "secret.png")
    (root / "dangling.png").symlink_to(outside / "absent.png")
    (root / "leak").symlink_to(outside)
    (outside / "back").symlink_to(root)
    answers = {
        path_refused(path, root)
        for path in (
            outside / "secret.png",
            outside / "absent.png",
            outside / "back" / "photo.png",
            root.parent / "allowed-not" / "secret.png",
            root / "leak.png",
            root / "dangling.png",
            root / "leak" / "secret.png",
            root / "leak" / "absent.png",
            f"{root}/../outside/secret.png",
            f"{root}/../outside/absent.png",
            f"{outside}/back/../allowed/photo.png",
            f"{root}/deep/../photo.png",
            "photo.png",
            "",
            f"{root}/photo.png\0",
            root,
            "/",
            "/etc/passwd",
            "/proc/self/mem",
        )
    }
    assert len(answers) == 1
    assert "secret" not in answers.pop()


def test_what_is_not_a_regular_file_is_refused_without_waiting(root: Path) -> None:
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    (root / "loop.png").symlink_to("loop.png")
    assert "not a regular file" in path_refused(root / "pipe.png", root)
    assert "not a regular file" in path_refused(root / "folder.png", root)
    assert "symbolic links" in path_refused(root / "loop.png", root)
    assert "No such file" in path_refused(root / "absent.png", root)
    assert "not a regular file" in path_refused("/dev/zero", Path("/dev"))


def test_no_descriptor_is_left_open(root: Path) -> None:
    os.mkfifo(root / "pipe.png")
    before = len(os.listdir("/proc/self/fd"))
    read_path(str(root / "photo.png"), [root], LIMITS)
    path_refused(root / "pipe.png", root)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_over_the_limit_is_too_large(root: Path) -> None:
    with pytest.raises(ImageError) as refusal:
        read_path(str(root / "photo.png"), [root], Limits(max_image_bytes=4))
    assert refusal.value.code == "too-large"
