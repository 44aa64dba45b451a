"""A Ray cluster of several nodes on this machine, with devices that are declared rather than there: for tests and
benchmarks. It lets in only who has its token, keeps its files in a folder of its own, and leaves no process behind.
"""
from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 100 << 20  # of a node


class Trial:
    """Nodes by name. The first is the head, to which this process is connected."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._cluster = Cluster()
        self._nodes: dict[str, Any] = {}

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, name: str, *, cpus: int = 1, npus: int = 1) -> None:
        """Start a node, and wait until it is there."""
        options: dict[str, Any] = {} if self._nodes else {"include_dashboard": False}
        self._nodes[name] = self._cluster.add_node(
            node_name=name, num_cpus=cpus, resources={"NPU": npus} if npus else {},
            object_store_memory=OBJECT_STORE_BYTES, **options,
        )  # fmt: skip

    def kill(self, name: str) -> None:
        """The end of a node with all that runs on it, without a word."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def end(self) -> None:
        """Stop everything that was started in the folder."""
        if ray.is_initialized():  # else Serve would look for a cluster, and wait
            serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()
        left = processes(self.folder)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)


@contextlib.contextmanager
def trial(nodes: Mapping[str, Mapping[str, int]]) -> Iterator[Trial]:
    """A cluster with these nodes, such as ``{"a": {"cpus": 2, "npus": 1}}``, that this process is connected to."""
    with tempfile.TemporaryDirectory(prefix="bmd-", ignore_cleanup_errors=True) as folder, _environment(folder):
        cluster = Trial(folder)
        try:
            for name, resources in nodes.items():
                cluster.add(name, **resources)
            ray.init(address=cluster.address, logging_level=logging.WARNING, log_to_driver=False)
            yield cluster
        finally:
            cluster.end()


def environment(folder: str) -> dict[str, str]:
    """Of a process that starts or uses Ray in this folder: no usage statistics, no files elsewhere, a token of its own.

    The paths of Ray's sockets below it have at most 107 bytes.
    """
    token = Path(folder, "token")
    if not token.exists():
        token.write_text(secrets.token_hex(32))
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }


def processes(folder: str) -> list[psutil.Process]:
    """All that live and were started with `environment(folder)`, but for this one."""
    return [each for each in psutil.process_iter() if each.pid != os.getpid() and _belongs(each, folder)]


def _belongs(process: psutil.Process, folder: str) -> bool:
    try:
        return process.environ().get("RAY_TMPDIR") == folder and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextlib.contextmanager
def _environment(folder: str) -> Iterator[None]:
    """Ray reads its environment in the process that starts it."""
    config = importlib.import_module("ray._raylet").Config
    try:
        with mock.patch.dict(os.environ, environment(folder)):
            config.initialize("")  # it was read when Ray was imported
            yield
    finally:
        config.initialize("")
