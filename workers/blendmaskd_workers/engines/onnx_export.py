"""The network as two ONNX graphs: traced by torch, compared with it, and what compiles them for an Ascend chip.

torch's tracer writes them, not `torch.export`: it alone writes the opset 13 that compilers know best, and needs nothing
else. It takes what Python decides for constants, so the network keeps its sizes tensors while it is traced, and
`differences` is asked for sizes other than those that were traced.
"""
from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from blendmaskd_workers import blendmask
from blendmaskd_workers.blendmask.model import KEPT_FIELDS
from blendmaskd_workers.engines.onnx import PARTS, OnnxNetwork, file_of, metadata

EXAMPLE_SIZE = (320, 384)  # to trace with, where any size is to be taken
PLACES = 25  # empty ones cost as much as others, and each run reads all features
SMALLEST = 1e-30  # what is divided by where all is zero


class Part(nn.Module):
    """A method of `BlendMask`, of tensors alone."""

    def __init__(self, network: blendmask.BlendMask) -> None:
        super().__init__()
        self.network = network


class Propose(Part):
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        proposals = self.network.propose(images)
        return proposals.packed, proposals.bases, *proposals.box_features


class Blend(Part):
    def forward(self, kept: Tensor, bases: Tensor, *box_features: Tensor) -> Tensor:
        return self.network.blend(blendmask.Proposals(kept, bases, list(box_features)), kept)


def export(network: blendmask.BlendMask, weights: str, opset: int, batch: int | None,
           size: tuple[int, int] | None) -> dict[str, onnx.ModelProto]:
    """The files of `PARTS` for a network that is made for inference; `weights` is the digest to tell them by.

    `batch` images of `size` (height, width, multiples of 32); None: any. `blend` has a place for each box that can be
    kept of `batch` images; of any number it has PLACES, and runs as often as there are boxes for.
    """
    levels = [f"box_features_p{3 + level}" for level in range(len(network.config.strides))]
    images = torch.zeros(batch or 2, 3, *(size or EXAMPLE_SIZE))
    kept = torch.zeros(blendmask.places(network, batch) if batch else PLACES, KEPT_FIELDS)
    propose, blend = Propose(network), Blend(network)
    with torch.no_grad():
        _, *maps = propose(images)
    free = _free_axes(levels, batch, size)
    traced = {
        "propose": _trace(propose, (images,), ["images"], ["candidates", "bases", *levels], free, opset),
        "blend": _trace(blend, (kept, *maps), ["kept", "bases", *levels], ["masks"], free, opset),
    }
    takes = "{},3,{},{}".format(batch or "N", *(size or "HW"))
    for part, model in traced.items():
        _fold_sizes(model)
        onnx.helper.set_model_props(model, metadata(part, network.config, weights, takes))
        onnx.checker.check_model(model, full_check=True)
    return traced


def _free_axes(levels: Sequence[str], batch: int | None, size: tuple[int, int] | None) -> dict[str, dict[int, str]]:
    """The axes that may have any length, of each input and output, by name."""
    free: dict[str, dict[int, str]] = {}
    for name in ("images", "candidates", "bases", *levels):
        of_batch = {0: "batch"} if batch is None else {}
        of_size = {1: "candidates"} if name == "candidates" else {2: f"{name}_height", 3: f"{name}_width"}
        free[name] = of_batch | (of_size if size is None else {})
    return free


def _trace(module: nn.Module, example: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str],
           free: Mapping[str, dict[int, str]], opset: int) -> onnx.ModelProto:
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        results = module(*example)
        warnings.simplefilter("ignore")  # that it is old; that our assertions are not in the graph
        torch.onnx.export(
            module, example, file,  # type: ignore[arg-type]
            input_names=inputs, output_names=outputs, opset_version=opset, dynamo=False,
            dynamic_axes={name: free[name] for name in (*inputs, *outputs) if free.get(name)},
        )  # fmt: skip
    model = onnx.load_from_string(file.getvalue())
    for output, result in zip(model.graph.output, results if isinstance(results, tuple) else (results,), strict=True):
        sides = [free.get(output.name, {}).get(axis, side) for axis, side in enumerate(result.shape)]
        output.CopyFrom(onnx.helper.make_tensor_value_info(output.name, onnx.TensorProto.FLOAT, sides))
    return model


