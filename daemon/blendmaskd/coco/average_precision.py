"""COCO's average precision: results against ground truth, by pycocotools' COCOeval.

Rules: COCOeval sees numbers of our own, from 1, for images, categories and annotations. To it an annotation 0 is one
that was never found, and of annotations with one id it knows the last. Masks are drawn once, when the ground truth is
taken, so that what cannot be drawn is known before there are results.
"""
from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from blendmaskd.coco.categories import Category
from blendmaskd.coco.instances import Annotation, Instances
from blendmaskd.coco.values import Rle

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")  # as COCO's 12 lines
UNSEEN = -1  # of COCOeval, for a mean over nothing
LEFT_OUT = {"bbox": "segmentation", "segm": "bbox"}  # by masks, small, medium and large go by the area of the mask

Kind = Literal["bbox", "segm"]


@dataclass(frozen=True, slots=True)
class Scores:
    """How well results agree with annotations, in percent; None is a mean over nothing."""

    metrics: dict[str, float | None]  # by METRICS
    classes: dict[str, dict[str, float | None]]  # AP and AP50 by the category's label
    lines: str  # COCO's own


class Reference:
    """Ground truth as COCOeval takes it. An image's number is its place among the pictures, from 1."""

    def __init__(self, truth: Instances) -> None:
        self.numbers = {category.id: number for number, category in enumerate(truth.categories, 1)}
        self.labels = labels(truth.categories)  # by number, from 1
        self.without_pixels = 0  # annotations whose mask has none: nothing can match them
        self.coco = _indexed({
            "images": [
                {"id": number, "height": picture.height, "width": picture.width}
                for number, picture in enumerate(truth.pictures, 1)
            ],
            "categories": [{"id": number, "name": label} for number, label in enumerate(self.labels, 1)],
            "annotations": [
                self._annotation(number, annotation, truth) for number, annotation in enumerate(truth.annotations, 1)
            ],
        })  # fmt: skip

    def _annotation(self, number: int, annotation: Annotation, truth: Instances) -> dict[str, Any]:
        taken: dict[str, Any] = {
            "id": number, "image_id": annotation.picture + 1, "category_id": self.numbers[annotation.category_id],
            "bbox": list(annotation.box), "iscrowd": int(annotation.crowd),
        }  # fmt: skip
        area = annotation.box[2] * annotation.box[3]
        if annotation.segmentation is not None:
            picture = truth.pictures[annotation.picture]
            taken["segmentation"] = draw(annotation, picture.height, picture.width)
            area = float(coco_mask.area(taken["segmentation"]))
            self.without_pixels += not area
        return taken | {"area": area if annotation.area is None else annotation.area}


def draw(annotation: Annotation, height: int, width: int) -> dict[str, Any]:
    """The annotation's mask as a compressed RLE."""
    if isinstance(annotation.segmentation, Rle):
        found: dict[str, Any] = coco_mask.frPyObjects(annotation.segmentation.uncompressed(), height, width)
        return found
    assert annotation.segmentation, "who measures has refused annotations without a mask"
    parts = coco_mask.frPyObjects([part.tolist() for part in annotation.segmentation], height, width)
    merged: dict[str, Any] = coco_mask.merge(parts)
    return merged


def labels(categories: Sequence[Category]) -> list[str]:
    """A name for each, no two the same: with its id where others are called alike."""
    times = Counter(category.name for category in categories)
    return [
        category.name if times[category.name] == 1 else f"{category.name} (id {category.id})"
        for category in categories
    ]


def score(reference: Reference, results: Sequence[dict[str, Any]], images: Sequence[int], kind: Kind) -> Scores:
    """Compare COCO results with the annotations of these images, by their numbers; no result is changed.

    `image_id` of a result is the image's number, `category_id` as in the ground truth; those of other categories do not
    count.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(reference.coco, _found(reference, results, kind), kind)
        evaluation.params.imgIds = sorted(images)
        evaluation.evaluate()
        evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, -1]  # (IoUs, recalls, classes), all areas, 100 detections
    classes = {
        reference.labels[number - 1]: {"AP": _percent(of_class), "AP50": _percent(of_class[0])}
        for number, of_class in zip(evaluation.params.catIds, np.moveaxis(precision, -1, 0))
    }
    metrics = {name: _percent(np.array(value)) for name, value in zip(METRICS, evaluation.stats)}
    return Scores(metrics, classes, lines.getvalue())


def _found(reference: Reference, results: Sequence[dict[str, Any]], kind: Kind) -> COCO:
    """The results as COCOeval takes them; COCO.loadRes would refuse an empty list."""
    kept = [
        {key: value for key, value in result.items() if key != LEFT_OUT[kind]}
        | {"category_id": reference.numbers[result["category_id"]]}
        for result in results
        if result["category_id"] in reference.numbers
    ]
    return reference.coco.loadRes(kept) if kept else _indexed({**reference.coco.dataset, "annotations": []})


def _indexed(tree: dict[str, Any]) -> COCO:
    indexed = COCO()
    indexed.dataset = tree
    with contextlib.redirect_stdout(io.StringIO()):
        indexed.createIndex()
    return indexed


def _percent(shares: Any) -> float | None:
    """The mean of those shares that were seen."""
    seen = shares[shares != UNSEEN]
    return float(seen.mean() * 100) if seen.size else None
