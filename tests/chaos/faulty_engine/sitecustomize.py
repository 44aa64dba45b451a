"""Makes the timed engine fail by an image's width, in workers that have this folder on PYTHONPATH; for tests only."""
from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.argv[:1] == ["-m"]:  # `python -m blendmaskd_workers`, before its module is found
    from blendmaskd import assignment
    from blendmaskd.images.decoding import Photograph, bgr
    from blendmaskd_workers.engines.timed import TimedEngine, TimedInput, TimedRun
    from chaos.poison import BOOT_S, BROKEN_DEVICES, HOARD_BYTES, Poison

    load, prepare, launch = TimedEngine.load, TimedEngine.prepare, TimedEngine.launch

    def faulty_load(self: TimedEngine) -> None:
        broken = Path(os.environ.get(BROKEN_DEVICES, "/nowhere")) / assignment.read(os.environ).device
        if broken.exists() and "--check" not in sys.argv:
            os._exit(int(broken.read_text()))
        time.sleep(float(os.environ.get(BOOT_S, "0")))
        load(self)

    def faulty_prepare(self: TimedEngine, photograph: Photograph) -> Any:
        if bgr(photograph).shape[1] == Poison.CRASHES_DECODING:
            os.kill(os.getpid(), signal.SIGSEGV)
        return prepare(self, photograph)

    def faulty_launch(self: TimedEngine, batch: Sequence[TimedInput]) -> TimedRun:
        widths = {item.image_size[1] for item in batch}
        if Poison.KILLS in widths:
            os.kill(os.getpid(), signal.SIGKILL)
        if Poison.EXITS in widths:
            os._exit(3)
        if Poison.RAISES in widths:
            raise RuntimeError("this image is not to the engine's taste")
        if Poison.HANGS in widths:
            time.sleep(3600)
        if Poison.EATS_MEMORY in widths:
            eat_memory()
        return launch(self, batch)

    def eat_memory() -> None:
        """In large pieces: who is refused one has some left to go on with."""
        piece = HOARD_BYTES // 32
        hoard = [bytearray(b"\1") * piece for _ in range(HOARD_BYTES // piece)]
        raise RuntimeError(f"nobody stopped it at {len(hoard) * piece} bytes")

    TimedEngine.load = faulty_load  # type: ignore[method-assign]
    TimedEngine.prepare = faulty_prepare  # type: ignore[method-assign]
    TimedEngine.launch = faulty_launch  # type: ignore[method-assign]
