"""The ladder names what was planted: real half precision, truncation, a scale; in one convolution, or in all."""
from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blendmaskd_workers import blendmask
from blendmaskd_workers.evaluation import ladder, scenes, subjects
from blendmaskd_workers.evaluation.arithmetic import LADDER, Emulated, rounded, truncated
from blendmaskd_workers.evaluation.ladder import Likeness
from blendmaskd_workers.evaluation.subjects import Subject
from checkout import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

ONE = "backbone.bottom_up.res3.0.conv2"
SHARED = "proposal_generator.fcos_head.bbox_tower.0"  # runs on all levels
DEMO = ROOT / "configs" / "demo"
COUNT = 42  # convolutions that inference runs


def verdict(reference: Subject, device: Subject) -> str:
    """What the ladder says of a device on one scene."""
    likenesses: dict[str, Likeness] = {}
    prepared = blendmask.prepare(scenes.painted(0)[0].pixels, reference.model.config)
    with ladder.climbed(reference.model, device.model, device.run, likenesses):
        subjects.observe(reference, prepared)
    return str(ladder.summary(likenesses)["verdict"])


Convolve = Callable[[nn.Conv2d, Tensor], Tensor]


@contextlib.contextmanager
def planted(subject: Subject, convolve: Convolve, names: Sequence[str]) -> Iterator[None]:
    """These convolutions of a device, or all of them, are computed in another way, their norms as before."""
    chosen = [module for name, module in ladder.convolutions(subject.model) if name in names or not names]
    for module in chosen:
        module.__dict__["_conv_forward"] = lambda x, _weight, _bias, module=module: convolve(module, x)
    try:
        yield
    finally:
        for module in chosen:
            module.__dict__.pop("_conv_forward", None)  # an inner context may have done it


