"""Checkpoint files: what is in them, read without running any code of theirs, and what is wrong with those that fail.

A file is PyTorch's (zip, or what PyTorch wrote before 1.6), or a plain pickle with NumPy arrays, as detectron2's model
zoo has them. PyTorch's are read by `torch.load(weights_only=True)`, pickles by an unpickler that knows the same few
names. Weights lie in it under "model", as AdelaiDet saves them, under another common name, or by themselves, as
AdelaiDet's tools write them. Every complaint is one line: the file, what it seems to be, what to do.
"""

import contextlib
import pickle
import re
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

HOLDERS = ("model", "state_dict", "model_state_dict", "model_state", "module", "ema", "model_ema", "ema_state")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning
BEGINNING = 512  # bytes of a file that tell what it is
SHOWN = 60  # characters of a text that is no checkpoint
LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # PyTorch's number at the beginning of what is no zip
AGAIN = "copy or download it again"
WEIGHTS_ALONE = 'where it was made, torch.save({"model": model.state_dict()}, "weights.pth") saves the weights alone'


class WeightsError(ValueError):
    """A checkpoint that cannot be read or does not fit the network."""


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint by the network's names, on the CPU: {key: tensor of any type}.

    What lies beside them is ignored, and so are prefixes that all names share, such as "module.". Raises WeightsError
    as `read_checkpoint` does, and for a file without weights.
    """
    content = read_checkpoint(path)
    with naming(path):
        return _without_prefix({key: _tensor(key, value) for key, value in _state_dict(content).items()})


def read_checkpoint(path: str | Path) -> Any:
    """Return all that a checkpoint holds, tensors on the CPU.

    Raises WeightsError if the file cannot be read, is no checkpoint, is damaged, or would need code to be unpickled.
    """
    try:
        with naming(path), open(path, "rb") as file:
            return _content(file)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the file's name before a complaint."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


# ---- where the weights are --------------------------------------------------------------------------------------

def _state_dict(content: Any) -> Mapping[str, Any]:
    """Follow the names that weights are saved under."""
    inside = content
    while isinstance(inside, Mapping) and (held := [inside[name] for name in HOLDERS if name in inside]):
        inside = next((each for each in held if isinstance(each, Mapping)), None)
    named = isinstance(inside, Mapping) and inside and all(isinstance(key, str) for key in inside)
    if named and (inside is not content or any(isinstance(value, Tensor | np.ndarray) for value in inside.values())):
        return inside
    if isinstance(content, Mapping):
        found = f"a mapping of {', '.join(map(repr, list(content)[:5]))}" if content else "an empty mapping"
    else:
        found = f"a {type(content).__name__}"
    raise WeightsError('expected {"model": state dict} as AdelaiDet saves it, or a state dict alone: found no "model" '
                       f"of named tensors, but {found}; {WEIGHTS_ALONE}")


def _tensor(key: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fiub":
        return torch.tensor(np.asarray(value, value.dtype.newbyteorder("=")))  # a copy: theirs may be read-only
    if not isinstance(value, Tensor):
        raise WeightsError(f"{key} is a {type(value).__name__}, not a tensor")
    if value.is_quantized or value.is_meta or value.layout != torch.strided:
        kind = "quantized" if value.is_quantized else "without data" if value.is_meta else f"of layout {value.layout}"
        raise WeightsError(f"{key} is a tensor ({kind}) that is not of plain numbers; {WEIGHTS_ALONE}")
    return value


def _without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES * 2:  # one may be within another
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


# ---- reading ----------------------------------------------------------------------------------------------------

def _content(file: IO[bytes]) -> Any:
    beginning = file.read(BEGINNING)
    file.seek(0)
    pickled = beginning.startswith(b"\x80")
    if beginning.startswith(b"PK"):
        _check_archive(file)
    elif not pickled:
        raise WeightsError(f"is not a PyTorch checkpoint: it {_seems(beginning)}")
    elif tarfile.is_tarfile(file):  # PyTorch before 2.6 runs code of those
        raise WeightsError("is not a PyTorch checkpoint: it is a tar archive; unpack it first")
    file.seek(0)
    try:
        if pickled and LEGACY not in beginning[:24]:
            return _Unpickler(file, encoding="latin1").load()
        with _numpy_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is then refused in our words
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes torch.load raise a dozen kinds, AssertionError among them
        raise WeightsError(f"is not a PyTorch checkpoint of plain tensors: {_reason(error)}") from error


def _check_archive(file: IO[bytes]) -> None:
    """PyTorch does not say what else a zip is, and compares no checksums: flipped bits would become weights."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                raise WeightsError(f"is not a PyTorch checkpoint: it is a TorchScript program; {WEIGHTS_ALONE}")
            if not any(name.endswith("/data.pkl") for name in names):
                raise WeightsError("is not a PyTorch checkpoint: it is a zip archive of something else "
                                   f"({', '.join(names[:3])}); if the checkpoint is within, unpack it first")
            for record in archive.infolist():
                if record.CRC:  # 0 where PyTorch was told to compute none
                    archive.read(record)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise WeightsError(f"is a zip archive, as PyTorch's checkpoints are, but truncated or damaged "
                           f"({file.seek(0, 2)} bytes; {error}): {AGAIN}") from error


