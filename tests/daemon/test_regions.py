"""The table of regions, and how a worker reads them."""
from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_files import SEALS, memory_file, memory_of

from blendmaskd.core import regions
from blendmaskd.core.regions import Memory
from blendmaskd.protocol import OpenRegion, Place, RegionError
from blendmaskd_workers.regions import Regions as WorkerRegions

MB = 1 << 20
OURS = Memory(descriptor=0, inode=1, bytes=4096, seals=SEALS, page_bytes=regions.PAGE, pid=7)


@given(st.lists(st.tuples(st.integers(1, 40 * MB), st.booleans(), st.integers(1, 9), st.integers(0, 2)), max_size=60))
def test_regions_never_exceed_their_bounds(steps: list[tuple[int, bool, int, int]]) -> None:
    """A process has at most a quarter, and a user seven times what is left."""
    table = regions.Regions(64 * MB)
    kept: dict[str, int] = {}
    owners: dict[str, tuple[int, int]] = {}

    def of(place: int, owner: int) -> int:
        return sum(kept[name] for name in kept if owners[name][place] == owner)

    for number, (size, remove, pid, user) in enumerate(steps):
        if remove and kept:
            name = next(iter(kept))
            table.remove(name)
            del kept[name]
            continue
        memory = replace(OURS, bytes=size, pid=pid, uid=user)
        free = 64 * MB - sum(kept.values())
        own = of(1, user)
        if of(0, pid) + size > 16 * MB or own + size > 7 * (free - size):
            with pytest.raises(RegionError) as refused:
                table.add(str(number), memory)
            left = refused.value.left
            assert left < size
            assert not left or (of(0, pid) + left <= 16 * MB and own + left <= 7 * (free - left))
        else:
            table.add(str(number), memory)
            kept[str(number)], owners[str(number)] = size, (pid, user)
        assert {opening.region: opening.bytes for opening in table} == kept


def test_one_user_cannot_take_the_last_of_the_memory() -> None:
    table = regions.Regions(64 * MB)
    for pid in range(1, 100):
        with contextlib.suppress(RegionError):
            table.add(f"greedy {pid}", replace(OURS, bytes=16 * MB, pid=pid, uid=1))
        with contextlib.suppress(RegionError):
            table.add(f"last {pid}", replace(OURS, bytes=MB, pid=pid, uid=1))
    table.add("polite", replace(OURS, bytes=MB, pid=1000, uid=2))


def test_there_is_an_end_to_the_number_of_regions() -> None:
    table = regions.Regions(1 << 40)
    for number in range(regions.MOST_REGIONS // regions.SHARES):
        table.add(str(number), OURS)
    with pytest.raises(RegionError, match="all 256 regions are in use, or this process has 64"):
        table.add("one more of it", OURS)
    for number in range(len(table), regions.MOST_REGIONS):
        table.add(str(number), replace(OURS, pid=1000 + number))
    with pytest.raises(RegionError, match="are in use"):
        table.add("one more", replace(OURS, pid=1))


def test_processes_of_other_namespaces_are_not_taken_for_one() -> None:
    table = regions.Regions(1 << 40)
    for number in range(regions.MOST_REGIONS):
        table.add(str(number), replace(OURS, pid=0))


def test_a_worker_sees_what_is_there_now_and_lets_go_of_what_has_ended(own: Any) -> None:
    descriptor = own(memory_file(8192))
    opened = WorkerRegions(os.getpid())
    place = Place(region="r", offset=100, bytes=3)
    opened.open(OpenRegion(region="r", descriptor=descriptor, inode=os.fstat(descriptor).st_ino, bytes=8192))
    view = opened.view(place)
    assert view.readonly
    assert bytes(view) == b"\0\0\0"
    os.pwrite(descriptor, b"abc", 100)
    assert bytes(view) == b"abc"
    opened.close("r")
    assert bytes(view) == b"abc"  # until the last has looked
    with pytest.raises(RegionError, match="region r: it has ended"):
        opened.view(place)
    del view
    assert "/memfd:test" not in Path("/proc/self/maps").read_text()
    assert [file.st_ino for file in memory_of(os.getpid())].count(os.fstat(descriptor).st_ino) == 1
    opened.close("never opened")


def test_a_worker_that_comes_too_late_maps_no_other_file(own: Any) -> None:
    opened = WorkerRegions(os.getpid())
    other = own(memory_file(4096))
    opened.open(OpenRegion(region="r", descriptor=other, inode=os.fstat(other).st_ino + 1, bytes=4096))
    opened.open(OpenRegion(region="s", descriptor=9999, inode=1, bytes=4096))
    with pytest.raises(RegionError, match="region r: it has ended"):
        opened.view(Place(region="r", offset=0, bytes=1))
    with pytest.raises(RegionError, match=r"region s: .*No such file"):
        opened.view(Place(region="s", offset=0, bytes=1))
