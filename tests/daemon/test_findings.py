"""Planted faults: each line that `blendmaskd check` can complain with, and that sound facts bring no complaint."""
from __future__ import annotations

import ast
import errno
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from blendmaskd import check
from blendmaskd.ascend import Card
from blendmaskd.check import cpus, devices, endpoints, front, resources, software
from blendmaskd.check.devices import DeviceFacts, NodeFacts
from blendmaskd.check.endpoints import EndpointFacts, Holder, TcpFacts
from blendmaskd.check.finding import Finding, as_tree
from blendmaskd.check.resources import LimitFacts, SpoolFacts
from blendmaskd.check.software import VersionFacts
from blendmaskd.core.launch_plan import Preload
from blendmaskd.probe import Cause, Probe

OPENED = Probe(name="Ascend910B3", memory_bytes=64 << 30, bf16=True)


def npu(precision: str = "fp32", exact: bool = False, **facts: Any) -> list[Finding]:
    sound = {"device": "npu:1", "tool": "npu-smi", "cards": 8, "card": Card("910B3", "OK"), "probe": OPENED}
    return devices.judge(DeviceFacts(**{**sound, **facts}), precision, exact)


def broken(error: str, cause: Cause | None = None) -> list[Finding]:
    return npu(probe=Probe(error=error, cause=cause))


def nodes(opened: bool = False, user: str = "alice", **facts: Any) -> list[Finding]:
    sound = {"path": "/dev/davinci1", "there": True, "usable": True, "group": "HwHiAiUser", "member": True}
    return devices.judge_nodes([NodeFacts(**{**sound, **facts})], opened, user)


def kernels(*folders: str, chip: str = "Ascend910B3", cann_home: str = "/cann") -> list[Finding]:
    return software.judge_kernels(VersionFacts(python="3.11.7", cann_home=cann_home, kernels=list(folders)), [chip])


def versions(**facts: Any) -> list[Finding]:
    sound = {"python": "3.11.7", "torch": "2.9.0", "torch_npu": "2.9.0", "machine": "aarch64", "cann": "8.5.0",
             "cann_home": "/usr/local/Ascend/cann", "driver": "25.3.rc1", "firmware": "7.8.0.2.212",
             "firmware_ranges": [("7.0.0", "8.9.9")]}  # fmt: skip
    return software.judge_versions(VersionFacts(**{**sound, **facts}), npu=True)


def allocator(choice: str = "auto", path: str | None = None, complaint: str = "", reason: str = "not installed",
              apt: bool = False, dnf: bool = False) -> list[Finding]:  # fmt: skip
    preload = None if complaint else Preload(path, "" if path else reason)
    return software.judge_allocator(choice, preload, complaint, apt, dnf)


def ipc(path: str = "/run/user/1/bmd.sock", **facts: Any) -> list[Finding]:
    return endpoints.judge(EndpointFacts(setting="endpoints.clients", endpoint=f"ipc://{path}", **facts))


def http(**facts: Any) -> list[Finding]:
    place = EndpointFacts(setting="http.endpoint", endpoint="0.0.0.0:9466")
    return front.judge_front(front.FrontFacts(**{"endpoint": place, "local": True, **facts}))[1:]


def tcp(**facts: Any) -> list[Finding]:
    return endpoints.judge(EndpointFacts(setting="endpoints.metrics", endpoint="127.0.0.1:9464", **facts))


def folder(**facts: Any) -> list[Finding]:
    return resources.judge_root(**{"path": "/data", "there": True, "usable": True, **facts})


def spool(**facts: Any) -> list[Finding]:
    sound = {"path": "/var/s.db", "free_bytes": 8 << 30, "may_take_bytes": 4 << 30}
    return resources.judge_spool(SpoolFacts(**{**sound, **facts}))


def keys(**facts: Any) -> list[Finding]:
    return endpoints.judge_keys(TcpFacts(**{"client_keys": "/keys", "names": ("alice",), **facts}))


def limits(**facts: Any) -> list[Finding]:
    sound = {"files": 1024, "hard_files": 1 << 20, "locked_bytes": None, "available_bytes": 8 << 30,
             "promised_bytes": 2 << 30}  # fmt: skip
    return resources.judge_limits(LimitFacts(**{**sound, **facts}))


