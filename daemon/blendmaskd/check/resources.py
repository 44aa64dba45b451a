"""Asks what the host gives: folders, the disk of the spool, descriptors, memory."""
from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

from blendmaskd.check.host import read
from blendmaskd.check.resource_findings import FolderFacts, LimitFacts, SpoolFacts
from blendmaskd.settings import Settings

NETWORK_TYPES = ("nfs", "cifs", "smb", "ceph", "glusterfs", "lustre", "fuse.sshfs", "9p")


def folders(settings: Settings) -> Iterator[FolderFacts]:
    for root in settings.paths.roots:
        yield FolderFacts(setting="paths.roots", path=root, there=os.path.isdir(root),
                          usable=os.access(root, os.R_OK | os.X_OK))  # fmt: skip


def spool(settings: Settings) -> Iterator[SpoolFacts]:
    if settings.spool is None:
        return
    folder = Path(settings.spool).absolute().parent
    if not folder.is_dir():
        yield SpoolFacts(path=settings.spool, folder_there=False)
        return
    there = os.path.exists(settings.spool)
    yield SpoolFacts(
        path=settings.spool,
        writable=os.access(folder, os.W_OK | os.X_OK) and (not there or os.access(settings.spool, os.R_OK | os.W_OK)),
        network=_network_type(folder),
        free_bytes=psutil.disk_usage(str(folder)).free + (os.path.getsize(settings.spool) if there else 0),
        may_take_bytes=settings.spool_bytes,
    )


def _network_type(folder: Path) -> str:
    """The type of the file system of a folder, if others on the network have it too."""
    mounts = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    kind = next((mounts[place] for place in (folder, *folder.parents) if place in mounts), "")
    return kind if kind.startswith(NETWORK_TYPES) else ""


def limits(settings: Settings) -> LimitFacts:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return LimitFacts(
        files=soft if soft != resource.RLIM_INFINITY else 1 << 20,
        hard_files=hard if hard != resource.RLIM_INFINITY else 1 << 20,
        locked_bytes=None if locked == resource.RLIM_INFINITY else locked,
        available_bytes=min(psutil.virtual_memory().available, _control_group_bytes()),
        promised_bytes=settings.queue.max_bytes + settings.shared_memory_bytes,
    )


def _control_group_bytes() -> int:
    """What the control group of this process may have in all."""
    group = read(Path("/proc/self/cgroup")).strip().rpartition("::")[2].lstrip("/")
    text = read(Path("/sys/fs/cgroup") / group / "memory.max").strip()
    return int(text) if text.isdigit() else 1 << 62
