"""CPU sets: parsers over what real tools print, the plan's rules, and discovery on a host made of files."""
from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blendmaskd import discovery, topology
from blendmaskd.topology import HostError, plan_cpus

Tools = Callable[[str, Mapping[str, str]], dict[str, str]]
SAMPLES = Path(__file__).parents[1] / "data" / "npu-smi"

# ---------------------------------------------------------------------------------------------------- CPU lists


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0-3,8\n", (0, 1, 2, 3, 8)),
        ("7", (7,)),
        ("144-147", (144, 145, 146, 147)),
        ("2,0-1,1", (0, 1, 2)),
        ("", ()),
        ("NA", ()),
        ("3-1", ()),
        ("0-3,x", ()),
        ("0-99999999999", ()),  # counted out it would take all memory
        ("9" * 5000, ()),
    ],
)
def test_cpu_lists_are_read(text: str, cpus: tuple[int, ...]) -> None:
    assert topology.parse_cpus(text) == cpus


@given(st.sets(st.integers(0, 300)))
def test_cpu_lists_are_written_as_they_are_read(cpus: set[int]) -> None:
    assert topology.parse_cpus(topology.format_cpus(cpus)) == tuple(sorted(cpus))


def test_cpu_lists_are_written_in_ranges() -> None:
    assert topology.format_cpus([8, 0, 1, 2, 3, 10, 11]) == "0-3,8,10-11"


# ---------------------------------------------------------------------------------------------------- npu-smi


def sample(name: str) -> str:
    return (SAMPLES / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    ("name", "chips"),
    [
        ("info_m_910A", {i: (i, 0) for i in range(8)}),
        ("info_m_910B3_mcu", {0: (0, 0), 1: (1, 0)}),
        ("info_m_npuid4_logic0", {0: (4, 0)}),
        ("constructed_info_m_A3_phyid", {0: (0, 0), 1: (0, 1)}),
        ("constructed_info_m_no_logic_id", {0: (0, 0), 1: (1, 0)}),
        ("info_910B3_8npu", {}),
    ],
)
def test_npu_smi_maps_logic_ids_to_chips(name: str, chips: dict[int, tuple[int, int]]) -> None:
    assert topology.parse_npu_map(sample(name)) == chips


@pytest.mark.parametrize(
    ("name", "buses"),
    [
        ("info_910A_8npu_procs", ["c1", "81", "41", "01", "c2", "82", "42", "02"]),
        ("info_910B3_8npu", ["c1", "c2", "81", "82", "01", "02", "41", "42"]),
    ],
)
def test_npu_smi_tells_pci_addresses(name: str, buses: list[str]) -> None:
    expected = {(npu, 0): f"0000:{bus}:00.0" for npu, bus in enumerate(buses)}
    assert topology.parse_npu_addresses(sample(name)) == expected


@pytest.mark.parametrize("name", ["info_A3_Ascend910_dualdie_excerpt", "info_A3_Ascend910_dualdie_v25_excerpt"])
def test_both_dies_of_an_a3_card_have_their_address(name: str) -> None:
    assert topology.parse_npu_addresses(sample(name)) == {(0, 0): "0000:9d:00.0", (0, 1): "0000:9f:00.0"}


def test_npu_smi_tells_cpu_affinity() -> None:
    near = topology.parse_npu_affinity(sample("topo_910B3_8npu"))
    ranges = ["144-167", "144-167", "96-119", "96-119", "0-23", "0-23", "48-71", "48-71"]
    assert {i: topology.format_cpus(cpus) for i, cpus in near.items()} == dict(enumerate(ranges))


def test_cpu_affinity_is_read_beside_network_cards_and_left_out_where_it_is_unknown() -> None:
    near = topology.parse_npu_affinity(sample("constructed_topo_nic_and_na"))
    assert {i: topology.format_cpus(cpus) for i, cpus in near.items()} == {0: "0-23,96-119"}


@pytest.mark.parametrize("name", ["topo_A3_phyid_nocpu_excerpt", "info_m_910A"])
def test_no_affinity_column_tells_nothing(name: str) -> None:
    assert topology.parse_npu_affinity(sample(name)) == {}


@pytest.mark.parametrize(
    "parse", [topology.parse_npu_map, topology.parse_npu_addresses, topology.parse_npu_affinity,
              topology.parse_cuda_addresses]
)
@pytest.mark.parametrize("text", ["", "\n", "dcmi module initialize failed. ret is -8005\n", "|||\n| 1 |\n"])
def test_a_tool_that_prints_something_else_tells_nothing(
    parse: Callable[[str], Mapping[object, object]], text: str
) -> None:
    assert parse(text) == {}


