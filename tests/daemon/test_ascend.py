"""What npu-smi prints and what CANN, driver and firmware leave, on real hosts; which versions belong together."""
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blendmaskd import ascend, topology
from blendmaskd.ascend import Card

SAMPLES = Path(__file__).parents[1] / "data" / "npu-smi"
DRIVER = """Version=24.1.rc3
ascendhal_version=7.35.23
aicpu_version=1.0
Innerversion=V100R001C19SPC001B124
compatible_version=[V100R001C13],[V100R001C15],[V100R001C17],[V100R001C18],[V100R001C19]
compatible_version_fw=[7.0.0,7.5.99]
package_version=24.1.rc3
"""
FIRMWARE = "Version=7.5.0.1.129\nfirmware_version=1.0\npackage_version=24.1.rc3\n"


def sample(name: str) -> str:
    return (SAMPLES / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    ("name", "cards"),
    [
        ("info_910B3_8npu", {(n, 0): Card("910B3", "OK", t) for n, t in enumerate([43, 39, 40, 40, 45, 44, 45, 44])}),
        ("info_910A_8npu_procs",
         {(n, 0): Card("xxx", "OK", t) for n, t in enumerate([44, 39, 36, 44, 40, 36, 37, 42])}),
        ("info_A3_Ascend910_dualdie_excerpt", {(0, chip): Card("Ascend910", "OK", 34) for chip in (0, 1)}),
        ("info_A3_Ascend910_dualdie_v25_excerpt", {(0, chip): Card("Ascend910", "OK", 36) for chip in (0, 1)}),
        ("info_m_910A", {}),
    ],
)
def test_npu_smi_tells_name_health_and_temperature(name: str, cards: dict[ascend.Chip, Card]) -> None:
    assert ascend.parse_npu_cards(sample(name)) == cards


def test_a_sick_card_is_told_apart() -> None:
    row = "| 1     910B3               | "
    cards = ascend.parse_npu_cards(sample("info_910B3_8npu").replace(f"{row}OK ", f"{row}Alarm "))
    assert [chip for chip, card in cards.items() if card.health == "Alarm"] == [(1, 0)]


def test_npu_smi_tells_errors_of_memory() -> None:
    sound = sample("ecc_910")
    assert ascend.parse_npu_memory_errors(sound, 1) == {(1, 0): (0, 0)}
    counted = sound.replace("HBM Single Bit Error Count               : 0", "HBM Single Bit Error Count : 12")
    counted = counted.replace("DDR Double Bit Error Count               : 0", "DDR Double Bit Error Count : 2")
    assert ascend.parse_npu_memory_errors(counted, 1) == {(1, 0): (12, 2)}
    two = counted + sound.replace("Chip ID                                  : 0", "Chip ID : 1")
    assert ascend.parse_npu_memory_errors(two, 4) == {(4, 0): (12, 2), (4, 1): (0, 0)}
    of_one = counted.partition("Chip ID")[0]  # as newer ones print it for a card with one chip
    assert ascend.parse_npu_memory_errors(of_one, 1) == {(1, 0): (12, 2)}
    for text in ("", "This device does not support querying ecc.\n", sample("health_ok_910A"), "\tChip ID : 0\n"):
        assert ascend.parse_npu_memory_errors(text, 0) == {}


def test_npu_smi_tells_what_is_not_well() -> None:
    sound = sample("health_ok_910A")
    assert ascend.parse_npu_error(sound) == ascend.parse_npu_error("") == ""
    ill = sound.replace("Error Code                     : NA", "Error Code : 0x80E01801")
    assert ascend.parse_npu_error(ill.replace(": NA", ": HBM multi-bit ECC")) == "0x80E01801, HBM multi-bit ECC"


def test_chips_go_by_npu_smis_map_or_by_their_order() -> None:
    cards = {(4, 0): None, (1, 0): None}
    assert ascend.chips_by_logic_id({0: (4, 0)}, cards) == {"0": (4, 0)}
    assert ascend.chips_by_logic_id({}, cards) == {"0": (1, 0), "1": (4, 0)}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("NPUStream.cpp:1 NPU function error: AclrtSynchronizeStreamWithTimeout, error code is 507014", 507014),
        ("NPU function error: HBM MULTI BIT ECC ERROR.reason, error code is 507054[ERROR] 2026", 507054),
        ("aclrtSetDevice failed, error code:507033", 507033),
        ("error code is 207001", None), ("error code is 161002", None), ("took 507014 us", None), ("", None),
    ],
)  # fmt: skip
def test_a_fault_of_the_device_is_told_from_other_errors(text: str, code: int | None) -> None:
    assert ascend.fault_code(text) == code


