"""Categories: what a class index is called, and which id its dataset gives it.

A network numbers its classes 0, 1, 2, … without gaps; a dataset's own ids may have gaps (COCO's 80 classes carry ids
between 1 and 90). Class index i is the category with the i-th smallest id, the order in which COCO tools number them.

Rules: the names come from a file or a table, never from a guess that could be off by one: a list whose length is not
the network's number of classes is refused. Must never import torch or a socket.
"""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from blendmaskd.coco import json_file

BESIDE_THE_WEIGHTS = "categories.json"


class CategoriesError(ValueError):
    """A category list that cannot be used; the text names the file and says why."""


@dataclass(frozen=True, slots=True)
class Category:
    """One class of a dataset."""

    id: int  # the dataset's own
    name: str


# The 80 "thing" classes of COCO 2017 (instances_val2017.json), id:name in ascending id.
_COCO = """
1:person 2:bicycle 3:car 4:motorcycle 5:airplane 6:bus 7:train 8:truck 9:boat 10:traffic_light 11:fire_hydrant
13:stop_sign 14:parking_meter 15:bench 16:bird 17:cat 18:dog 19:horse 20:sheep 21:cow 22:elephant 23:bear 24:zebra
25:giraffe 27:backpack 28:umbrella 31:handbag 32:tie 33:suitcase 34:frisbee 35:skis 36:snowboard 37:sports_ball 38:kite
39:baseball_bat 40:baseball_glove 41:skateboard 42:surfboard 43:tennis_racket 44:bottle 46:wine_glass 47:cup 48:fork
49:knife 50:spoon 51:bowl 52:banana 53:apple 54:sandwich 55:orange 56:broccoli 57:carrot 58:hot_dog 59:pizza 60:donut
61:cake 62:chair 63:couch 64:potted_plant 65:bed 67:dining_table 70:toilet 72:tv 73:laptop 74:mouse 75:remote
76:keyboard 77:cell_phone 78:microwave 79:oven 80:toaster 81:sink 82:refrigerator 84:book 85:clock 86:vase 87:scissors
88:teddy_bear 89:hair_drier 90:toothbrush
"""
COCO: tuple[Category, ...] = tuple(
    Category(int(number), name.replace("_", " ")) for number, name in (item.split(":") for item in _COCO.split())
)


def load(path: str | Path) -> list[Category]:
    """The categories of a JSON file, in ascending id: a COCO `categories` list, or a whole COCO annotation file.

    Raises `CategoriesError`.
    """
    try:
        return _listed(json_file.read(path))
    except (json_file.JsonFileError, CategoriesError) as error:
        raise CategoriesError(f"{path}: {error}") from None


def _listed(tree: Any) -> list[Category]:
    entries = tree.get("categories") if isinstance(tree, dict) else tree
    if not isinstance(entries, list) or not entries:
        raise CategoriesError('expected a list such as [{"id": 1, "name": "person"}, ...], or an annotation file with '
                              'one under "categories"')  # fmt: skip
    found = sorted(map(parse, entries), key=lambda category: category.id)
    for earlier, later in pairwise(found):
        if earlier.id == later.id:
            raise CategoriesError(f"id {later.id} is given to both {earlier.name!r} and {later.name!r}")
    return found


def resolve(
    num_classes: int, weights_path: str | Path | None = None, categories_path: str | Path | None = None
) -> Sequence[Category]:
    """The `num_classes` categories of a network, by class index.

    From `categories_path` when given; else from ``categories.json`` beside the weights when there is one; else COCO's
    for 80 classes; else ``class_N`` with id N + 1. Raises `CategoriesError` for a bad file and for a wrong count.
    """
    beside = Path(weights_path).parent / BESIDE_THE_WEIGHTS if weights_path is not None else None
    path = categories_path if categories_path is not None else beside if beside and os.path.exists(beside) else None
    if path is not None:
        found = load(path)
        if len(found) != num_classes:
            counts = f"has {len(found)} categories, the network has {num_classes} classes"
            raise CategoriesError(f"{path}: {counts}: is the configuration that of the weights?")
        return found
    if num_classes == len(COCO):
        return COCO
    return [Category(index + 1, f"class_{index}") for index in range(num_classes)]


def parse(entry: Any) -> Category:
    """An entry of a COCO `categories` list. Raises `CategoriesError`."""
    match entry:
        case {"id": int(number), "name": str(name)} if not isinstance(number, bool) and name and _is_text(name):
            return Category(number, name)
    raise CategoriesError(f'{json.dumps(entry)[:200]}: expected an integer "id" and a "name"')


def _is_text(name: str) -> bool:
    """Whether it can be written at all: JSON's escapes can say half a character."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)
