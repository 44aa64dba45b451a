"""Resizing, normalising and padding."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from blendmaskd_workers.blendmask import collate, prepare
from blendmaskd_workers.blendmask.preprocess import resized_size


@pytest.mark.parametrize(("height", "width", "expected"), [
    (480, 640, (800, 1067)),
    (640, 480, (1067, 800)),
    (427, 640, (800, 1199)),
    (500, 500, (800, 800)),
    (300, 640, (625, 1333)),  # the longer side limits
    (1333, 800, (1333, 800)),
    (1, 1, (800, 800)),
    (2, 3000, (1, 1333)),
    (2, 5000, (1, 1333)),  # the reference would round the height to 0 and fail
    (60000, 1, (1333, 1)),
])
def test_resized_sizes(small_config, height, width, expected):
    assert resized_size(height, width, replace(small_config, min_size=800, max_size=1333)) == expected


def test_sizes_say_what_was_done(small_config):
    prepared = prepare(np.zeros((300, 451, 3), np.uint8), small_config)
    assert prepared.image_size == (300, 451)
    assert prepared.net_size == (256, 385)
    assert prepared.padded_size == (256, 416)
    assert prepared.tensor.shape == (3, 256, 385)


def test_channels_are_normalised_in_the_networks_order(small_config):
    config = replace(small_config, pixel_mean=(1.0, 2.0, 3.0), pixel_std=(1.0, 2.0, 4.0))
    bgr = np.broadcast_to(np.array([11, 22, 43], np.uint8), (256, 256, 3))  # read-only, as decoders may return it
    for image, order in ((bgr, "BGR"), (bgr[:, :, ::-1], "RGB"), (Image.new("RGB", (256, 256), (43, 22, 11)), "BGR")):
        prepared = prepare(image, replace(config, channel_order=order))
        assert prepared.tensor[:, 0, 0].tolist() == [11, 22, 43]
        assert collate([prepared.tensor], config)[0, :, 0, 0].tolist() == [10, 10, 10]


def test_batches_are_padded_at_the_bottom_and_right_to_the_largest(small_config):
    config = replace(small_config, pixel_mean=(100.0,) * 3, pixel_std=(4.0,) * 3)
    wide, tall = (prepare(np.full((h, w, 3), 200, np.uint8), config).tensor for h, w in [(256, 300), (300, 256)])
    images = collate([wide, tall], config)
    assert images.shape == (2, 3, 320, 320)
    assert images.is_contiguous()
    for image, (height, width) in zip(images, [(256, 300), (300, 256)]):
        assert (image[:, :height, :width] == 25).all()
        assert (image[:, height:] == 0).all()
        assert (image[:, :, width:] == 0).all()


@pytest.mark.parametrize("image", [
    np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32),
    np.zeros((0, 4, 3), np.uint8),
])
def test_other_arrays_are_refused(small_config, image):
    with pytest.raises(ValueError, match=r"expected a uint8 image \(H, W, 3\)"):
        prepare(image, small_config)
