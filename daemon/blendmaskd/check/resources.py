"""Whether the host gives what the settings count on: folders, the spool's disk, weights, descriptors, memory."""
from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from blendmaskd.check.finding import Finding, error, ok, warning
from blendmaskd.discovery import read
from blendmaskd.settings import Settings
from blendmaskd.shell import threads
from blendmaskd.shell.descriptors import REMEDY, limits, most_connections, most_regions, needed, shortage
from blendmaskd.shell.spool import APPLICATION

NETWORK_TYPES = ("nfs", "cifs", "smb", "ceph", "glusterfs", "lustre", "fuse.sshfs", "9p")
FEW_FILES = 512
GIB = 1 << 30
# Begins a database's header of 100 bytes, which has the schema's version (0: none) at 40, application_id at 68.
SQLITE = b"SQLite format 3\0"


class SpoolFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The file of durable jobs."""

    path: str
    folder_there: bool = True
    taken: str = ""  # why what is there cannot be a spool
    writable: bool = True
    network: str = ""  # the type of file system, where it is one of a network
    free_bytes: int = 0
    may_take_bytes: int = 0


class LimitFacts(msgspec.Struct, frozen=True, kw_only=True):
    files: int  # soft RLIMIT_NOFILE
    hard_files: int
    threads: int = threads.NEEDED  # that can be started, counted up to there
    locked_bytes: int | None  # RLIMIT_MEMLOCK; None: no limit
    available_bytes: int  # of the host's memory, or of the control group's where that is less
    promised_bytes: int  # that queue and shared memory may take


def ask_spool(settings: Settings) -> Iterator[SpoolFacts]:
    if settings.spool is None:
        return
    folder = Path(settings.spool).absolute().parent
    if not os.path.isdir(folder):
        yield SpoolFacts(path=settings.spool, folder_there=False)
        return
    there = os.path.exists(settings.spool)
    yield SpoolFacts(
        path=settings.spool,
        taken=_taken(settings.spool) if there else "",
        writable=os.access(folder, os.W_OK | os.X_OK) and (not there or os.access(settings.spool, os.R_OK | os.W_OK)),
        network=_network_type(folder),
        free_bytes=psutil.disk_usage(str(folder)).free + (os.path.getsize(settings.spool) if there else 0),
        may_take_bytes=settings.spool_bytes,
    )


def _taken(path: str) -> str:
    """What is in a spool's place; empty: a spool, nothing yet, or what this user may not read."""
    if not os.path.isfile(path):
        return "is not a file"
    try:
        with open(path, "rb") as file:
            head = file.read(100)
    except OSError:
        return ""
    if head and not head.startswith(SQLITE):
        return "is not a database"
    application, schema = int.from_bytes(head[68:72]), int.from_bytes(head[40:44])
    return "is a database of another program" if application != APPLICATION and (application or schema) else ""


def _network_type(folder: Path) -> str:
    """The type of the file system of a folder, if others on the network have it too."""
    mounts = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    kind = next((mounts[place] for place in (folder, *folder.parents) if place in mounts), "")
    return kind if kind.startswith(NETWORK_TYPES) else ""


def ask_limits(settings: Settings) -> LimitFacts:
    soft, hard = limits()
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return LimitFacts(
        files=soft,
        hard_files=hard,
        threads=threads.startable(),
        locked_bytes=None if locked == resource.RLIM_INFINITY else locked,
        available_bytes=min(psutil.virtual_memory().available, _control_group_bytes()),
        promised_bytes=settings.queue.max_bytes + settings.shared_memory_bytes,
    )


def _control_group_bytes() -> int:
    """What the control group of this process may have in all."""
    group = read(Path("/proc/self/cgroup")).rpartition("::")[2].lstrip("/")
    text = read(Path("/sys/fs/cgroup") / group / "memory.max")
    return int(text) if text.isdigit() else 1 << 62


def judge_root(path: str, there: bool, usable: bool) -> list[Finding]:
    if not there:
        return [error("files", f"paths.roots: {path} does not exist", "create it, or name another")]
    if not usable:
        return [error("files", f"paths.roots: {path} cannot be read by this user", "chmod or chgrp it")]
    return [ok("files", f"paths.roots: {path}")]


def judge_spool(facts: SpoolFacts) -> list[Finding]:
    if not facts.folder_there:
        return [error("files", f"spool: the folder of {facts.path} does not exist", "create it for the daemon's user")]
    if facts.taken:
        return [error("files", f"spool: {facts.path} {facts.taken}", "use another file")]
    if not facts.writable:
        return [error("files", f"spool: this user cannot write {facts.path}", "chown or chgrp its folder")]
    if facts.network:
        return [warning("files", f"spool: {facts.path} is on {facts.network}, where a database can be corrupted",
                        "use a file on a local disk")]  # fmt: skip
    if facts.may_take_bytes > facts.free_bytes:
        return [warning("files", f"spool: may take {facts.may_take_bytes / GIB:.1f} GiB, "
                        f"{facts.free_bytes / GIB:.1f} GiB are free", "use a smaller spool_bytes, or another disk")]
    return [ok("files", f"spool: {facts.path}")]


def judge_weights(engine: str, named: str | None, complaint: str | None, took_s: float) -> list[Finding]:
    """Whether the checkpoint matches the config, as a process found that loaded both; `complaint` None: it could."""
    if engine == "timed":
        return [ok("weights", "not needed by the engine timed")]
    if complaint is None:
        return [ok("weights", f"{named}: matches the config, loaded in {took_s:.1f} s")]
    remedy = "--set model.weights=FILE" if named is None else "use a checkpoint of the network in model.config"
    if engine == "onnx":
        remedy = "docs/onnx.md"
    return [error("weights", complaint, remedy)]


def judge_limits(facts: LimitFacts) -> list[Finding]:
    if complaint := shortage(facts.hard_files):
        return [error("limits", complaint, REMEDY)]
    if complaint := threads.shortage(facts.threads):
        return [error("limits", complaint, threads.REMEDY)]
    locked = "no limit" if facts.locked_bytes is None else f"{facts.locked_bytes / (1 << 20):.0f} MiB"
    clients, regions = most_connections(facts.files), most_regions(facts.files)
    text = f"{facts.files} open files: {clients} clients, {regions} with shared memory; locked memory: {locked}"
    findings = [ok("limits", text)]
    if facts.files < FEW_FILES:
        findings = [warning("limits", text, f"ulimit -n {min(65536, facts.hard_files)}; the service has 65536")]
    if needed(facts.files) > facts.hard_files:
        findings.append(warning(
            "limits", f"{facts.hard_files} open files at most: a local user who connects very often can end the daemon",
            f"a hard limit of {needed(facts.files)} or more (ulimit -Hn)",
        ))  # fmt: skip
    if facts.promised_bytes > facts.available_bytes:
        findings.append(warning(
            "limits",
            f"queue and shared memory may take {facts.promised_bytes / GIB:.1f} GiB, "
            f"{facts.available_bytes / GIB:.1f} GiB are available",
            "use a smaller queue.max_bytes or shared_memory_bytes",
        ))  # fmt: skip
    return findings
