"""What must start in milliseconds is loaded in a fresh interpreter, which says what came along."""
import pkgutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import blendmaskd
from blendmaskd.client import blocking
from checkout import ROOT

ALL = sorted(module.name for module in pkgutil.walk_packages(blendmaskd.__path__, "blendmaskd."))
METRICS = "blendmaskd.core.metrics"  # prometheus_client loads threads and sockets
PURE = [*(name for name in ALL if name.startswith("blendmaskd.core.") and name != METRICS),
        *(f"blendmaskd.{name}" for name in ("client.exchange", "coco.categories", "protocol", "settings"))]  # fmt: skip
WORKERS = [f"blendmaskd_workers.{name}" for name in (
    "engines", "loop", "programs.inference", "programs.random_weights", "results")]  # fmt: skip


@cache
def loaded_with(module: str) -> set[str]:
    """Top-level modules, and those of our own, after `import module`."""
    code = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = run.stdout.split()
    return {name.partition(".")[0] for name in names} | {name for name in names if name.startswith("blendmaskd")}


def test_the_package_is_this_checkout_s() -> None:
    assert Path(blendmaskd.__path__[0]) == ROOT / "daemon" / "blendmaskd"
    assert {"blendmaskd.core.broker", "blendmaskd.client.blocking", "blendmaskd.shell.server"} <= set(ALL)


@pytest.mark.parametrize("module", ALL)
def test_no_module_of_the_daemon_loads_torch_or_workers(module: str) -> None:
    assert not loaded_with(module) & {"torch", "blendmaskd_workers"}


@pytest.mark.parametrize("module", WORKERS)
def test_workers_load_torch_only_when_an_engine_needs_it(module: str) -> None:
    assert "torch" not in loaded_with(module)


@pytest.mark.parametrize("module", PURE)
def test_a_pure_core_loads_no_socket_process_thread_or_log(module: str) -> None:
    assert not loaded_with(module) & {"zmq", "subprocess", "socket", "asyncio", "psutil", "logging", "threading"}


def test_the_client_loads_no_numpy() -> None:
    assert "numpy" not in loaded_with("blendmaskd.client.blocking")


def test_the_package_alone_loads_no_library() -> None:
    assert not loaded_with("blendmaskd") & {"zmq", "msgspec", "msgpack", "numpy", "PIL", "torch", "rich", "yaml"}


def test_the_package_exports_the_client_s_names() -> None:
    assert blendmaskd.Client is blocking.Client
    assert blocking.__all__ == blendmaskd.__all__
    assert set(blendmaskd.__all__) <= set(dir(blendmaskd))
    with pytest.raises(AttributeError, match="'blendmaskd' has no attribute 'Klient'"):
        blendmaskd.Klient  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="Klient"):
        exec("from blendmaskd import Klient")