def _fold_sizes(model: onnx.ModelProto) -> None:
    """Make constants of what follows from fixed sizes alone, which compilers of fixed shapes want to be told."""
    constants, opsets = _constants(model), {each.domain: each.version for each in model.opset_import}
    folded = True
    while folded:
        known, folded = known_shapes(model), False
        for node in model.graph.node:
            value = None if node.op_type == "Constant" else _value(node, known, constants, opsets)
            if value is not None:
                folded = True
                constants[node.output[0]] = value
                tensor = onnx.numpy_helper.from_array(value)
                node.CopyFrom(onnx.helper.make_node("Constant", [], [node.output[0]], value=tensor))
    _drop_unread(model.graph)


def _value(node: onnx.NodeProto, known: Mapping[str, list[int]], constants: Mapping[str, Any],
           opsets: dict[str, int]) -> Any:
    """What a node always gives; None: that depends on images."""
    if node.op_type == "Shape" and node.input[0] in known:
        return np.array(known[node.input[0]])
    if not node.input or any(each not in constants for each in node.input):
        return None
    given = {each: constants[each] for each in node.input if each}
    [found] = ReferenceEvaluator(node, opsets=opsets).run(None, given)
    return np.asarray(found)


def _drop_unread(graph: onnx.GraphProto) -> None:
    read = {each for node in graph.node for each in node.input} | {each.name for each in graph.output}
    kept = [node for node in graph.node if read.intersection(node.output)]
    del graph.node[:]
    graph.node.extend(kept)


def _constants(model: onnx.ModelProto) -> dict[str, Any]:
    """The values that sizes are made of, by name: whole numbers; the empty name stands for what is not given."""
    given = [(node.output[0], node.attribute[0].t) for node in model.graph.node if node.op_type == "Constant"]
    given += [(each.name, each) for each in model.graph.initializer]
    values = ((name, onnx.numpy_helper.to_array(tensor)) for name, tensor in given)
    return {"": None, **{name: value for name, value in values if value.dtype.kind in "ib"}}


def known_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """The shapes that are fixed, as ONNX infers them, by name."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    tensors = {each.name: each.type.tensor_type for each in (*graph.value_info, *graph.input, *graph.output)}
    return {
        name: [axis.dim_value for axis in tensor.shape.dim]
        for name, tensor in tensors.items()
        if tensor.HasField("shape") and all(axis.HasField("dim_value") for axis in tensor.shape.dim)
    }


def differences(network: blendmask.BlendMask, exported: OnnxNetwork, images: Tensor) -> dict[str, float]:
    """The largest difference from torch in each output, in terms of its largest value, for these images (N, 3, H, W).

    Of the candidates the confidences are compared, best first: which of two equal ones comes first is not defined.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        ours, theirs = network.propose(images), exported.propose(images)
        kept = torch.rand(blendmask.places(network, len(images)), KEPT_FIELDS, generator=generator)
        kept[:, :9] *= sum(height * width for height, width in ours.level_sizes)
        kept[:, 9] *= len(images)
        kept[:, :10] = kept[:, :10].floor()
        kept[:, 10:] *= max(images.shape[2:])
        masks = network.blend(ours, kept), exported.blend(ours, kept)
    found = {
        "confidences": _difference(*(each.packed[..., 0].sort(descending=True).values for each in (ours, theirs))),
        "bases": _difference(ours.bases, theirs.bases),
        "masks": _difference(*masks),
    }
    for level, pair in enumerate(zip(ours.box_features, theirs.box_features)):
        found[f"box features p{3 + level}"] = _difference(*pair)
    return found


def _difference(reference: Tensor, found: Tensor) -> float:
    if reference.shape != found.shape or not found.isfinite().all():
        return math.inf
    return float((found - reference).abs().max() / reference.abs().max().clamp(min=SMALLEST))


def atc_commands(models: Mapping[str, onnx.ModelProto]) -> Iterator[str]:
    """The command lines that compile files of fixed shapes for an Ascend chip; see docs/onnx.md for each flag."""
    for part in PARTS:
        shapes = (
            f"{each.name}:{','.join(str(axis.dim_value) for axis in each.type.tensor_type.shape.dim)}"
            for each in models[part].graph.input
        )
        layout = "NCHW" if part == "propose" else "ND"
        yield (
            f"atc --framework=5 --model={file_of(part)} --output={part} --input_format={layout} "
            f'--input_shape="{";".join(shapes)}" --precision_mode_v2=origin --soc_version=CHIP'
        )
