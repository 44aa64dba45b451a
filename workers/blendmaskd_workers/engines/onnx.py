"""The engine onnx: the network from the two files of `scripts/export_onnx.py`, run by onnxruntime.

What the host does is the native engine's own. The files say of themselves what they are, in their metadata: `metadata`.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from blendmaskd_workers import blendmask
from blendmaskd_workers.engines import EngineError
from blendmaskd_workers.engines.native import NativeEngine

PARTS = ("propose", "blend")
FATAL = 4  # of the levels of onnxruntime's own log; errors are raised too
ANY = "N,3,H,W"
OTHER = f"{PARTS[0]}.onnx beside it"
EXPORT = "python scripts/export_onnx.py --config CONFIG --weights CHECKPOINT --output FOLDER"


def file_of(part: str) -> str:
    """The name of the file of one of `PARTS`."""
    return f"{part}.onnx"


def metadata(part: str, config: blendmask.Config, weights: str, images: str) -> dict[str, str]:
    """What a file says of itself.

    `part` is one of `PARTS`, `weights` a digest of the checkpoint, `images` the shape that it takes of them: ANY, or
    one with numbers, such as 1,3,800,1088. Beside these each field of `config`, as JSON.
    """
    fields = {key: json.dumps(value) for key, value in asdict(config).items()}
    return {"part": part, "weights": weights, "images": images, **fields}


class OnnxNetwork:
    """The two files behind those methods of `blendmask.BlendMask` that a worker calls, on the host.

    `blend` is fixed to a number of places: fewer detections are filled up, more take several runs.
    """

    attends_everywhere = False  # as in what is made for inference

    def __init__(self, config: blendmask.Config, images: str, propose: Any, blend: Any) -> None:
        self.config, self.images = config, images
        self._propose, self._blend = propose, blend
        kept, *maps = blend.get_inputs()
        self._places: int = kept.shape[0]
        self._maps = [each.name for each in maps]

    def propose(self, images: Tensor) -> blendmask.Proposals:
        packed, bases, *box_features = map(torch.from_numpy, self._propose.run(None, {"images": images.numpy()}))
        return blendmask.Proposals(packed, bases, box_features)

    complete = propose

    def begin(self, images: Tensor) -> Tensor:
        return images

    def blend(self, proposals: blendmask.Proposals, kept: Tensor) -> Tensor:
        arrays = [each.numpy() for each in (proposals.bases, *proposals.box_features)]
        maps = dict(zip(self._maps, arrays, strict=True))
        return torch.cat([self._blend_some(maps, some) for some in torch.split(kept, self._places)])

    def _blend_some(self, maps: Mapping[str, Any], kept: Tensor) -> Tensor:
        filled = functional.pad(kept, (0, 0, 0, self._places - len(kept)))
        [masks] = self._blend.run(None, {"kept": filled.numpy(), **maps})
        return torch.from_numpy(masks[: len(kept)])


class OnnxEngine(NativeEngine):
    """An exported network on CPUs."""

    def load(self) -> None:
        if self._settings.weights is None:
            raise EngineError(f"model.weights is not set: name the folder that this wrote: {EXPORT}")
        folder = Path(self._settings.weights)
        try:
            self._config = blendmask.load_config(self._settings.config)
        except blendmask.ConfigError as error:
            raise EngineError(str(error)) from error
        self._categories = self._resolve_categories(self._config.num_classes)
        contents = [read(folder / file_of(part)) for part in PARTS]
        self._open()
        network = open_network(folder, contents, self._config, self._settings.providers)
        if network.images != ANY:
            raise EngineError(f"{folder}: takes {network.images} images only, as compilers want it: export it without "
                              "--batch and --size to serve images as they come")
        loaded = [*contents, repr((self._config, self._categories)).encode()]
        self.model = hashlib.sha256(b"".join(loaded)).hexdigest()[:16]
        self._serve(network)


def read(path: Path) -> bytes:
    """A file's bytes. Raises `EngineError`."""
    try:
        return path.read_bytes()
    except NotADirectoryError:  # a mistake, not a mount that may be back
        text = f"{path.parent}: is a file: the engine onnx takes the folder that this writes: {EXPORT}"
        raise EngineError(text) from None
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}; it is made by {EXPORT}") from error


def open_network(folder: Path, contents: Sequence[bytes], config: blendmask.Config,
                 providers: Sequence[str]) -> OnnxNetwork:
    """The network in the files of `PARTS`, whose `contents` were read from `folder`. Raises `EngineError`."""
    sessions = [open_session(folder / file_of(part), content, providers) for part, content in zip(PARTS, contents)]
    said = [session.get_modelmeta().custom_metadata_map for session in sessions]
    weights, images = (said[0].get(key, "") for key in ("weights", "images"))
    for part, found in zip(PARTS, said):
        check_metadata(folder / file_of(part), found, metadata(part, config, weights, images))
    return OnnxNetwork(config, images, *sessions)


def open_session(path: Path, content: bytes, providers: Sequence[str]) -> Any:
    """An onnxruntime session of a file's content, with as many threads as torch has. Raises `EngineError`."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(FATAL)
    there = onnxruntime.get_available_providers()
    if lacking := [each for each in providers if each not in there]:
        raise EngineError(f"model.providers: {lacking[0]} is not in the onnxruntime that is installed, which has "
                          f"{', '.join(there)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = FATAL
    try:
        session = onnxruntime.InferenceSession(content, options, providers=list(providers))
    except Exception as error:  # a kind of its own for each fault
        reason = " ".join(str(error).split())
        raise EngineError(f"{path}: onnxruntime does not run it: {reason}; it is made by {EXPORT}") from error
    if lacking := [each for each in providers if each not in session.get_providers()]:
        raise EngineError(f"model.providers: {lacking[0]} could not be loaded; onnxruntime would go on without it")
    for each in session.get_inputs():
        if each.type != "tensor(float)":
            raise EngineError(f"{path}: takes {each.name} as {each.type}, expected float32: it is made by {EXPORT}")
    return session


def check_metadata(path: Path, said: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Whether a file is what the settings and the other file want. Raises `EngineError`."""
    if "part" not in said:
        raise EngineError(f"{path}: was not made by scripts/export_onnx.py: it does not say of what; {EXPORT}")
    for key, value in wanted.items():
        if said.get(key) != value:
            where = {"part": "its name", "weights": OTHER, "images": OTHER}.get(key, "model.config")
            raise EngineError(f"{path}: was exported with {key} = {said.get(key)}, {where} says {value}: export both "
                              "files anew, or set model.config to what they were exported with")