TWO = {"npu:0": (0, 1), "npu:1": (2, 3)}

Case = tuple[str, Callable[[], list[Finding]], str, str, str]  # name, finding, level, text, remedy

FAULTS: list[Case] = [
    ("hidden", lambda: npu(hidden="npu:1: not visible, ASCEND_RT_VISIBLE_DEVICES=4"), "error", "npu:1: not visible",
     "change ASCEND_RT_VISIBLE_DEVICES"),
    ("no tool", lambda: npu(cards=None, card=None), "warning", "npu:1: npu-smi does not answer", "driver installed"),
    ("no such card", lambda: npu(cards=1, card=None), "error", "npu:1: npu-smi lists 1 devices, not this one", "lspci"),
    ("unwell", lambda: npu(card=Card("910B3", "Warning")), "warning", "npu:1: 910B3, health Warning", "-t health"),
    ("sick", lambda: npu(card=Card("910B3", "Alarm")), "error", "npu:1: 910B3, health Alarm", "reset or a reboot"),
    ("in use", lambda: npu(users=((139667, "python"),)), "warning", r"npu:1: in use by pid 139667 \(python\)", "stop"),
    ("not as wanted", lambda: npu(probe=Probe(differences=("preload: wanted /x, is None",))), "warning",
     "npu:1: preload: wanted /x, is None", "troubleshooting"),
    ("plan", lambda: devices.judge_plans(["npu:0: ASCEND_LAUNCH_BLOCKING turns the task queue off"]), "warning",
     "turns the task queue off", "runtime"),
    ("no bf16", lambda: npu("bf16", probe=Probe(name="Ascend910A", bf16=False)), "error",
     "Ascend910A does not compute in bfloat16", "fp16"),
    ("no CANN here", lambda: broken("torch_npu cannot be loaded: libhccl.so", Cause.NO_CANN), "error",
     "npu:1: torch_npu cannot be loaded: libhccl.so", "source CANN's set_env.sh"),
    ("no torch_npu", lambda: broken("no torch_npu", Cause.NO_TORCH_NPU), "error", "npu:1: no torch_npu",
     "pip install the torch_npu"),
    ("not the extra", lambda: broken("no torch", Cause.NO_PACKAGE), "error", "npu:1: no torch", r"blendmaskd\[serve\]"),
    ("not visible", lambda: broken("none here", Cause.NOT_VISIBLE), "error", "npu:1: none here", "permissions"),
    ("precision", lambda: broken("no float16", Cause.PRECISION), "error", "npu:1: no float16", "auto"),
    ("anything else", lambda: broken("is CANN's set_env.sh sourced? 507033"), "error", "507033", "troubleshooting"),
    ("no node", lambda: nodes(there=False), "error", "missing: /dev/davinci1", "driver"),
    ("shut node", lambda: nodes(usable=False, member=False), "error",
     r"/dev/davinci1: alice may not use it \(group HwHiAiUser\)", "usermod --append --groups HwHiAiUser alice"),
    ("shut node in a container", lambda: nodes(usable=False, member=False, user="65532"), "error",
     "65532 may not use it", "supplementalGroups"),
    ("old login", lambda: nodes(usable=False, member=True), "error", "may not use it", "log in again"),
    ("service shut out", lambda: nodes(opened=True, service_may=False), "error",
     "blendmaskd is not in the group HwHiAiUser", "usermod --append --groups HwHiAiUser blendmaskd"),
    ("no torch", lambda: versions(torch=""), "error", "torch is not installed", r"blendmaskd\[serve\]"),
    ("no torch_npu package", lambda: versions(torch_npu=""), "warning", "torch_npu is not installed", "deployment"),
    ("wrong pair", lambda: versions(torch="2.8.0"), "error", "torch_npu 2.9.0 needs torch 2.9.0, this is 2.8.0",
     "pip install torch==2.9.0"),
    ("CUDA build", lambda: versions(torch="2.9.0+cu130", machine="x86_64"), "error", "is the CUDA build", "CPU"),
    ("CANN not sourced", lambda: versions(cann_home="", cann="", set_env="/usr/local/Ascend/cann/set_env.sh"),
     "warning", "CANN is installed, but not in this environment", "source /usr/local/Ascend/cann/set_env.sh"),
    ("no CANN", lambda: versions(cann_home="", cann=""), "warning", "no CANN was found", "install CANN"),
    ("CANN untold", lambda: versions(cann=""), "warning", "does not contain the version",
     "ascend_toolkit_install.info"),
    ("old CANN", lambda: versions(cann="8.3.RC1"), "warning",
     "torch_npu 2.9.0 is known to work with CANN 8.5.0 to 9.1.0; 8.3.RC1 is older", "matching"),
    ("new CANN", lambda: versions(cann="9.2.0"), "warning", "9.2.0 is newer", "matching"),
    ("new CANN for an old torch_npu", lambda: versions(torch="2.6.0", torch_npu="2.6.0"), "warning",
     "is known to work with CANN 8.2.RC1; 8.5.0 is newer", "matching"),
    ("toolkit alone", lambda: kernels(), "warning", "no operators for Ascend910B3, none in", "ops package"),
    ("another chip's ops", lambda: kernels("ascend910", "ascend310p"), "warning",
     "no operators for Ascend910B3, only those of ascend910, ascend310p in", "ops package"),
    ("firmware", lambda: versions(firmware="6.4.12"), "warning",
     "driver 25.3.rc1 works with firmware 7.0.0 to 8.9.9; this is 6.4.12", "firmware"),
    ("required tcmalloc", lambda: allocator("required", complaint="runtime.preload = required: missing", dnf=True),
     "error", "required: missing", "dnf install gperftools-libs"),
    ("no tcmalloc, apt", lambda: allocator(apt=True), "warning", "tcmalloc is not installed",
     "apt-get install libtcmalloc-minimal4"),
    ("no tcmalloc", lambda: allocator(), "warning", "tcmalloc is not installed", "Debian: .*; openEuler: "),
    ("no such CPUs", lambda: cpus.judge_complaint("runtime.cpus.npu:0 = '4000': CPUs 4000 are not available"), "error",
     "4000 are not available", "CPUs in this list"),
    ("shared CPUs", lambda: cpus.judge({"npu:0": (0, 1), "npu:1": (1, 2)}, {}, (), hinted=False), "warning",
     "npu:0: CPUs 0-1, shared with npu:1", "more CPUs"),
    ("unknown place", lambda: cpus.judge(TWO, {}, (), hinted=True), "warning", "unknown which are near it",
     "runtime.cpus"),
    ("governor", lambda: cpus.judge_governors([0, 1]), "warning", "powersave on CPUs 0-1",
     "cpupower"),
    ("socket taken", lambda: ipc(holder=Holder(pid=7, command="other")), "error", r"taken by other \(pid 7\)", "stop"),
    ("socket taken by who knows", lambda: ipc(holder=Holder()), "error", "taken by another process", "stop"),
    ("long path", lambda: ipc("/" + "x" * 107), "error", "a path of 108 bytes, at most 107 are possible", "shorter"),
    ("no room for .fd", lambda: ipc("/" + "x" * 104), "warning", "no room for .fd: no shared memory", "shorter"),
    ("shut folder", lambda: ipc(folder_usable=False), "error", "this user cannot create /run/user/1/bmd.sock", "--set"),
    ("a file at the endpoint", lambda: ipc(obstacle="/x.sock is a file"), "error", "/x.sock is a file", "stop or move"),
    ("port taken", lambda: tcp(bind_errno=errno.EADDRINUSE), "error", "taken by another process", "another"),
    ("port of another endpoint", lambda: tcp(obstacle="another endpoint of these settings"), "error",
     "127.0.0.1:9464: taken by another endpoint of these settings", "choose another"),
    ("low port", lambda: tcp(bind_errno=errno.EACCES), "error", "below 1024", "above 1023"),
    ("not our address", lambda: tcp(bind_errno=errno.EADDRNOTAVAIL), "error", "no such address", "ip address"),
    ("other errors", lambda: tcp(bind_errno=errno.EAFNOSUPPORT), "error", "not supported", "another"),
    ("no folder", lambda: folder(there=False), "error", "paths.roots: /data does not exist", "create it"),
    ("shut file", lambda: folder(usable=False), "error", "cannot be read by this user", "chmod"),
    ("no spool folder", lambda: spool(folder_there=False), "error", "the folder of /var/s.db does not exist",
     "create it"),
    ("no spool", lambda: spool(taken="is not a file"), "error", "/var/s.db is not a file", "another file"),
    ("shut spool", lambda: spool(writable=False), "error", "this user cannot write /var/s.db", "chown"),
    ("spool on a network", lambda: spool(network="nfs4"), "warning", "/var/s.db is on nfs4", "local disk"),
    ("little disk", lambda: spool(free_bytes=1 << 30), "warning", "may take 4.0 GiB, 1.0 GiB are free", "spool_bytes"),
    ("unusable tokens", lambda: http(tokens_problem="/t: mode 0644"), "error", "/t: mode 0644", "http.md"),
    ("no tokens in the file", lambda: http(tokens=0), "warning", "nobody may ask", "http.md"),
    ("a public front without tokens", lambda: http(local=False, encrypted=True), "error", "without tokens",
     "http.tokens"),
    ("a public front for all", lambda: http(local=False, encrypted=True, insecure=True), "warning", "http.insecure",
     "http.tokens"),
    ("a certificate that cannot be used", lambda: http(certificate_problem="c.pem: no"), "error", "c.pem: no", "PEM"),
    ("a public front without TLS", lambda: http(local=False, insecure=True)[1:], "warning", "unencrypted",
     "http.certificate"),
    ("no private folder", lambda: endpoints.judge_private_folder("TMPDIR=/x: too long"), "error", "too long",
     "troubleshooting"),
    ("insecure tcp", lambda: keys(insecure=True), "warning", "insecure_tcp", "blendmaskd-keys"),
    ("server key", lambda: keys(server_key="/k: has mode 0644"), "error", "curve.server_key: /k: has mode", "keys"),
    ("no key folder", lambda: keys(folder_there=False), "error", "curve.client_keys: /keys does not exist", "keys"),
    ("no client keys", lambda: keys(names=()), "warning", "/keys holds no keys", "blendmaskd-keys client"),
    ("a file that is no key", lambda: keys(complaints=("/keys/a.key: no",)), "warning", "/keys/a.key: no", "fix"),
    ("open metrics", lambda: tcp(open_to_all=True), "warning", "open to anyone who can reach the port", "127.0.0.1"),
    ("weights", lambda: resources.judge_weights("native", "a.pth", "a.pth: no key backbone", 0), "error", "no key",
     "network"),
    ("no exported files", lambda: resources.judge_weights("onnx", "a", "a/blend.onnx: cannot be read", 0), "error",
     "cannot be read", "docs/onnx.md"),
    ("no weights", lambda: resources.judge_weights("native", None, "model.weights is not set", 0), "error", "not set",
     "--set"),
    ("few files", lambda: limits(files=256), "warning", "256 open files: 96 clients, 24 with shared memory",
     "ulimit -n 65536"),
    ("few files for a flood", lambda: limits(hard_files=1024), "warning",
     "connects very often can end the daemon", "a hard limit of 2984 or more"),
    ("too few threads to start", lambda: limits(threads=15), "error", "at most 15 threads can be", "pids.max"),
    ("too few files to start", lambda: limits(hard_files=63), "error", "at most 63 files may be open", "ulimit -Hn"),
    ("little memory", lambda: limits(available_bytes=1 << 30), "warning", "may take 2.0 GiB, 1.0 GiB are", "max_bytes"),
    ("root", lambda: devices.judge_identity(is_root=True, has_service=True), "warning", "runs as root",
     "runuser"),
]  # fmt: skip

