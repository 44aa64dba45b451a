"""The double benchmark: a device's errors, against float64, in terms of float32's own."""
from __future__ import annotations

import math

import pytest
import torch

from blendmaskd_workers.evaluation import double_benchmark
from blendmaskd_workers.evaluation.double_benchmark import compare, errors

TRUTH = torch.tensor([1.0, -2.0, 4.0, 1e-7, -1e-6, 0.0], dtype=torch.float64)


def test_figures_of_errors() -> None:
    found = errors(TRUTH, TRUTH + torch.tensor([0.1, 0.2, -0.8, 1e-8, 1e-10, 0.0]))
    assert found["rmse"] == pytest.approx(math.sqrt((0.01 + 0.04 + 0.64) / 3))
    assert found["rel_mean"] == pytest.approx((0.1 + 0.1 + 0.2) / 3)
    assert found["rel_max"] == pytest.approx(0.2)
    assert found["small"] == pytest.approx(1 / 3)  # 1e-8 is off by more than 1e-9


def test_errors_are_compared_with_the_references() -> None:
    error = torch.tensor([1e-3, -2e-3, 1e-3, 1e-11, 0.0, 0.0])
    found = compare(TRUTH, TRUTH + error, TRUTH + 1.9 * error)
    assert [found[name] for name in ("rmse", "rel_mean", "rel_max")] == pytest.approx([1.9] * 3)
    assert found["small"] == 1
    assert found["over"] == []
    assert compare(TRUTH, TRUTH + error, TRUTH + 2.1 * error)["over"] == ["rmse", "rel_mean"]
    assert compare(TRUTH, TRUTH + error, TRUTH + 10.5 * error)["over"] == ["rmse", "rel_mean", "rel_max"]
    assert compare(TRUTH, TRUTH + error, TRUTH + 1e-8)["over"] == ["small"]


def test_where_the_reference_has_no_error_the_device_must_have_none() -> None:
    assert compare(TRUTH, TRUTH, TRUTH)["over"] == []
    assert compare(TRUTH, TRUTH, TRUTH * 1.001)["over"] == ["rmse", "rel_mean", "rel_max"]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_over(wrong: float) -> None:
    device = TRUTH.clone()
    device[0] = wrong
    assert compare(TRUTH, TRUTH * (1 + 1e-7), device)["over"] == ["rmse", "rel_mean", "rel_max"]


def test_a_small_value_must_be_a_number_too() -> None:
    device = TRUTH.clone()
    device[5] = math.nan
    assert compare(TRUTH, TRUTH, device)["over"] == ["small"]


def test_the_limits_are_msprobes() -> None:
    assert double_benchmark.LIMITS == {"rmse": 2, "rel_mean": 2, "rel_max": 10, "small": 2}