def test_nvidia_smi_tells_addresses_by_index_and_uuid() -> None:
    text = "0, GPU-0b1c, 00000000:1B:00.0\n1, GPU-77aa, 00000001:43:00.0\n"
    expected = {"0": "0000:1b:00.0", "GPU-0b1c": "0000:1b:00.0", "1": "0001:43:00.0", "GPU-77aa": "0001:43:00.0"}
    assert topology.parse_cuda_addresses(text) == expected


# ---------------------------------------------------------------------------------------------------- the plan

TWO = ["npu:0", "npu:1"]


def ranges(plan: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    return {device: topology.format_cpus(cpus) for device, cpus in plan.items()}


def test_devices_get_the_cpus_near_them() -> None:
    near = topology.parse_npu_affinity(sample("constructed_topo_2npu_sys"))
    plan = plan_cpus(TWO, {}, range(96), {f"npu:{i}": cpus for i, cpus in near.items()})
    assert ranges(plan) == {"npu:0": "0-23", "npu:1": "48-71"}


def test_devices_near_the_same_cpus_split_them() -> None:
    near = topology.parse_npu_affinity(sample("constructed_topo_2npu_shared"))
    plan = plan_cpus(TWO, {}, range(96), {f"npu:{i}": cpus for i, cpus in near.items()})
    assert ranges(plan) == {"npu:0": "0-15", "npu:1": "16-31"}


def test_only_available_cpus_are_given() -> None:
    near = {"npu:0": range(24), "npu:1": range(48, 72)}
    plan = plan_cpus(TWO, {}, [*range(4, 12), *range(50, 60)], near)
    assert ranges(plan) == {"npu:0": "4-11", "npu:1": "50-59"}


def test_unknown_devices_split_what_is_available() -> None:
    assert ranges(plan_cpus(["cpu:0", "cpu:1"], {}, range(7), {})) == {"cpu:0": "0-2", "cpu:1": "3-6"}


def test_near_cpus_that_are_not_available_count_as_unknown() -> None:
    near = {"npu:0": range(24), "npu:1": range(48, 72)}
    assert ranges(plan_cpus(TWO, {}, range(8), near)) == {"npu:0": "0-3", "npu:1": "4-7"}


def test_a_device_of_unknown_place_gets_cpus_that_are_near_no_other() -> None:
    plan = plan_cpus(["npu:0", "cpu:0"], {}, range(8), {"npu:0": range(2)})
    assert ranges(plan) == {"npu:0": "0-1", "cpu:0": "2-7"}


def test_overlapping_ranges_are_split_as_one() -> None:
    plan = plan_cpus(TWO, {}, range(8), {"npu:0": range(6), "npu:1": range(4, 8)})
    assert ranges(plan) == {"npu:0": "0-3", "npu:1": "4-7"}


def test_hyperthreads_stay_together() -> None:
    cores = [(i, i + 4) for i in range(4)]
    assert ranges(plan_cpus(TWO, {}, range(8), {}, cores)) == {"npu:0": "0-1,4-5", "npu:1": "2-3,6-7"}


def test_hyperthreads_are_parted_only_where_cores_are_fewer_than_devices() -> None:
    assert ranges(plan_cpus(TWO, {}, [0, 1], {}, [(0, 1)])) == {"npu:0": "0", "npu:1": "1"}


def test_more_devices_than_cpus_share() -> None:
    plan = plan_cpus(["cpu:0", "cpu:1", "cpu:2"], {}, [0, 1], {})
    assert ranges(plan) == {"cpu:0": "0", "cpu:1": "1", "cpu:2": "0"}


def test_the_settings_win_and_the_others_keep_clear_of_them() -> None:
    plan = plan_cpus(TWO, {"npu:1": (0, 1)}, range(8), {"npu:0": range(8), "npu:1": range(4, 8)})
    assert ranges(plan) == {"npu:0": "2-7", "npu:1": "0-1"}


def test_settings_that_take_every_cpu_leave_them_shared() -> None:
    assert ranges(plan_cpus(TWO, {"npu:1": (0, 1, 2, 3)}, range(4), {})) == {"npu:0": "0-3", "npu:1": "0-3"}


def test_a_cpu_that_is_not_available_is_refused_by_name() -> None:
    with pytest.raises(HostError, match=r"runtime\.cpus\.npu:1 = '2-5': CPUs 4-5 .* may use 0-3"):
        plan_cpus(TWO, {"npu:1": (2, 3, 4, 5)}, range(4), {})


@given(
    count=st.integers(1, 6),
    available=st.sets(st.integers(0, 15), min_size=1),
    near=st.dictionaries(st.integers(0, 5), st.sets(st.integers(0, 15))),
    hyperthreads=st.booleans(),
)
def test_every_plan_is_usable(count: int, available: set[int], near: dict[int, set[int]], hyperthreads: bool) -> None:
    devices = [f"npu:{i}" for i in range(count)]
    cores = [(i, i + 8) for i in range(8)] if hyperthreads else []
    plan = plan_cpus(devices, {}, available, {f"npu:{i}": cpus for i, cpus in near.items()}, cores)
    assert list(plan) == devices
    assert all(plan.values()), "an empty CPU set"
    assert all(available.issuperset(cpus) for cpus in plan.values())


@given(
    count=st.integers(1, 6),
    available=st.sets(st.integers(0, 15), min_size=6),
    hyperthreads=st.booleans(),
)
def test_an_even_split_gives_every_cpu_once(count: int, available: set[int], hyperthreads: bool) -> None:
    cores = [(i, i + 8) for i in range(8)] if hyperthreads else []
    shares = list(plan_cpus([f"cpu:{i}" for i in range(count)], {}, available, {}, cores).values())
    assert sorted(cpu for share in shares for cpu in share) == sorted(available)
    units = len({cpu % 8 for cpu in available}) if hyperthreads else len(available)
    if hyperthreads and units >= count:
        assert sum(len({cpu % 8 for cpu in share}) for share in shares) == units, "a core is parted"
    else:
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---------------------------------------------------------------------------------------------------- the host


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """A host of 8 cores with two threads each, two NUMA nodes, and PCI devices on them."""
    root = tmp_path / "sys"
    for cpu in range(16):
        write(root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 8},{cpu % 8 + 8}")
    for node, cpus in enumerate(("0-3,8-11", "4-7,12-15")):
        write(root / f"devices/system/node/node{node}/cpulist", cpus)
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def add_pci(sysfs: Path, address: str, node: int, local: str | None = None) -> None:
    folder = sysfs / "bus/pci/devices" / address
    write(folder / "numa_node", str(node))
    if local:
        write(folder / "local_cpulist", local)


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    """Puts a program on a PATH that answers given arguments and fails on others; returns that environment."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(program: str, answers: Mapping[str, str]) -> dict[str, str]:
        lines = ["#!/bin/sh", '[ "$LC_ALL" = C ] || exit 3']
        for number, (arguments, text) in enumerate(answers.items()):
            answer = folder / f"{program}.{number}"
            answer.write_text(text)
            lines.append(f'[ "$*" = "{arguments}" ] && exec /bin/cat "{answer}"')
        (folder / program).write_text("\n".join([*lines, "exit 1", ""]))
        (folder / program).chmod(0o755)
        return {"PATH": str(folder)}

    return install


def test_sysfs_tells_the_cpus_near_a_card(sysfs: Path, tools: Tools) -> None:
    add_pci(sysfs, "0000:c1:00.0", 1, local="4-7,12-15")
    add_pci(sysfs, "0000:c2:00.0", 0)  # a kernel that has no local_cpulist
    environment = tools(
        "npu-smi", {"info": sample("info_910B3_8npu"), "info -m": sample("info_m_910B3_mcu")}
    )
    near = discovery.discover(TWO, environment, sysfs)
    assert ranges(near) == {"npu:0": "4-7,12-15", "npu:1": "0-3,8-11"}
    plan = plan_cpus(TWO, {}, range(16), near, discovery.cores(range(16), sysfs))
    assert ranges(plan) == {"npu:0": "4-7,12-15", "npu:1": "0-3,8-11"}


def test_npu_smi_is_asked_where_sysfs_knows_no_node(sysfs: Path, tools: Tools) -> None:
    add_pci(sysfs, "0000:c1:00.0", -1, local="0-15")
    answers = {
        "info": sample("info_910B3_8npu"),
        "info -m": sample("info_m_910B3_mcu"),
        "info -t topo": sample("constructed_topo_2npu_sys"),
    }
    near = discovery.discover(TWO, tools("npu-smi", answers), sysfs)
    assert ranges(near) == {"npu:0": "0-23", "npu:1": "48-71"}


def test_npu_smi_is_believed_where_it_alone_knows(sysfs: Path, tools: Tools) -> None:
    environment = tools("npu-smi", {"info -t topo": sample("constructed_topo_2npu_shared")})
    assert ranges(discovery.discover(TWO, environment, sysfs)) == {"npu:0": "0-31", "npu:1": "0-31"}


def test_a_card_whose_npu_id_is_not_its_index_is_found(sysfs: Path, tools: Tools) -> None:
    add_pci(sysfs, "0000:01:00.0", 1)  # NPU 4 of the sample, the only one in this container, index 0
    environment = tools(
        "npu-smi", {"info": sample("info_910B3_8npu"), "info -m": sample("info_m_npuid4_logic0")}
    )
    assert ranges(discovery.discover(TWO, environment, sysfs)) == {"npu:0": "4-7,12-15"}


def test_an_index_counts_visible_devices(sysfs: Path, tools: Tools) -> None:
    add_pci(sysfs, "0000:c1:00.0", 0)
    add_pci(sysfs, "0000:c2:00.0", 1)
    environment = tools("npu-smi", {"info": sample("info_910B3_8npu"), "info -m": sample("info_m_910A")})
    environment["ASCEND_RT_VISIBLE_DEVICES"] = "1"
    assert ranges(discovery.discover(["npu:0"], environment, sysfs)) == {"npu:0": "4-7,12-15"}
    with pytest.raises(HostError, match="npu:1: not visible, ASCEND_RT_VISIBLE_DEVICES=1"):
        discovery.discover(TWO, environment, sysfs)


def test_cuda_devices_are_found_by_index_or_uuid(sysfs: Path, tools: Tools) -> None:
    add_pci(sysfs, "0000:1b:00.0", 0)
    add_pci(sysfs, "0000:43:00.0", 1)
    query = "--query-gpu=index,uuid,pci.bus_id --format=csv,noheader"
    environment = tools("nvidia-smi", {query: "0, GPU-a, 00000000:1B:00.0\n1, GPU-b, 00000000:43:00.0\n"})
    assert ranges(discovery.discover(["cuda:1", "cuda:0"], environment, sysfs)) == {
        "cuda:1": "4-7,12-15",
        "cuda:0": "0-3,8-11",
    }
    environment["CUDA_VISIBLE_DEVICES"] = "GPU-b"
    assert ranges(discovery.discover(["cuda:0"], environment, sysfs)) == {"cuda:0": "4-7,12-15"}


def test_a_host_without_tools_tells_nothing(sysfs: Path, tmp_path: Path) -> None:
    assert discovery.discover(["npu:0", "cuda:0", "cpu:0"], {"PATH": str(tmp_path)}, sysfs) == {}


@pytest.mark.parametrize("ending", ["exec /bin/sleep 60", "exit 1"])
def test_a_tool_that_hangs_or_fails_tells_nothing(
    ending: str, sysfs: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "TOOL_TIMEOUT_S", 0.2)
    environment = tools("npu-smi", {})
    script = Path(environment["PATH"]) / "npu-smi"
    script.write_text(f"#!/bin/sh\n/bin/cat '{SAMPLES / 'topo_910B3_8npu.txt'}'\n{ending}\n")
    before = time.monotonic()
    assert discovery.discover(["npu:0"], environment, sysfs) == {}
    assert time.monotonic() - before < 20


def test_this_host_has_a_plan() -> None:
    available = discovery.available_cpus()
    assert set(available) == os.sched_getaffinity(0)
    plan, near = discovery.places(["cpu:0", "cpu:1"], {}, os.environ)
    assert near == {}
    assert {cpu for cpus in plan.values() for cpu in cpus} == set(available)
    assert discovery.places(["cpu:0"], {"cpu:0": available[-1:]}, os.environ) == ({"cpu:0": available[-1:]}, {})


def test_the_module_is_light() -> None:
    program = "import blendmaskd.shell.launch, sys; print('torch' in sys.modules or 'zmq' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize(("files", "cpus"), [
    ({}, math.inf),
    ({"cpu.max": "max 100000\n"}, math.inf),
    ({"cpu.max": "400000 100000\n"}, 4.0),
    ({"cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
    ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
])  # fmt: skip
def test_a_quota_is_the_tightest_of_the_groups(tmp_path, files, cpus) -> None:
    own = tmp_path / "cgroup"
    own.write_text("1:name=systemd:/x\n0::/a/b\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert discovery.cpu_quota(tmp_path / "groups", own) == cpus
