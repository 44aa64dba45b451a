"""Differences, and the trace: the module in which an error was planted is the one that is named."""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from blendmaskd_workers import blendmask
from blendmaskd_workers.blendmask import BlendMask, Instances, Prepared
from blendmaskd_workers.evaluation import comparison, scenes, subjects
from blendmaskd_workers.evaluation.comparison import Difference, compare, compare_detections, compare_losses
from blendmaskd_workers.evaluation.subjects import Subject

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- figures ----------------------------------------------------------------------------------------------------

def test_a_value_counts_when_it_is_large_and_is_over_when_it_is_off_by_more_than_a_hundredth() -> None:
    reference = torch.tensor([1.0, 2.0, -4.0, 0.0009, 0.0])
    found = compare(reference, torch.tensor([1.009, 2.03, -4.2, 5.0, 0.5]))
    assert (found["over"], found["of"]) == (2, 3)  # 2.03 and -4.2; the last two are too small to count
    assert found["abs_max"] == pytest.approx(4.9991)
    assert found["rel_max"] == pytest.approx(0.05)
    assert found["rel_mean"] == pytest.approx((0.009 + 0.015 + 0.05) / 3, rel=1e-4)
    assert found["shape"] == [5]


def test_percentiles_are_those_of_the_relative_error() -> None:
    found = compare(torch.ones(101), torch.ones(101) + torch.arange(101) / 1000)
    assert [found[name] for name in ("p50", "p90", "p99")] == pytest.approx([0.05, 0.09, 0.099], rel=1e-4)


def test_a_scale_has_a_bias_and_no_angle() -> None:
    reference = torch.tensor([1.0, -2.0, 3.0, -4.0])
    found = compare(reference, reference * 1.01)
    assert found["cosine"] == pytest.approx(1)
    assert found["scale_bias"] == pytest.approx(0.01, rel=1e-4)
    assert found["rmse_over_std"] == pytest.approx(0.01 * 30**0.5 / (4 * 7.25) ** 0.5, rel=1e-4)


def test_noise_has_an_angle_and_no_bias() -> None:
    found = compare(torch.tensor([3.0, 0.0, 0.0]), torch.tensor([3.0, 4.0, 0.0]))
    assert (found["cosine"], found["scale_bias"]) == (pytest.approx(0.6), 0)


@pytest.mark.parametrize(("reference", "device", "cosine", "rmse_over_std"), [
    ([0.0, 0.0], [0.0, 0.0], 1, 0),
    ([0.0, 0.0], [0.0, 1.0], 0, float("inf")),
    ([2.0, 2.0], [2.0, 2.0], 1, 0),
])  # fmt: skip
def test_what_does_not_vary_has_figures_too(reference, device, cosine, rmse_over_std) -> None:
    found = compare(torch.tensor(reference), torch.tensor(device))
    assert (found["cosine"], found["rmse_over_std"]) == (pytest.approx(cosine), rmse_over_std)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_over_and_seen_in_the_maximum(wrong: float) -> None:
    found = compare(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, wrong, 1.0]))
    assert found["over"] == 1
    assert not np.isfinite(found["abs_max"])


def test_the_same_infinity_is_no_difference() -> None:
    found = compare(torch.tensor([float("inf"), 1.0]), torch.tensor([float("inf"), 1.0]))
    assert (found["over"], found["abs_max"]) == (0, 0)


def test_nothing_to_compare_is_no_difference() -> None:
    assert compare(torch.zeros(0), torch.zeros(0))["over"] == 0


def test_parts_add_up() -> None:
    whole, parts = Difference(), Difference()
    reference, device = torch.arange(1.0, 9.0), torch.arange(1.0, 9.0) * 1.02
    device[3] = reference[3]
    whole.add(reference, device)
    parts.add(reference[:5], device[:5])
    parts.add(reference[5:], device[5:])
    assert parts.figures() == pytest.approx(whole.figures())
    assert parts.share_over == 7 / 8


def test_losses_are_held_against_a_hundredth() -> None:
    reference = {"a": 2.0, "b": 2.0, "c": 0.0, "d": 1.0}
    rows = compare_losses(reference, {"a": 2.019, "b": 2.021, "c": 0.0, "d": math.nan})
    assert [(row["name"], row["over"]) for row in rows] == [("a", 0), ("b", 1), ("c", 0), ("d", 1)]
    assert [row["rel_diff"] for row in rows] == pytest.approx([0.0095, 0.0105, 0, math.inf])


def _instances(boxes: list[list[float]], classes: list[int]) -> Instances:
    count = len(boxes)
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return Instances(array, np.linspace(0.9, 0.5, count).astype(np.float32), np.array(classes, np.int64),
                     np.ones((count, 4, 4), np.float32), array[:, :2].round(), np.zeros(count, np.int64))  # fmt: skip


