"""From an image's bytes to the network's input: to the last bit what the longer way gave that copied at each step."""
from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blendmaskd.images import decoding as images
from blendmaskd.images import pixel_formats
from blendmaskd.settings import Limits
from blendmaskd_workers import blendmask
from blendmaskd_workers.benchmark import pictures as pictures_of_a_load
from blendmaskd_workers.blendmask.preprocess import resized_size
from fuzz import pictures

Pixels = npt.NDArray[np.uint8]

SMALL = blendmask.load_config(str(Path(__file__).parents[1] / "golden/small_R18.yaml"))
MEAN, STD = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)
CONFIG = replace(SMALL, min_size=48, max_size=96, pixel_mean=MEAN, pixel_std=STD)
LIMITS = Limits()


# ---- the longer way ---------------------------------------------------------------------------------------------

def reference_bgr(encoded: bytes) -> Pixels:
    """HxWx3, as detectron2 reads a file."""
    depth = pixel_formats.check(encoded)
    image = Image.open(io.BytesIO(encoded))
    image.load()
    if image.mode.startswith("I;16"):
        upper = (np.asarray(image) >> (depth.bits - 8)).astype(np.uint8)
        image = Image.fromarray(255 - upper if depth.white_is_zero else upper)
    upright = images._UPRIGHT.get(images._orientation(image))
    image = image if upright is None else image.transpose(upright)
    image.info.pop("transparency", None)
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


def reference_input(pixels: Pixels, config: blendmask.Config) -> npt.NDArray[np.float32]:
    """(3, h, w), normalised; from BGR pixels, whose channels are turned before they are resized."""
    height, width = resized_size(pixels.shape[0], pixels.shape[1], config)
    turned = pixels[:, :, ::-1] if config.channel_order == "RGB" else pixels
    image = Image.fromarray(np.ascontiguousarray(turned)).resize((width, height), Image.Resampling.BILINEAR)
    found = np.array(image, np.float32).transpose(2, 0, 1)
    found -= np.array(config.pixel_mean, np.float32)[:, None, None]
    found /= np.array(config.pixel_std, np.float32)[:, None, None]
    return found


def assert_same(photograph: images.Photograph, pixels: Pixels, config: blendmask.Config) -> None:
    np.testing.assert_array_equal(images.bgr(photograph), pixels)
    np.testing.assert_array_equal(np.asarray(images.rgb(photograph)), pixels[:, :, ::-1])
    prepared = blendmask.prepare(photograph, config)
    expected = reference_input(pixels, config)
    found = blendmask.collate([prepared.tensor], config)
    np.testing.assert_array_equal(found[0, :, : expected.shape[1], : expected.shape[2]].numpy(), expected, strict=True)
    assert found.shape[2:] == prepared.padded_size
    assert found.count_nonzero() == np.count_nonzero(expected)
    assert prepared.image_size == pixels.shape[:2]


# ---- what comes in ----------------------------------------------------------------------------------------------

configs = st.sampled_from([replace(CONFIG, channel_order=order) for order in ("BGR", "RGB")])
seeds = st.integers(0, 1 << 32)
sides = st.one_of(st.integers(1, 130), st.just(48))  # 48 x 48 is not resized
MODES = {
    "JPEG": ("RGB", "L", "CMYK", "YCbCr"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "RGBA", "L", "P", "1"),
    "TIFF": ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I;16"),
}


@st.composite
def encodings(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[kind]))
    size = draw(sides), draw(sides)
    random = np.random.default_rng(draw(seeds))
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 1 << 16, size, np.uint16))
    else:
        rgba = Image.fromarray(random.integers(0, 256, (*size, 4), np.uint8))
        image = rgba if mode == "RGBA" else rgba.convert("LA") if mode == "LA" else rgba.convert("RGB").convert(mode)
    options = {}
    if kind != "BMP" and (orientation := draw(st.integers(0, 9))):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@settings(max_examples=300, deadline=None)
@given(encodings(), configs)
def test_encoded_images(encoded: bytes, config: blendmask.Config) -> None:
    assert_same(images.decode(encoded, LIMITS), reference_bgr(encoded), config)


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_every_format_that_is_read(order: str) -> None:
    for encoded in pictures.good():
        try:
            photograph = images.decode(encoded, LIMITS)
        except images.ImageError:
            continue  # of the formats that are refused
        assert_same(photograph, reference_bgr(encoded), replace(CONFIG, channel_order=order))


@settings(max_examples=100, deadline=None)
@given(sides, sides, seeds, st.sampled_from(["bgr", "rgb"]), configs)
def test_raw_arrays(height: int, width: int, seed: int, order: str, config: blendmask.Config) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    photograph = images.from_raw(memoryview(raw.tobytes()), raw.shape, "uint8", order, LIMITS)
    assert_same(photograph, raw if order == "bgr" else raw[:, :, ::-1], config)


def test_arrays_that_are_views_of_others() -> None:
    whole = np.random.default_rng(0).integers(0, 256, (70, 90, 4), np.uint8)
    for view in (whole[::2, 5:60, :3], whole[:, :, 2::-1], whole[:48, 48::-1, 1:].swapaxes(0, 1)):
        assert_same(view, view, CONFIG)


def test_what_shared_memory_says_later_does_not_matter() -> None:
    memory = bytearray(np.random.default_rng(0).integers(0, 256, 48 * 48 * 3, np.uint8).tobytes())
    for order in ("bgr", "rgb"):
        photograph = images.from_raw(memory, (48, 48, 3), "uint8", order, LIMITS)
        prepared, kept = blendmask.prepare(photograph, CONFIG), images.rgb(photograph)
        before = prepared.tensor.clone(), np.array(kept)
        memory[:] = bytes(reversed(memory))
        assert (prepared.tensor == before[0]).all()
        assert (np.asarray(kept) == before[1]).all()


in_silence = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # as preprocess has it


@in_silence
@settings(max_examples=100, deadline=None)
@given(sides, sides, seeds, st.booleans(), configs)
def test_fast_resizing_is_off_by_one_in_each_direction_at_most(
    height: int, width: int, seed: int, decoded: bool, config: blendmask.Config
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    photograph = images.rgb(pixels) if decoded else pixels
    exact, fast = (blendmask.prepare(photograph, config, fast=fast) for fast in (False, True))
    assert (exact.image_size, exact.net_size, exact.padded_size) == (fast.image_size, fast.net_size, fast.padded_size)
    passes = (exact.net_size[0] != height) + (exact.net_size[1] != width)  # each rounds its values
    assert (exact.tensor.int() - fast.tensor.int()).abs().max() <= passes
    if exact.net_size == (height, width):
        assert torch.equal(exact.tensor, fast.tensor)


@in_silence
def test_fast_resizing_changes_few_values() -> None:
    picture = images.decode(pictures_of_a_load.synthetic((960, 1280), "jpeg").payload or b"", LIMITS)
    exact, fast = (blendmask.prepare(picture, replace(CONFIG, min_size=800, max_size=1333), fast=fast).tensor
                   for fast in (False, True))  # fmt: skip
    assert 0 < (exact != fast).float().mean() < 0.002
    assert (exact.int() - fast.int()).abs().max() == 1


def test_other_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="mode RGB, got L"):
        blendmask.prepare(Image.new("L", (50, 50)), CONFIG)
