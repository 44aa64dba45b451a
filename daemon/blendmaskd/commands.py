"""The console commands of the base installation; all but three of them need no more than that."""
from __future__ import annotations

from functools import partial

from blendmaskd.assignment import EXIT_CANNOT_BOOT
from blendmaskd.extras import run

submit = partial(run, "blendmaskd-submit", "blendmaskd.programs.submit")
stats = partial(run, "blendmaskd-stats", "blendmaskd.programs.stats")
keys = partial(run, "blendmaskd-keys", "blendmaskd.keys")
evaluate_coco = partial(run, "blendmaskd-evaluate-coco", "blendmaskd.programs.evaluate_coco")  # pycocotools
serve = partial(run, "blendmaskd", "blendmaskd.__main__", EXIT_CANNOT_BOOT)  # the extra serve
http = partial(run, "blendmaskd-http", "blendmaskd.http.program", EXIT_CANNOT_BOOT, "http")