def test_detections_match_by_cell_and_class_and_not_by_order() -> None:
    prepared = Prepared(torch.zeros(3, 64, 64), (64, 64), (64, 64), (64, 64))
    reference = _instances([[0, 0, 32, 32], [8, 8, 40, 40], [16, 16, 60, 60]], [0, 1, 2])
    device = _instances([[8, 8, 40, 44], [0, 0, 32, 32], [16, 16, 60, 60]], [1, 0, 1])
    found = compare_detections(reference, device, prepared)
    assert (found["reference"], found["device"], found["matched"]) == (3, 3, 2)
    assert found["box_diff_px"] == 4
    assert found["score_diff"] == pytest.approx(0.2)
    assert found["iou_min"] == pytest.approx(32 / 36, abs=0.05)
    assert compare_detections(reference, _instances([], []), prepared)["matched"] == 0


# ---- trace ------------------------------------------------------------------------------------------------------

def trace(pair: tuple[Subject, Subject], *errors: Any) -> dict[str, Difference]:
    """The trace of the device with errors planted, see `planted`."""
    reference, device = pair
    differences: dict[str, Difference] = {}
    prepared = blendmask.prepare(scenes.painted(0)[0].pixels, reference.model.config)
    with contextlib.ExitStack() as stack:
        for error in errors:
            stack.enter_context(error(device.model))
        with comparison.traced(reference.model, device.model, device.run, differences):
            subjects.observe(reference, prepared)
    assert "blend" not in vars(reference.model)
    return differences


def planted(module: str, change: Callable[[Any], Any]) -> Any:
    """An error in a module's output, for as long as the context lasts that it makes of a network."""

    @contextlib.contextmanager
    def plant(model: BlendMask) -> Iterator[None]:
        handle = model.get_submodule(module).register_forward_hook(lambda _module, _args, output: change(output))
        yield
        handle.remove()

    return plant


def scaled(output: Any) -> Any:
    """An error of 2%."""
    return [one * 1.02 for one in output] if isinstance(output, list) else output * 1.02


def test_equal_devices_have_a_trace_of_zeros_over_all_modules(pair) -> None:
    differences = trace(pair)
    named = {name for name, _ in pair[0].model.named_modules() if name}
    called = {name for name in named if not name.startswith("basis_module.seg_head") and not name.endswith("refine")}
    assert called - set(differences) <= {"proposal_generator.fcos_head.scales"}  # lists of modules are not called
    assert {"backbone.bottom_up.stem.conv1", "top_layer", "blend"} <= set(differences)
    assert all(difference.abs_max == 0 for difference in differences.values())
    assert comparison.blamed(differences) == []
    assert comparison.worst(differences) is None


@pytest.mark.parametrize("module", [
    "backbone.bottom_up.stem.conv1",  # a convolution that contains its norm
    "backbone.bottom_up.res3.0.conv2.norm",
    "backbone.top_block.p7",
    "proposal_generator.fcos_head.cls_tower.0",  # the group norm behind it hides the error from all later layers
    "proposal_generator.fcos_head.ctrness",
    "basis_module.tower.3",
    "backbone",  # an operation of its own, in no inner module
])  # fmt: skip
def test_the_module_with_a_planted_error_is_named_and_no_other(pair, module: str) -> None:
    differences = trace(pair, planted(module, scaled))
    assert comparison.blamed(differences) == [module]
    assert comparison.worst(differences) == module


def test_an_error_in_the_blender_is_named(pair) -> None:
    @contextlib.contextmanager
    def plant(model: BlendMask) -> Iterator[None]:
        blend = model.blend
        model.__dict__["blend"] = lambda *args: blend(*args) * 1.02
        yield
        del model.__dict__["blend"]

    assert comparison.blamed(trace(pair, plant)) == ["blend"]


def test_of_two_errors_the_first_and_the_worst_are_told_apart(pair) -> None:
    def some_scaled(output: torch.Tensor) -> torch.Tensor:
        factor = torch.ones_like(output)
        factor[:, ::4] = 1.02
        return output * factor

    first, second = "backbone.bottom_up.res2.0.conv1", "backbone.fpn_output4"
    differences = trace(pair, planted(first, some_scaled), planted(second, scaled))
    assert comparison.blamed(differences) == [first, second]
    assert comparison.worst(differences) == second


def test_below_the_bar_the_worst_is_still_named(pair) -> None:
    differences = trace(pair, planted("top_layer", lambda output: output * 1.001))
    assert comparison.blamed(differences) == []
    assert comparison.worst(differences) == "top_layer"
