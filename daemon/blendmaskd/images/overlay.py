"""Overlay: results drawn over their image, for people to look at.

Each instance has a colour of its own: a tinted mask with a line around it, a box, and a tag with name and score. Line
widths and letters grow with the image. An instance's colour depends only on its place among the results.

Rules: draws what the results say and decides nothing. Must never import torch.
"""
from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from functools import cache
from math import ceil
from typing import Any, NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from blendmaskd.coco import bitmaps

# Opacity of the colour where a mask is 0 to 255. Across a mask's border, blurred, it falls from 255 to 0: near the
# middle of that slope is the line.
_TINT = [round(0.42 * value) for value in range(256)]
_LINE = [round(255 * min(max(2.5 - 5 * abs(value / 255 - 0.5), 0), 1)) for value in range(256)]

# Ten that look well together, then ten that are farthest from all before them (in CIELAB).
FIRST_COLOURS = (
    "#ff3b6b", "#21c7ff", "#ffc21a", "#3ddc6f", "#a45cff", "#ff7a1a", "#00d6b4", "#4f7dff", "#e64bd8", "#b7e000",
    "#e6b299", "#1aff1a", "#e699d9", "#9b4427", "#1a1aff", "#c6e699", "#27619b", "#9b2761", "#9b8827", "#e60013",
)  # fmt: skip
# Pillow's own font has Latin letters only; of these, the first that is installed writes other names.
OTHER_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf",
               "DejaVuSans.ttf")  # fmt: skip

Colour = tuple[int, int, int]
Result = Mapping[str, Any]


def draw(image: Image.Image, results: Sequence[Result]) -> Image.Image:
    """A copy of an image with its COCO results drawn over it, RGB, small instances over large ones.

    `results` are those of a job: ``bbox``, ``score``, ``category_name``, and ``segmentation`` as RLE, polygons or not
    at all. The image must be the one that was segmented, upright as its EXIF orientation says. Raises `ValueError` if
    a mask is of another size.
    """
    side = (image.width * image.height) ** 0.5  # of a square as large
    thickness = ceil(side / 400)
    coloured = [(result, colour(place)) for place, result in enumerate(results)]
    large_first = sorted(coloured, key=lambda item: -item[0]["bbox"][2] * item[0]["bbox"][3])
    drawn = image.convert("RGB") if image.mode != "RGB" else image.copy()
    for result, own in large_first:
        if "segmentation" in result:
            mask = Image.fromarray(bitmaps.decode(result["segmentation"], image.height, image.width)).convert("L")
            _tint(drawn, mask, own, thickness)
    for result, own in large_first:
        _frame(drawn, result["bbox"], own, thickness)
    _write_tags(drawn, coloured, max(11, round(side / 46)))
    return drawn


def colour(place: int) -> Colour:
    """The colour of the instance at that place among its results."""
    if place < len(FIRST_COLOURS):
        red, green, blue = bytes.fromhex(FIRST_COLOURS[place][1:])
        return red, green, blue
    # Steps of the golden ratio keep neighbours apart however many there are.
    shares = colorsys.hls_to_rgb(place * 0.618034 % 1, (0.5, 0.62, 0.4)[place % 3], 0.9)
    red, green, blue = (round(255 * share) for share in shares)
    return red, green, blue


def _tint(drawn: Image.Image, mask: Image.Image, own: Colour, thickness: int) -> None:
    """Mix the colour into the image inside the mask, and draw a soft-edged line of that thickness around it."""
    found = mask.getbbox()
    if found is None:
        return
    around = 3 * thickness
    left, top = max(found[0] - around, 0), max(found[1] - around, 0)
    inside = mask.crop((left, top, min(found[2] + around, mask.width), min(found[3] + around, mask.height)))
    line = inside.filter(ImageFilter.GaussianBlur(0.6 * thickness)).point(_LINE)
    drawn.paste(own, (left, top), ImageChops.lighter(line, inside.point(_TINT)))


def _frame(drawn: Image.Image, bbox: Sequence[float], own: Colour, thickness: int) -> None:
    x, y, width, height = bbox
    left, top = min(round(x), drawn.width - 1), min(round(y), drawn.height - 1)
    right, bottom = max(round(x + width) - 1, left), max(round(y + height) - 1, top)
    ImageDraw.Draw(drawn).rectangle((left, top, right, bottom), outline=own, width=ceil(thickness / 2))


class _Tag(NamedTuple):
    """A rectangle that a label may take, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Tag) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


def _write_tags(drawn: Image.Image, coloured: Sequence[tuple[Result, Colour]], letters: int) -> None:
    """Name and score of each instance, where they cover no earlier tag if there is such a place."""
    placed: list[_Tag] = []
    tags = []
    for result, own in coloured:
        text = f"{result['category_name']} {result['score']:.2f}"
        font = _fitting_font(text, letters, drawn.width)
        tag = min(_places(result["bbox"], text, font, drawn.size), key=lambda tag: sum(map(tag.overlap, placed)))
        placed.append(tag)
        tags.append((tag, text, font, own))
    pen = ImageDraw.Draw(drawn, "RGBA")
    for tag, text, font, own in reversed(tags):  # the best score last, on top
        pen.rounded_rectangle(tag, radius=(tag.bottom - tag.top) / 5, fill=(*own, 225))
        middle = (tag.left + tag.right) / 2, (tag.top + tag.bottom) / 2
        pen.text(middle, text, fill=_ink(own), font=font, anchor="mm")


def _places(bbox: Sequence[float], text: str, font: ImageFont.FreeTypeFont, size: tuple[int, int]) -> list[_Tag]:
    """Where the tag of a box may go, best first: above it, inside its head, below it, inside its foot; all in sight."""
    x, y, box_width, box_height = bbox
    width, height = _tag_size(text, font)
    tags = []
    for left in (x, x + box_width - width):
        for top in (y - height, y, y + box_height, y + box_height - height):
            inner_left = max(min(round(left), size[0] - width), 0)
            inner_top = max(min(round(top), size[1] - height), 0)
            tags.append(_Tag(inner_left, inner_top, inner_left + width - 1, inner_top + height - 1))
    return tags


def _fitting_font(text: str, letters: int, width: int) -> ImageFont.FreeTypeFont:
    """The font at that size in pixels, or smaller where the tag would be wider than the image."""
    while letters > 1 and _tag_size(text, _font(letters, text.isascii()))[0] > width:
        letters -= 1  # widths do not shrink in proportion: letters sit on whole pixels
    return _font(letters, text.isascii())


def _tag_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height in pixels, margins included."""
    return round(font.getlength(text) + 0.7 * font.size), round(1.35 * font.size)


@cache
def _font(size: int, ascii_only: bool) -> ImageFont.FreeTypeFont:
    if not ascii_only:
        for name in OTHER_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _ink(paper: Colour) -> Colour:
    """Black or white, whichever is easier to read on that colour."""
    red, green, blue = paper
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