SOUND: list[tuple[str, Callable[[], list[Finding]], str]] = [
    ("device", npu, "npu:1: Ascend910B3, 64 GiB, health OK, fp32"),
    ("bf16", lambda: npu("bf16"), "npu:1: Ascend910B3, 64 GiB, health OK, bf16"),
    ("exact", lambda: npu(exact=True), "npu:1: Ascend910B3, 64 GiB, health OK, fp32, exact"),
    ("bf16 untold", lambda: npu("bf16", probe=Probe(name="x", memory_bytes=1 << 30)),
     "npu:1: x, 1 GiB, health OK, bf16"),
    ("auto", lambda: npu("auto", probe=Probe(name="cpu", memory_bytes=1 << 30, chosen="bfloat16: it takes 0.5")),
     "npu:1: cpu, 1 GiB, health OK, auto (bfloat16: it takes 0.5)"),
    ("ours", lambda: npu(probe=None, untried="it is in use by a running blendmaskd (pid 9)"),
     "npu:1: not opened, it is in use by a running blendmaskd (pid 9)"),
    ("nodes", lambda: nodes(opened=True), "device nodes"),
    ("service", lambda: nodes(opened=True, service_may=True), "device nodes"),
    ("versions", versions,
     "Python 3.11.7, torch 2.9.0, torch_npu 2.9.0, CANN 8.5.0, driver 25.3.rc1, firmware 7.8.0.2.212"),
    ("a pair not in the table", lambda: versions(torch="2.13.0", torch_npu="2.13.0", cann="9.2.0"),
     ("Python 3.11.7, torch 2.13.0, torch_npu 2.13.0, CANN 9.2.0, driver 25.3.rc1, firmware 7.8.0.2.212, "
      "whether torch_npu 2.13.0 works with this CANN is not known here")),
    ("within the range", lambda: versions(cann="9.1.0"),
     "Python 3.11.7, torch 2.9.0, torch_npu 2.9.0, CANN 9.1.0, driver 25.3.rc1, firmware 7.8.0.2.212"),
    ("off", lambda: allocator("off", reason="runtime.preload is off"), "runtime.preload is off"),
    ("jemalloc", lambda: allocator(reason="LD_PRELOAD already names libjemalloc.so"),
     "LD_PRELOAD already names libjemalloc.so"),
    ("cuda", lambda: npu(device="cuda:0", tool="nvidia-smi", card=Card("H100", "")),
     "cuda:0: Ascend910B3, 64 GiB, fp32"),
    ("tcmalloc", lambda: allocator(path="/usr/lib64/libtcmalloc.so.4"), "/usr/lib64/libtcmalloc.so.4"),
    ("near", lambda: cpus.judge({"npu:0": (2, 3)}, {"npu:0": (2, 3, 4)}, (), hinted=True),
     "npu:0: CPUs 2-3, near it"),
    ("placed", lambda: cpus.judge({"npu:0": (2,)}, {}, ["npu:0"], hinted=True),
     "npu:0: CPUs 2, by runtime.cpus"),
    ("our socket", lambda: ipc(holder=Holder(pid=9, command="python", ours=True)),
     "endpoints.clients: ipc:///run/user/1/bmd.sock: served by a running blendmaskd (pid 9)"),
    ("by systemd", lambda: ipc("/run/blendmaskd/client.sock", folder_usable=False, by_systemd=True),
     "endpoints.clients: ipc:///run/blendmaskd/client.sock: systemd creates the folder when the service starts"),
    ("tokens", lambda: http(tokens=2), "http.tokens: 2 clients may ask"),
    ("hidden tokens", lambda: http(hidden=True, local=False, encrypted=True),
     "http.tokens: those in a file that is the front's alone may ask"),
    ("free", tcp, "endpoints.metrics: 127.0.0.1:9464: free"),
    ("folder", folder, "paths.roots: /data"),
    ("spool", spool, "spool: /var/s.db"),
    ("keys", keys, "1 clients may connect by tcp"),
    ("weights", lambda: resources.judge_weights("native", "a.pth", None, 1.25),
     "a.pth: matches the config, loaded in 1.2 s"),
    ("no weights needed", lambda: resources.judge_weights("timed", None, None, 0), "not needed by the engine timed"),
    ("limits", limits, "1024 open files: 480 clients, 120 with shared memory; locked memory: no limit"),
]  # fmt: skip


