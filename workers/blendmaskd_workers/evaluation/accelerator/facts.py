"""What device this is, and what drives it: `python -m blendmaskd_workers.evaluation.accelerator.facts DEVICE`."""
from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path

import torch

from blendmaskd import ascend
from blendmaskd.discovery import ask_tool
from blendmaskd_workers import process
from blendmaskd_workers.devices import Device, DeviceError, open_device
from blendmaskd_workers.evaluation.accelerator.children import Row, telling

NVIDIA_SMI = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
NVIDIA = Path("/proc/driver/nvidia/version")


def main(argv: list[str]) -> int:
    process.end_with_parent()
    with telling() as tell:
        try:
            device = open_device(argv[0], "native")  # which no device refuses
            torch.ones(8, device=device.torch_device).sum().item()  # a driver that lets itself be opened may not work
        except (DeviceError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 1
        tell(**_facts(device))
    return 0


def _facts(device: Device) -> Row:
    kind = device.torch_device.type
    runtimes = {"cuda": _cuda, "npu": _npu}
    return {
        "name": device.name(),
        "memory_gb": round(device.memory().total / 1e9, 1),
        "bf16": device.multiplies_bf16(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **(runtimes[kind]() if kind in runtimes else {}),
    }


def _cuda() -> Row:
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {
        "driver": ask_tool(NVIDIA_SMI, os.environ).partition("\n")[0] or _number(_text(NVIDIA)) or "unknown",
        "runtime": f"CUDA {torch.version.cuda}, cuDNN {cudnn}",
    }


def _npu() -> Row:
    try:
        version = importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return {
        "driver": ascend.parse_version(_text(ascend.INSTALLED / "driver" / "version.info")) or "unknown",
        "runtime": f"torch_npu {version}",
    }


def _number(text: str) -> str:
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
