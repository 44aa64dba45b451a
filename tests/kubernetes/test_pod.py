"""The CPU variant's pod runs as its manifest says: see `pod`."""
from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from manifests import ROOT, Manifests, Object, made_by_hand, port_of
from pod import ADDRESS, Pod, missing

from blendmaskd import keys
from blendmaskd.client.blocking import Client

pytestmark = pytest.mark.slow

T = TypeVar("T")
START_S = 120.0  # loading torch twice on a loaded machine
IMAGES = ROOT / "configs" / "demo" / "images"


def wait_for(condition: Callable[[], T], timeout_s: float = 30.0) -> T:
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {timeout_s:g} s"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def key_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The daemon's keys and those of alice, who may connect, and of mallory, who may not."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("server", "alice", "mallory"):
        keys.write_pair(folder, name)
    keys.make_folder(folder / "clients")
    keys.write_public(folder / "clients", "alice", keys.read_public(folder / "alice.key"))
    return folder


def start(folder: Path, key_folder: Path, spec: Object, manifests: Manifests, **environment: str) -> Pod:
    if missing():
        pytest.skip(f"needs {missing()}")
    pod = Pod(folder, spec, [manifests.one("ConfigMap"), *made_by_hand(key_folder)], **environment)
    wait_for(pod.started)
    return pod


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory, key_folder: Path) -> Iterator[Pod]:
    """Started, by its startup probe, with all devices; the demo model serves."""
    manifests = Manifests("cpu")
    pod = start(tmp_path_factory.mktemp("pod"), key_folder, manifests.pod, manifests)
    try:
        probe = manifests.container["startupProbe"]["httpGet"]
        wait_for(lambda: pod.started() and pod.get(probe)[1].startswith("ok"), START_S)
        yield pod
    finally:
        pod.close()


def submit(pod: Pod, key_folder: Path, name: str, out: Path) -> subprocess.Popen[str]:
    """`submit` from elsewhere in the network, with the key of `name`."""
    return pod.inside(
        sys.executable, "scripts/submit.py", f"tcp://{ADDRESS}:{port_of(pod.spec, 'clients')}", IMAGES, "--out", out,
        "--no-overlays", "--server-key", key_folder / "server.key", "--key", key_folder / f"{name}.key_secret",
    )  # fmt: skip


def test_its_probes_hold(pod: Pod) -> None:
    [container] = pod.spec["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        status, body = pod.get(container[probe]["httpGet"])
        assert (status, body.splitlines()[0]) == (200, "ok"), pod.log


def test_prometheus_finds_its_metrics(pod: Pod) -> None:
    [endpoint] = Manifests("cpu").one("PodMonitor")["spec"]["podMetricsEndpoints"]
    status, body = pod.get(endpoint)
    assert status == 200
    names = set(re.findall(r"\nblendmaskd_\w+", body))
    pages = [(ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("kubernetes.md", "capacity.md")]
    asked = {f"\n{name}" for page in pages for name in re.findall(r"blendmaskd_\w+", page)}
    assert len(asked) >= 2
    assert asked <= names


def test_whoever_has_a_key_gets_answers(pod: Pod, key_folder: Path, tmp_path: Path) -> None:
    client = submit(pod, key_folder, "alice", tmp_path)
    output, _ = client.communicate(timeout=120)
    assert client.returncode == 0, output + pod.log
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2, 3, 4, 5, 6}


def test_another_key_gets_none(pod: Pod, key_folder: Path, tmp_path: Path) -> None:
    client = submit(pod, key_folder, "mallory", tmp_path)
    output, _ = client.communicate(timeout=120)
    assert client.returncode == 3, output


def test_it_has_no_rights_beyond_its_user(pod: Pod) -> None:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pod.main_pid}/status").read_text().splitlines())
    assert status["Uid"].split() == ["65532"] * 4
    assert status["NoNewPrivs"] == "1"
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {0}
    mounts = [line.split() for line in Path(f"/proc/{pod.main_pid}/mounts").read_text().splitlines()]
    assert [options.split(",")[0] for _, where, _, options, *_ in mounts if where == "/"][-1] == "ro"


def test_programs_in_the_container_find_the_daemon(pod: Pod) -> None:
    """`kubectl exec`: by the default endpoint."""
    with Client(f"ipc:///proc/{pod.main_pid}/root/run/blendmaskd/client.sock", timeout_s=20.0) as client:
        devices = client.stats()["devices"]
    assert {device["state"] for device in devices} == {"ready"}


def test_a_client_in_the_pod_shares_memory(pod: Pod) -> None:
    frames = """
import sys
from blendmaskd.client.blocking import Client
with Client(transport="shared", timeout_s=60) as client:
    print(len(client.segment(sys.argv[1]).detections))
"""
    image = "/opt/blendmaskd/configs/demo/images/0003.jpg"
    client = pod.beside("python", "-c", frames, image)
    output, _ = client.communicate(timeout=120)
    assert client.returncode == 0, output + pod.log
    assert int(output) > 0


def test_its_end_loses_no_job(key_folder: Path, tmp_path: Path, cpu_manifests: Manifests) -> None:
    spec = copy.deepcopy(cpu_manifests.pod)
    spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] = ["sleep", "0"]  # no Service waits here
    timed = {"BLENDMASKD__ENGINE": "timed", "BLENDMASKD__TIMED__LATENCY_MS": "{1: 1000}", "BLENDMASKD__BATCH": "1"}
    pod = start(tmp_path, key_folder, spec, cpu_manifests, **timed)
    try:
        wait_for(lambda: pod.started() and pod.get(spec["containers"][0]["startupProbe"]["httpGet"])[0] == 200, START_S)
        client = submit(pod, key_folder, "alice", tmp_path / "out")
        wait_for(lambda: accepted(pod) == 6)
        pod.terminate()
        output, _ = client.communicate(timeout=60)
        assert client.returncode == 0, output + pod.log
        assert pod.process.wait(timeout=60) == 0, pod.log
        assert "drained: every accepted job is answered" in pod.log
    finally:
        pod.close()


def accepted(pod: Pod) -> float:
    """Jobs so far, whatever became of them, by the metrics."""
    _, text = pod.get({"port": "metrics", "path": "/metrics"})
    names = ("blendmaskd_leased_jobs ", "blendmaskd_queue_jobs ", 'blendmaskd_jobs_total{outcome="answered"} ')
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(names))
