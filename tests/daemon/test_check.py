"""`blendmaskd check` on this host: green where it can serve, each fault told, a daemon of ours told from a stranger."""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_costs import as_another_user

from blendmaskd.check import endpoints, resources, trials
from blendmaskd.settings import Settings, from_tree
from blendmaskd.shell.spool import Spool
from checkout import ROOT, SOURCES

SAMPLES = ROOT / "tests" / "data" / "npu-smi"
DEMO = {"config": "configs/demo/demo.yaml", "weights": "configs/demo/model_final.pth"}
EMULATED = {"PYTHONPATH": f"{ROOT / 'tests' / 'emulated'}:{SOURCES}"}

Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Runs it with ``--json``: the report, with its exit code as ``rc``. Sections go over settings that are sound."""

    def run(environment: Mapping[str, str] | None = None, **settings: Any) -> dict[str, Any]:
        sound = {
            "devices": ["cpu:0", "cpu:1"],
            "engine": "timed",
            "endpoints": {"clients": [f"ipc://{tmp_path}/client.sock"], "metrics": None},
        }
        file = tmp_path / "daemon.yaml"
        file.write_text(yaml.safe_dump({**sound, **settings}))
        argv = [sys.executable, "-m", "blendmaskd", "check", "--settings", str(file), "--json"]
        done = subprocess.run(
            argv, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=120
        )
        assert done.stderr == ""
        report: dict[str, Any] = json.loads(done.stdout)
        return {**report, "rc": done.returncode}

    return run


def told(report: Mapping[str, Any], area: str) -> list[tuple[str, str]]:
    return [(line["level"], line["text"]) for line in report["findings"] if line["area"] == area]


@pytest.fixture
def npu_smi(tmp_path: Path) -> Callable[[Mapping[str, str]], dict[str, str]]:
    """Puts a program on PATH that answers as a sample does; returns that environment."""

    def install(answers: Mapping[str, str]) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir()
        lines = ["#!/bin/sh"]
        for number, (arguments, text) in enumerate(answers.items()):
            (folder / f"answer.{number}").write_text(text)
            lines.append(f'[ "$*" = "{arguments}" ] && exec cat "{folder}/answer.{number}"')
        (folder / "npu-smi").write_text("\n".join([*lines, "exit 1", ""]))
        (folder / "npu-smi").chmod(0o755)
        return {"PATH": f"{folder}:{os.environ['PATH']}"}

    return install


def test_a_cpu_host_is_green_in_a_few_lines(check: Check) -> None:
    report = check(engine="native", model=DEMO)
    assert (report["rc"], report["error"]) == (0, 0)
    assert len(report["findings"]) < 15
    [(level, text)] = told(report, "weights")
    assert level == "ok"
    assert text.startswith("configs/demo/model_final.pth: matches the config")
    assert [text.partition(",")[0] for _, text in told(report, "device")] == ["cpu:0: cpu", "cpu:1: cpu"]
    assert told(report, "versions")[0][0] == "ok"


def test_the_text_names_the_remedy(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "blendmaskd", "check", "--devices", "cpu:0", "--set", "engine=timed"]
    argv += ["--set", f"endpoints.clients=[ipc://{tmp_path}/{'x' * 120}]", "--set", "endpoints.metrics=null"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "error    endpoint     endpoints.clients: a path of" in done.stdout
    assert "-> use a shorter path" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("1 errors")


def test_settings_that_do_not_hold_are_the_only_line(check: Check) -> None:
    report = check(queue={"max_jobs": -1})
    assert report["rc"] == 1
    assert [(line["area"], line["text"]) for line in report["findings"]] == [
        ("settings", "queue.max_jobs = -1: Expected `int` >= 1")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ({**DEMO, "weights": "/nowhere.pth"}, "/nowhere.pth"),
        ({"config": "configs/BlendMask/R_50_1x.yaml", "weights": DEMO["weights"]}, "do not fit the network"),
    ],
)
def test_weights_that_do_not_fit_are_told(check: Check, model: dict[str, str], complaint: str) -> None:
    report = check(engine="native", model=model, devices=["cpu:0"])
    [(level, text)] = told(report, "weights")
    assert (report["rc"], level) == (1, "error")
    assert complaint in text


@pytest.mark.slow
def test_an_extra_that_the_engine_lacks_is_told(check: Check, tmp_path: Path) -> None:
    for name in ("propose.onnx", "blend.onnx"):
        (tmp_path / name).write_bytes(b"of another host")
    model = {**DEMO, "weights": str(tmp_path)}
    environment = {"PYTHONPATH": f"{ROOT / 'tests' / 'masked'}:{SOURCES}", "MASKED": "onnxruntime"}
    report = check(environment, engine="onnx", model=model, devices=["cpu:0"])
    [(level, text)] = told(report, "weights")
    assert (report["rc"], level) == (1, "error")
    assert "onnxruntime is not installed; it comes with the extra: pip install 'blendmaskd[onnx]'" in text


@pytest.mark.slow
def test_a_precision_that_the_device_lacks_is_told(check: Check) -> None:
    report = check(engine="native", model={**DEMO, "precision": "fp16"}, devices=["cpu:0"])
    assert any(level == "error" and "float16" in text for level, text in told(report, "device"))


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_whether_answers_are_exact_is_told(check: Check, exact: bool) -> None:
    report = check(engine="native", model={**DEMO, "exact": exact}, devices=["cpu:0"])
    [(level, text)] = told(report, "device")
    assert (report["rc"], level, text.endswith("fp32, exact")) == (0, "ok", exact)


def test_cpus_that_are_not_there_are_told(check: Check) -> None:
    report = check(devices=["cpu:0"], runtime={"cpus": {"cpu:0": "4000"}})
    assert report["rc"] == 1
    assert "CPUs 4000 are not available" in told(report, "cpus")[0][1]


def test_a_running_daemon_of_ours_is_told_from_a_stranger(check: Check, daemon: Any, tmp_path: Path) -> None:
    serving = daemon()
    metrics = serving.metrics_url.removeprefix("http://")
    report = check(endpoints={"clients": [serving.endpoint], "metrics": metrics})
    assert report["rc"] == 0
    pid = serving.process.pid
    assert told(report, "endpoint") == [
        ("ok", f"endpoints.clients: {serving.endpoint}: served by a running blendmaskd (pid {pid})"),
        ("ok", f"endpoints.metrics: {metrics}: served by a running blendmaskd (pid {pid})"),
    ]
    with socket.create_server(("127.0.0.1", 0)) as stranger, (tmp_path / "client.sock.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        port = stranger.getsockname()[1]
        report = check(endpoints={"clients": [f"ipc://{tmp_path}/client.sock"], "metrics": f"127.0.0.1:{port}"})
    assert report["rc"] == 1
    endpoints = told(report, "endpoint")
    assert [level for level, _ in endpoints] == ["error"] * 2
    assert all(f"(pid {os.getpid()})" in text for _, text in endpoints), endpoints


def test_only_the_devices_that_a_running_daemon_has_are_not_opened(check: Check, daemon: Any) -> None:
    serving = daemon(devices=["npu:0"])
    report = check(devices=["npu:0", "npu:1"], engine="native", model=DEMO, endpoints={"clients": [serving.endpoint]})
    found = [line for line in told(report, "device") if "npu-smi" not in line[1]]
    assert found == [
        ("ok", f"npu:0: not opened, it is in use by a running blendmaskd (pid {serving.process.pid})"),
        ("error", "npu:1: npu: torch_npu is not installed"),
    ]


def test_keys_and_spool_are_looked_at(check: Check, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "alice.key").write_text("no key\n")
    (tmp_path / "server.key_secret").write_text("no key\n")
    report = check(
        endpoints={"clients": ["tcp://127.0.0.1:0"], "metrics": None},
        curve={"server_key": f"{tmp_path}/server.key_secret", "client_keys": f"{tmp_path}/keys"},
        spool=f"{tmp_path}/nowhere/spool.db",
    )
    assert [level for level, _ in told(report, "keys")] == ["error"]
    assert told(report, "files") == [("error", f"spool: the folder of {tmp_path}/nowhere/spool.db does not exist")]
    assert told(check(spool=f"{tmp_path}/spool.db", spool_bytes=1 << 20), "files") == [
        ("ok", f"spool: {tmp_path}/spool.db")
    ]


def _of_another(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("PRAGMA application_id = 7; CREATE TABLE theirs (x)")


def _of_another_without_id(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")


def _a_spool(path: Path) -> None:
    spool = Spool(path, 1.0)
    spool.open()
    spool.close()


@pytest.mark.parametrize(("make", "reason"), [
    (Path.mkdir, "is not a file"), (os.mkfifo, "is not a file"),
    (lambda path: path.write_text("precious"), "is not a database"), (_of_another, "is a database of another program"),
    (_of_another_without_id, "is a database of another program"),
    (Path.touch, ""), (_a_spool, ""),
])  # fmt: skip
def test_what_is_in_the_place_of_the_spool_is_told(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    make(tmp_path / "spool")
    [facts] = resources.ask_spool(Settings(spool=f"{tmp_path}/spool"))
    assert facts.taken == reason


def test_the_rights_on_the_folder_of_the_socket_are_told(check: Check, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("needs a user other than root")
    (tmp_path / "shut").mkdir(mode=0o500)
    report = check(endpoints={"clients": [f"ipc://{tmp_path}/shut/client.sock"], "metrics": None})
    assert "this user cannot create" in told(report, "endpoint")[0][1]


def _asked(settings: Settings) -> list[list[Any]]:
    try:
        spools = [facts.folder_there for facts in resources.ask_spool(settings)]
        return [spools, [[facts.obstacle, facts.folder_usable] for facts in endpoints.ask(settings)]]
    except OSError as error:
        return [[str(error)]]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_a_folder_that_is_shut_to_this_user_does_not_end_the_check(tmp_path: Path) -> None:
    shut = tmp_path / "shut"
    (shut / "inside").mkdir(parents=True)
    shut.chmod(0o700)
    tree = {"endpoints": {"clients": [f"ipc://{shut}/inside/x.sock"], "metrics": None}, "spool": f"{shut}/inside/x.db"}
    settings = from_tree(tree)
    assert as_another_user(lambda: _asked(settings)) == [[False], [["", False]]]


@pytest.mark.slow
def test_emulated_npus_open_and_npu_smi_tells_their_health(check: Check, npu_smi: Any) -> None:
    row = "| 1     910B3               | "
    text = (SAMPLES / "info_910B3_8npu.txt").read_text().replace(f"{row}OK ", f"{row}Warning ")
    answers = {
        "info": text,
        "info -m": (SAMPLES / "info_m_910B3_mcu.txt").read_text(),
        "info -t topo": (SAMPLES / "constructed_topo_2npu_shared.txt").read_text(),
    }
    report = check(npu_smi(answers), engine="native", model=DEMO, devices=["npu:0", "npu:1"], worker_env=EMULATED)
    devices = told(report, "device")
    assert (report["rc"], devices[0][0]) == (0, "ok")
    assert devices[0][1].startswith("npu:0: ")
    assert devices[0][1].endswith("health OK, fp32")
    assert devices[1] == ("warning", "npu:1: 910B3, health Warning")
    assert [(level, text.rpartition(", ")[2]) for level, text in told(report, "cpus")] == [("ok", "near it")] * 2


@pytest.mark.slow
def test_an_npu_host_without_cann_and_card_says_what_is_missing(check: Check, npu_smi: Any) -> None:
    environment = npu_smi({"info": (SAMPLES / "info_910B3_8npu.txt").read_text()})
    report = check(environment, engine="native", model=DEMO, devices=["npu:0", "npu:9"])
    assert report["rc"] == 1
    assert ("error", "npu:9: npu-smi lists 8 devices, not this one") in told(report, "device")
    assert any("missing: " in text and "/dev/davinci9" in text for _, text in told(report, "permissions"))
    assert any("ASCEND_HOME_PATH is not set" in text for _, text in told(report, "versions"))


TRICKS = """
import os, runpy, subprocess, threading
from blendmaskd.probe import MARK