@pytest.mark.parametrize("case", FAULTS, ids=[case[0] for case in FAULTS])
def test_a_planted_fault_is_told_with_its_remedy(case: Case) -> None:
    _, judge, level, text, remedy = case
    found = [finding for finding in judge() if finding.level != "ok"]
    assert found
    assert (found[0].level, bool(found[0].area)) == (level, True)
    assert re.search(text, found[0].text), found[0].text
    assert re.search(remedy, found[0].remedy), found[0].remedy


@pytest.mark.parametrize(("name", "judge", "text"), SOUND, ids=[case[0] for case in SOUND])
def test_what_is_sound_is_told_in_a_line(name: str, judge: Callable[[], list[Finding]], text: str) -> None:
    assert [(finding.level, finding.text, finding.remedy) for finding in judge()] == [("ok", text, "")]


def test_what_does_not_concern_these_settings_is_not_told() -> None:
    assert cpus.judge_governors([]) == []
    assert cpus.judge_complaint("") == []
    assert endpoints.judge_private_folder("") == []
    assert devices.judge_identity(is_root=True, has_service=False) == []
    assert devices.judge_identity(is_root=False, has_service=True) == []
    emulated = NodeFacts(path="/dev/davinci0", there=False)
    assert devices.judge_nodes([emulated], opened=True, user="alice") == []
    [line] = software.judge_versions(VersionFacts(python="3.11.7", torch="2.13.0+cpu"), npu=False)
    assert (line.level, line.text) == ("ok", "Python 3.11.7, torch 2.13.0+cpu")