def conv(module: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return F.conv2d(x, weight, bias, module.stride, module.padding)


def in_type(dtype: torch.dtype) -> Convolve:
    """PyTorch's own convolution of that type."""
    return lambda module, x: conv(module, x.to(dtype), module.weight.to(dtype)).float()


def cut(tensor: Tensor, bits: int) -> Tensor:
    """So many mantissa bits are kept, by other arithmetic than the ladder's."""
    mantissa, exponent = np.frexp(tensor.numpy())
    return torch.from_numpy(np.ldexp(np.trunc(np.ldexp(mantissa, bits + 1)), exponent - bits - 1))


def cut_to(bits: int) -> Convolve:
    return lambda module, x: conv(module, cut(x, bits), cut(module.weight.detach(), bits))


def scaled(module: nn.Conv2d, x: Tensor) -> Tensor:
    return conv(module, x, module.weight) * 1.01


def noisy(module: nn.Conv2d, x: Tensor) -> Tensor:
    right = conv(module, x, module.weight)
    return right + 0.001 * right.abs().mean() * torch.randn(right.shape, generator=torch.Generator().manual_seed(0))


PLANTED = {
    "fp16": in_type(torch.float16),
    "bf16": in_type(torch.bfloat16),
    "hf32 truncated": cut_to(11),
    "10 bits truncated": cut_to(10),
    "bf16 truncated": cut_to(7),
    "7 bits": lambda module, x: conv(module, x.bfloat16().float(), module.weight.bfloat16().float()),
    "scale 1.010": scaled,
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_was_planted_in_all_convolutions_is_named(pair, name: str) -> None:
    with planted(pair[1], PLANTED[name], []):
        assert verdict(*pair) == f"{name} in all {COUNT} convolutions"


@pytest.mark.parametrize(("name", "place"), [*((name, ONE) for name in PLANTED), ("fp16", SHARED)])
def test_what_was_planted_in_one_convolution_is_named_there_alone(pair, name: str, place: str) -> None:
    with planted(pair[1], PLANTED[name], [place]):
        assert verdict(*pair) == f"{name} in 1 of {COUNT} convolutions, it is {place}; else fp32"


def in_blocks(order: int) -> Convolve:
    """In float16, with the sum so far rounded to it after each 16 channels, first to last (1) or last to first (-1)."""

    def convolve(module: nn.Conv2d, x: Tensor) -> Tensor:
        weight, total = module.weight.half().float(), None
        for start in range(0, x.shape[1], 16)[::order]:
            part = conv(module, x.half().float()[:, start : start + 16], weight[:, start : start + 16])
            total = (part if total is None else part + total).half().float()
        return total

    return convolve


def test_sums_in_float16_are_named_where_their_order_is_the_emulations_and_sized_where_it_is_not(pair) -> None:
    with planted(pair[1], in_blocks(1), [ONE]):
        assert verdict(*pair) == f"fp16 sums in 1 of {COUNT} convolutions, it is {ONE}; else fp32"
    with planted(pair[1], in_blocks(-1), [ONE]):
        assert verdict(*pair).startswith(f"unlike any, as large as fp16 sums in 1 of {COUNT} convolutions, it is {ONE}")


def test_what_follows_from_no_arithmetic_is_called_so(pair) -> None:
    with planted(pair[1], noisy, []):
        assert all(part.startswith("unlike any, as large as ") for part in verdict(*pair).split("; "))


def test_two_arithmetics_in_one_network_are_told_apart(pair) -> None:
    with planted(pair[1], PLANTED["bf16"], []), planted(pair[1], PLANTED["fp16"], [ONE, SHARED]):
        assert verdict(*pair) == (f"bf16 in 40 of {COUNT} convolutions, the first is backbone.bottom_up.stem.conv1; "
                                  f"fp16 in 2 of {COUNT} convolutions, the first is {ONE}")  # fmt: skip


def test_autocast_to_bfloat16_is_named(pair) -> None:
    assert verdict(pair[0], dataclasses.replace(pair[1], dtype="bf16")) == f"bf16 in all {COUNT} convolutions"


def test_norms_that_round_or_shift_hide_nothing() -> None:
    """Those of a network that has learnt, in training's batch norms, which autocast computes in half precision too."""
    network = blendmask.load_config(DEMO / "demo.yaml")
    reference, device = (subjects.load(network, str(DEMO / "model_final.pth"), "cpu") for _ in range(2))
    with planted(device, scaled, []):
        assert verdict(reference, device) == "scale 1.010 in all 77 convolutions"
    assert verdict(reference, dataclasses.replace(device, dtype="bf16")) == "bf16 in all 77 convolutions"


def test_float32_in_another_order_is_float32(pair) -> None:
    with planted(pair[1], in_type(torch.float64), []):
        assert verdict(*pair) == f"fp32 in all {COUNT} convolutions"


def test_deformable_convolutions_are_on_the_ladder_too(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "deformable.yaml"
    path.write_text(f"_BASE_: {config}\nMODEL:\n  RESNETS:\n    DEPTH: 50\n    RES2_OUT_CHANNELS: 64\n"
                    "    WIDTH_PER_GROUP: 16\n    DEFORM_ON_PER_STAGE: [False, False, False, True]\n"
                    "    DEFORM_MODULATED: True\n")  # fmt: skip
    network = blendmask.load_config(path)
    reference, device = (subjects.load(network, 0, "cpu") for _ in range(2))
    name = "backbone.bottom_up.res5.1.conv2"
    module = device.model.get_submodule(name)
    forward = module.forward

    def in_bfloat16(*args: Any) -> Any:
        with Emulated(LADDER["bf16"]):
            return forward(*args)

    module.__dict__["forward"] = in_bfloat16
    assert verdict(reference, device).startswith("bf16 in 1 of ")
    assert verdict(reference, device).endswith(f"it is {name}; else fp32")


# ---- the arithmetics --------------------------------------------------------------------------------------------

def test_seven_bits_are_bfloat16() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 1e3
    assert torch.equal(rounded(values, 7), values.bfloat16().float())


@pytest.mark.parametrize("bits", [7, 9, 10, 11, 22])
def test_truncation_cuts_bits_off(bits: int) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(truncated(values, bits), cut(values, bits))
    assert (rounded(values, bits) - values).abs().le(values.abs() * 2.0 ** -(bits + 1)).all()


def test_ties_go_to_even() -> None:
    ties = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11])
    assert rounded(ties, 10).tolist() == [1, 1 + 2**-9, -1]


def test_values_in_parts_are_as_good_as_whole_ones() -> None:
    right = torch.randn(100, generator=torch.Generator().manual_seed(0))
    rungs = {name: arithmetic.operand(right) for name, arithmetic in LADDER.items()}
    whole, parts = Likeness(), Likeness()
    whole.add(right, rungs["9 bits"], rungs)
    for part in (slice(0, 30), slice(30, 100)):
        parts.add(right[part], rungs["9 bits"][part], {name: values[part] for name, values in rungs.items()})
    assert whole.figures() == pytest.approx(parts.figures())
    assert whole.figures()["nearest"] == "9 bits"
    assert whole.figures()["explained_percent"] == 100


def test_a_part_without_errors_does_not_coarsen_the_rest() -> None:
    right = torch.randn(100, generator=torch.Generator().manual_seed(0))
    likeness = Likeness()
    for values in (right, torch.zeros(4)):
        likeness.add(values, values * (1 + 2**-20), {name: one.operand(values) for name, one in LADDER.items()})
    assert likeness.name() == "fp32"


def test_overflow_does_not_hide_float16() -> None:
    right = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 1e4
    right[:3] = 1e6
    rungs = {name: arithmetic.operand(right) for name, arithmetic in LADDER.items()}
    likeness = Likeness()
    likeness.add(right, right.half().float(), rungs)
    assert likeness.name() in ("fp16", "10 bits")  # which are the same where nothing is small


def test_a_device_without_any_number_is_not_named() -> None:
    right, nothing = torch.ones(4), torch.full((4,), float("nan"))
    likeness = Likeness()
    likeness.add(right, nothing, dict.fromkeys(LADDER, right))
    assert likeness.name() == "not finite"
