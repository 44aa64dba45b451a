"""A process that times an engine on one device: `python -m blendmaskd_workers.evaluation.stopwatch`; not for people.

`blendmaskd_workers.evaluation.performance` launches it as the daemon launches workers, and talks to it in lines of
JSON. It says once that it is ready, then answers requests, each in three steps, so that several devices can be timed at
the same time and none is timed while another has finished:

    request {"batch": 2, "dtype": "fp32", "iterations": 50, "warm_up": 10}   answer {} after the warm-up
    request {}                                                               answer {"latencies_ms": […]}
    request {}: until it comes, the device is kept busy                      answer {}

A request with "profile": true has one step, which is answered with the operators of a batch, {"operators": […]}. A
request that fails is answered {"failed": reason} instead and is over. The end of its input ends the process.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import IO, Any

import msgspec
import numpy as np

from blendmaskd import assignment
from blendmaskd_workers import engines, process
from blendmaskd_workers.engines import Engine, EngineError, segment
from blendmaskd_workers.evaluation.accelerator.children import Tell, telling

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}  # names that torch gives to what autocast can compute in


def main(argv: list[str]) -> int:
    """Time the engine of this process's assignment on a random photograph of the size argv[0], such as 800x1280."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the program's business: it ends us
    with telling() as answer, open(0, "rb", buffering=0, closefd=False) as requests:
        assigned = assignment.read(os.environ)
        engine = engines.make(assigned.settings, assigned.local_device)
        try:
            engine.load()
        except EngineError as error:
            answer(failed=str(error))
            return error.exit_code
        height, width = map(int, argv[0].split("x"))
        prepared = engine.prepare(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
        actual = process.observe(assigned.wanted, engine.device)
        answer(actual=msgspec.to_builtins(actual), network_input="{}x{}".format(*prepared.padded_size))
        while line := requests.readline():
            try:
                _time(json.loads(line), engine, prepared, requests, answer)
            except (RuntimeError, NotImplementedError, ValueError) as error:  # out of memory; no kernel for a data type
                answer(failed=(str(error).splitlines() or [type(error).__name__])[0])
    return 0


def _time(request: dict[str, Any], engine: Engine, prepared: Any, requests: IO[bytes], answer: Tell) -> None:
    batch = [prepared] * int(request["batch"])
    synchronize = engine.device.synchronize if engine.device else lambda: None
    with _autocast(engine, request["dtype"]):
        for _ in range(request["warm_up"]):
            segment(engine, batch)
        if request["profile"]:
            from blendmaskd_workers.evaluation import recording

            assert engine.device is not None  # it is no engine that sleeps
            operators = recording.record(engine.device, lambda: segment(engine, batch), request["iterations"])
            answer(operators=list(map(dataclasses.asdict, operators)))
            return
        answer()
        if not requests.readline():
            return
        latencies_ms = [_time_ms(engine, batch, synchronize) for _ in range(request["iterations"])]
        answer(latencies_ms=latencies_ms)
        while not select.select([requests], [], [], 0)[0]:
            segment(engine, batch)
        requests.readline()
        answer()


def _time_ms(engine: Engine, batch: list[Any], synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    segment(engine, batch)
    synchronize()
    return 1000 * (time.perf_counter() - start)


def _autocast(engine: Engine, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Convolutions and matrix products in `dtype`, the rest as torch sees fit for it; nothing for fp32."""
    if dtype == "fp32" or engine.device is None:
        return contextlib.nullcontext()
    import torch

    return torch.autocast(engine.device.torch_device.type, getattr(torch, DTYPES[dtype]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