def _reason(error: Exception) -> str:
    """The whole reason on one line, without PyTorch's advice to run the file's code."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
    refused = _REFUSED.search(text)
    if refused:
        newer = " (PyTorch 2.5 and newer read it)" if refused[1].startswith("numpy.") and not _CAN_ALLOW else ""
        return (f"it holds {refused[1]}, which is no plain data{newer}, and code in a checkpoint is never run; "
                f"{WEIGHTS_ALONE}")
    text = " ".join(text.split()) or type(error).__name__
    if "Unsupported operand" in text:
        return f"it is pickled in a way that PyTorch does not read as plain tensors ({text}); {WEIGHTS_ALONE}"
    return f"it is truncated or damaged ({text}): {AGAIN}"


_REFUSED = re.compile(r"[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) (\S+)")  # in the words of PyTorch 2.1 to 2.13


# ---- names that a pickle may call -------------------------------------------------------------------------------

def _numpy_names() -> dict[str, Callable[..., Any]]:
    """What rebuilds NumPy's arrays and numbers, by the full names that NumPy 1 and 2 pickle it under."""
    array = np.zeros(1)
    functions: dict[str, Any] = {
        "multiarray.scalar": np.float64(0).__reduce__()[0],
        "multiarray._reconstruct": array.__reduce__()[0],
        "numeric._frombuffer": array.__reduce_ex__(5)[0],
    }
    return {f"numpy.{core}.{name}": each for core in ("core", "_core") for name, each in functions.items()}


def _numpy_allowed() -> contextlib.AbstractContextManager[Any]:
    """Within it `torch.load` rebuilds NumPy's arrays and numbers too; PyTorch before 2.5 refuses them."""
    if not _CAN_ALLOW:
        return contextlib.nullcontext()
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"]}  # whose state a pickle sets
    names = [_known_as(name, function) for name, function in _NUMPY.items()]
    return torch.serialization.safe_globals([np.ndarray, np.dtype, *kinds, *names])


def _known_as(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function by a full name that is not its own; PyTorch takes pairs of both from 2.6 on only."""
    def call(*arguments: Any) -> Any:
        return function(*arguments)
    call.__module__, _, call.__name__ = name.rpartition(".")
    call.__qualname__ = call.__name__
    return call


def _latin1(text: str, encoding: str) -> bytes:
    """How pickles of Python 3 write bytes for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return text.encode("latin-1")


_CAN_ALLOW = hasattr(torch.serialization, "safe_globals")
_NUMPY = _numpy_names()
_PLAIN = {**_NUMPY, "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype, "collections.OrderedDict": OrderedDict,
          "_codecs.encode": _latin1}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """For plain pickles: knows `_PLAIN` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = _PLAIN.get(f"{module}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")
        return found


# ---- what else a file may be ------------------------------------------------------------------------------------

_ARCHIVES = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "Zstandard",
             b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR"}  # fmt: skip
_OTHERS = {b"\x89HDF": "an HDF5 file", b"\x93NUMPY": "a NumPy array", b"\x89PNG": "a PNG image",
           b"\xff\xd8\xff": "a JPEG image"}  # fmt: skip


def _seems(beginning: bytes) -> str:
    """What a file is that begins so, and what to do, for "it ..."."""
    if not any(beginning):
        return f"{'begins with zeros, as unfinished downloads do' if beginning else 'is empty'}: {AGAIN}"
    if beginning.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, which stands for the file: `git lfs pull` in its repository fetches that"
    for start, name in _ARCHIVES.items():
        if beginning.startswith(start):
            return f"is packed ({name}); unpack it first"
    for start, name in _OTHERS.items():
        if beginning.startswith(start):
            return f"is {name}"
    if beginning[257:262] == b"ustar":
        return "is a tar archive; unpack it first"
    if beginning[8:10] in (b'{"', b"{ ") and not beginning[6] and not beginning[7]:
        return ("is a safetensors file; torch.save(safetensors.torch.load_file(FILE), \"weights.pth\") makes a "
                "checkpoint of it")
    if any(byte < 32 and byte not in b"\t\n\f\r" for byte in beginning):
        return f"begins with {beginning[:8].hex(' ')}, as no checkpoint does"
    return _seems_text(beginning.decode("utf-8", "replace").lstrip("\ufeff\t\n\f\r "))


def _seems_text(text: str) -> str:
    if text.startswith("<"):
        kind = "an HTML page" if "<html" in text.lower() or "<!doctype html" in text.lower() else "an XML document"
        return (f"is {kind}, as links give in place of a file that is gone or needs a sign-in: download it again, and "
                "look at what came")
    return f"is text, which begins {text[:SHOWN]!r}"