def test_npu_smi_tells_who_uses_a_card() -> None:
    users = ascend.parse_npu_processes(sample("info_910A_8npu_procs"))
    assert users[0, 0] == [(139667, "python")]
    assert len(users) == 8
    assert ascend.parse_npu_processes(sample("info_910B3_8npu")) == {}
    assert ascend.parse_npu_processes("| Process id |\n| No running processes found in NPU 0 |\n") == {}


@pytest.mark.parametrize(
    "text", ["", "\n", "dcmi module initialize failed. ret is -8005\n", "|||\n| 1 |\n", "| 1 a | b |"]
)
def test_what_is_not_understood_tells_nothing(text: str) -> None:
    assert ascend.parse_npu_cards(text) == {}
    assert ascend.parse_npu_processes(text) == {}
    assert ascend.parse_version(text) == ""
    assert ascend.parse_firmware_ranges(text) == []


SAMPLE_TEXTS = [path.read_text() for path in sorted(SAMPLES.glob("*.txt"))]
INSTEAD = ["", "|", "-", "NA", " ", "\t", "\n", "7", "\u00b2", "Mcu"]
EDITS = st.tuples(st.integers(0, 10**6), st.integers(0, 30), st.sampled_from(INSTEAD))


@given(st.sampled_from(SAMPLE_TEXTS), st.lists(EDITS, max_size=12))
def test_whatever_npu_smi_prints_can_be_read(text: str, edits: list[tuple[int, int, str]]) -> None:
    """Other versions have other columns, and what is cut off has fewer: that is left out."""
    for place, length, instead in edits:
        at = place % (len(text) + 1)
        text = text[:at] + instead + text[at + length :]
    for parse in (ascend.parse_npu_cards, ascend.parse_npu_processes, ascend.parse_npu_error, topology.parse_npu_map,
                  topology.parse_npu_addresses, topology.parse_npu_affinity):  # fmt: skip
        parse(text)
    ascend.parse_npu_memory_errors(text, 0)


def test_version_files_are_read() -> None:
    assert ascend.parse_version(DRIVER) == "24.1.rc3"
    assert ascend.parse_version(FIRMWARE) == "7.5.0.1.129"
    assert ascend.parse_version("package_name=Ascend-cann-toolkit\nversion=8.3.RC1\narch=aarch64\n") == "8.3.RC1"
    assert ascend.parse_firmware_ranges(DRIVER) == [("7.0.0", "7.5.99")]
    two = "compatible_version_fw=[6.4.0,6.4.99],[7.0.0,8.9.9]"
    assert ascend.parse_firmware_ranges(two) == [("6.4.0", "6.4.99"), ("7.0.0", "8.9.9")]


@pytest.mark.parametrize(
    ("version", "inside"), [("7.5.0.1.129", True), ("7.0.0", True), ("6.9.9", False), ("7.6.0.1", False)]
)
def test_firmware_is_in_the_drivers_range_or_not(version: str, inside: bool) -> None:
    assert ascend.within(version, ascend.parse_firmware_ranges(DRIVER)) is inside


def test_versions_have_an_order() -> None:
    told = ["7.0.0", "8.0.RC1", "8.0.RC3", "8.0.0", "8.1.RC1", "8.2.RC1", "8.5.0", "9.0.0", "9.1.0", "10.0.0"]
    assert sorted(sorted(told), key=ascend.order) == told
    assert ascend.order("8.3.rc1") == ascend.order("8.3.RC1")
    assert ascend.order("not known") == ()


def test_a_release_of_torch_npu_has_its_range_of_cann() -> None:
    for release in ("2.9.0", "2.9.0.post2", "2.12.0+gitabc"):  # made for 8.5.0, 9.0.0 and 9.1.0
        assert ascend.cann_for(release) == ("8.5.0", "9.1.0")
    assert ascend.cann_for("2.8.0") == ("8.3.RC1", "8.3.RC1")
    assert [ascend.cann_for(release) for release in ("2.13.0", "2.9.0.post9", "")] == [None] * 3