def test_every_complaint_is_among_the_planted_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    sites: set[tuple[str, int]] = set()
    seen: set[tuple[str, int]] = set()

    def recording(make: Callable[..., Finding]) -> Callable[..., Finding]:
        def record(*arguments: str) -> Finding:
            caller = sys._getframe(1)
            seen.add((caller.f_globals["__name__"], caller.f_lineno))
            return make(*arguments)

        return record

    for name in (module.name for module in pkgutil.iter_modules(check.__path__, "blendmaskd.check.")):
        judging = importlib.import_module(name)
        calls = [node for node in ast.walk(ast.parse(inspect.getsource(judging))) if isinstance(node, ast.Call)]
        named = [call for call in calls if isinstance(call.func, ast.Name)]
        sites |= {(name, call.lineno) for call in named if call.func.id in ("warning", "error")}
        for maker in ("warning", "error"):
            if hasattr(judging, maker):
                monkeypatch.setattr(judging, maker, recording(getattr(judging, maker)))
    for _, judge, *_ in FAULTS:
        judge()
    assert seen == sites


def test_every_cause_has_a_remedy() -> None:
    assert set(devices.REMEDIES) == {None, *Cause}


def test_the_report_counts() -> None:
    tree = as_tree([*npu(), *tcp(bind_errno=errno.EACCES), *allocator()])
    assert (tree["ok"], tree["warning"], tree["error"]) == (1, 1, 1)
    assert tree["findings"][1] == {
        "area": "endpoint", "level": "error", "remedy": "choose a port above 1023",
        "text": "endpoints.metrics: 127.0.0.1:9464: a port below 1024 needs privileges",
    }  # fmt: skip


def test_operators_that_are_there_or_whose_chip_is_not_known_are_no_finding() -> None:
    for chip, folder in {"Ascend910A": "ascend910", "Ascend910ProB": "ascend910", "Ascend910B": "ascend910",
                         "Ascend910B4-1": "ascend910b", "910B3": "ascend910b", "Ascend910_9391": "ascend910_93",
                         "Ascend310P3": "ascend310p", "310P3": "ascend310p"}.items():  # fmt: skip
        assert kernels(folder, chip=chip) == []
        assert kernels("ascend031", chip=chip) != []
    for unknown in ("Ascend910", "Ascend950", "xxx", "", "Ascend910-emulated physical 0"):
        assert kernels(chip=unknown) == []
    assert kernels(cann_home="") == []
