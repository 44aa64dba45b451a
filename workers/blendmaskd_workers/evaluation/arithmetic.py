"""Arithmetics below float32 that accelerators use in "float32" convolutions and matrix products, emulated on a CPU.

An accelerator rounds the operands to fewer mantissa bits, multiplies them exactly and sums in float32; the 16-bit types
round biases and results too, and some keep sums in 16 bits. HF32 has 11 explicit mantissa bits
(hiascend.com, ATC's --allow_hf32: "mantissa precision (11 bits) is close to FP16 (10 bits)") and rounds to the nearest,
ties to even (Ascend C's SetHF32); bfloat16 has 7.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

EXPLICIT_BITS = 23  # of float32's mantissa
BLOCK = 16  # input channels between two roundings of a sum: a cube unit's

Rounding = Callable[[Tensor], Tensor]  # float32 to float32


def rounded(tensor: Tensor, bits: int) -> Tensor:
    """float32 values with so many explicit mantissa bits (1 to 22), the nearest ones, ties to even."""
    whole = tensor.contiguous().view(torch.int32)
    dropped = EXPLICIT_BITS - bits
    half = (1 << (dropped - 1)) - 1 + ((whole >> dropped) & 1)
    return _cut(whole + half, dropped)


def truncated(tensor: Tensor, bits: int) -> Tensor:
    """float32 values with so many explicit mantissa bits (1 to 22), the nearest ones towards 0."""
    return _cut(tensor.contiguous().view(torch.int32), EXPLICIT_BITS - bits)


def _cut(whole: Tensor, dropped: int) -> Tensor:
    return (whole & -(1 << dropped)).view(torch.float32)


def _through(dtype: torch.dtype) -> Rounding:
    return lambda tensor: tensor.to(dtype).float()


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Arithmetic:
    """How convolutions and matrix products round."""

    operand: Rounding
    result: Rounding = _same  # and the bias
    sums: bool = False  # likewise, after each `BLOCK`


# "10 bits" are TF32's, and float16's where results stay in float32; "7 bits" likewise bfloat16's.
LADDER: Mapping[str, Arithmetic] = {
    "hf32": Arithmetic(lambda tensor: rounded(tensor, 11)),
    "hf32 truncated": Arithmetic(lambda tensor: truncated(tensor, 11)),
    "10 bits": Arithmetic(lambda tensor: rounded(tensor, 10)),
    "10 bits truncated": Arithmetic(lambda tensor: truncated(tensor, 10)),
    "fp16": Arithmetic(_through(torch.float16), _through(torch.float16)),
    "9 bits": Arithmetic(lambda tensor: rounded(tensor, 9)),
    "9 bits truncated": Arithmetic(lambda tensor: truncated(tensor, 9)),
    "fp16 sums": Arithmetic(_through(torch.float16), _through(torch.float16), sums=True),
    "7 bits": Arithmetic(lambda tensor: rounded(tensor, 7)),
    "bf16": Arithmetic(_through(torch.bfloat16), _through(torch.bfloat16)),
    "bf16 truncated": Arithmetic(lambda tensor: truncated(tensor, 7)),
}


class Emulated(TorchFunctionMode):
    """``with Emulated(LADDER["fp16"]):`` this thread's convolutions and linear layers, all in float32, are in it."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.arithmetic = arithmetic

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in (F.conv2d, F.linear):
            return func(*args, **(kwargs or {}))
        operand, result = self.arithmetic.operand, self.arithmetic.result
        inputs, weight, bias, *others = args
        inputs, weight = operand(inputs), operand(weight)
        if not self.arithmetic.sums:
            return result(func(inputs, weight, None if bias is None else result(bias), *others, **(kwargs or {})))
        channels = 1 if func is F.conv2d else -1
        total: Any = 0.0
        parts: Any = zip(torch.split(inputs, BLOCK, channels), torch.split(weight, BLOCK, 1), strict=True)
        for part, kernel in parts:
            total = result(total + func(part, kernel, None, *others, **(kwargs or {})))
        return total if bias is None else result(total + result(bias).view(-1, *[1] * (2 * (func is F.conv2d))))