def chatter():
    while True:
        os.write(1, b"[INFO] RUNTIME(1,python): no end of line")
        os.write(2, b"[INFO] said on stderr\\n")

os.write(1, b"Warning: ASCEND_HOME_PATH environment variable is not set.\\n")  # torch_npu's own words, on stdout
os.write(1, b"\\xff\\xfe\\0\\x1b[31m" + b"x" * 3_000_000 + b"\\n")
os.write(1, MARK.encode() + b'{"name": \\n' + MARK.encode() + b"[1]\\n" + MARK.encode())
threading.Thread(target=chatter, daemon=True).start()
subprocess.Popen(["sleep", "20"])  # as CANN's compiler leaves processes behind, with the same stdout
runpy.run_path(os.environ["EMULATION"])
"""


@pytest.mark.slow
def test_whatever_is_printed_the_device_s_answer_is_found(check: Check, npu_smi: Any, tmp_path: Path) -> None:
    (tmp_path / "tricks").mkdir()
    (tmp_path / "tricks" / "sitecustomize.py").write_text(TRICKS)
    variables = {"PYTHONPATH": f"{tmp_path / 'tricks'}:{SOURCES}", "PYTHONUNBUFFERED": "1",
                 "EMULATION": str(ROOT / "tests" / "emulated" / "sitecustomize.py")}  # fmt: skip
    report = check(npu_smi({}), engine="native", model=DEMO, devices=["npu:0"], worker_env=variables)
    assert any(level == "ok" or "npu-smi does not answer" in text for level, text in told(report, "device"))
    assert not [line for line in told(report, "device") if line[0] == "error"]


LOADING = """Traceback (most recent call last):
  File "/p.py", line 1, in <module>
    import torch, torch_npu
  File "/torch_npu/_init/registry/registry_manager.py", line 23, in _cann_package_check
    raise Exception(f"ASCEND_HOME_PATH : {ascend_home_path} does not exist. "
Exception: ASCEND_HOME_PATH : /nowhere does not exist. Please run 'source set_env.sh'.
[ERROR] 2026-11-29-02:30:23 (PID:9776, Device:-1, RankID:-1) ERR00008 PTA resource not found"""


SAID = {
    "Exception: ASCEND_HOME_PATH : /nowhere does not exist. Please run 'source set_env.sh'.": LOADING,
    "model.weights is not set":
        "/x.py:3: UserWarning: old\n  warnings.warn()\n[W1129 x.cpp:1] hm\nmodel.weights is not set\n",
    "RuntimeError: a": "RuntimeError: a[ERROR] 2026-11-29 (PID:1) ERR00100 PTA call acl api failed\n[INFO] later\n",
    "ValueError: the second": LOADING.replace("[ERROR]", "\nTraceback (most recent call last):\n  File\n"
                                              "ValueError: the second\n[ERROR]"),
    "Fatal Python error: Aborted": "Fatal Python error: Aborted\n\nCurrent thread 0x1\n  File a\n",
    "[INFO] logs": "[INFO] only\n[INFO] logs\n",
    "it printed nothing": "\n \n",
    "bad [31m    end": "bad\x1b[31m\0 \udcff end\n",
    "x" * 400: "x" * 9999,
}  # fmt: skip


@pytest.mark.parametrize(("said", "stderr"), SAID.items())
def test_the_line_that_says_why_is_shown(said: str, stderr: str) -> None:
    assert trials.what_it_said(stderr) == said


def test_what_a_launch_plan_warns_of_is_told_once(check: Check, npu_smi: Any) -> None:
    environment = {**npu_smi({}), "ASCEND_LAUNCH_BLOCKING": "1", "LD_PRELOAD": ""}
    settings = {"engine": "native", "model": DEMO, "devices": ["npu:0"], "worker_env": {**EMULATED, "LD_PRELOAD": ""}}
    report = check(environment, **settings)
    warnings = [text for level, text in told(report, "device") if level == "warning"]
    assert warnings.count("npu:0: ASCEND_LAUNCH_BLOCKING turns the task queue off") == 1
    assert told(report, "allocator") == [("ok", "worker_env sets LD_PRELOAD")]


def test_a_device_that_the_environment_hides_is_told(check: Check, npu_smi: Any) -> None:
    environment = {**npu_smi({}), "ASCEND_RT_VISIBLE_DEVICES": ""}
    report = check(environment, engine="native", model=DEMO, devices=["npu:0"])
    assert told(report, "device") == [("error", "npu:0: not visible, ASCEND_RT_VISIBLE_DEVICES=")]
