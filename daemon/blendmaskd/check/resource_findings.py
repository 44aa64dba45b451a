"""Pure: whether the host gives what the settings count on: folders, the spool, weights, descriptors, memory."""
from __future__ import annotations

import msgspec

from blendmaskd.check.finding import Finding, error, ok, warning

FILES_PER_CLIENT = 3  # its connection, and with shared memory the second one and the region
FEW_FILES = 512
GIB = 1 << 30


class FolderFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that a setting names, for reading."""

    setting: str
    path: str
    there: bool
    usable: bool


class SpoolFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The file of durable jobs."""

    path: str
    folder_there: bool = True
    writable: bool = True
    network: str = ""  # the type of file system, where it is one of a network
    free_bytes: int = 0
    may_take_bytes: int = 0


class LimitFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Resource limits and memory."""

    files: int  # soft RLIMIT_NOFILE
    hard_files: int
    locked_bytes: int | None  # RLIMIT_MEMLOCK; None: no limit
    available_bytes: int  # of the host's memory, or of the control group's where that is less
    promised_bytes: int  # that queue and shared memory may take


def folder(facts: FolderFacts) -> list[Finding]:
    """Whether a folder that a setting names can be read."""
    if not facts.there:
        return [error("files", f"{facts.setting}: {facts.path} is not there", "make it, or name another")]
    if not facts.usable:
        return [error("files", f"{facts.setting}: {facts.path} cannot be read by this user", "chmod or chgrp")]
    return [ok("files", f"{facts.setting}: {facts.path}")]


def spool(facts: SpoolFacts) -> list[Finding]:
    """Whether durable jobs can be kept."""
    if not facts.folder_there:
        return [error("files", f"spool: the folder of {facts.path} is not there", "make it, for the daemon's user")]
    if not facts.writable:
        return [error("files", f"spool: this user cannot write {facts.path}", "chown or chgrp its folder")]
    if facts.network:
        return [warning("files", f"spool: {facts.path} is on {facts.network}: a database there can be damaged",
                        "a file on a disk of this host")]  # fmt: skip
    if facts.may_take_bytes > facts.free_bytes:
        return [warning("files", f"spool: may take {facts.may_take_bytes / GIB:.1f} GiB, "
                        f"{facts.free_bytes / GIB:.1f} GiB are free", "a smaller spool_bytes, or another disk")]
    return [ok("files", f"spool: {facts.path}")]


def weights(engine: str, named: str | None, complaint: str | None, took_s: float) -> list[Finding]:
    """Whether the checkpoint matches the config, as a process found that loaded both; `complaint` None: it could."""
    if engine == "timed":
        return [ok("weights", "the engine timed needs none")]
    if complaint is None:
        return [ok("weights", f"{named}: matches the config, loaded in {took_s:.1f} s")]
    remedy = "--set model.weights=FILE" if named is None else "a checkpoint of the network that model.config describes"
    return [error("weights", complaint, remedy)]


def limits(facts: LimitFacts) -> list[Finding]:
    """Descriptors and memory."""
    locked = "no limit" if facts.locked_bytes is None else f"{facts.locked_bytes / (1 << 20):.0f} MiB"
    clients = facts.files // FILES_PER_CLIENT
    text = f"{facts.files} open files: some {clients} clients; locked memory: {locked}"
    findings = [ok("limits", text)]
    if facts.files < FEW_FILES:
        findings = [warning("limits", text, f"ulimit -n {min(65536, facts.hard_files)}; the service has 65536")]
    if facts.promised_bytes > facts.available_bytes:
        findings.append(warning(
            "limits",
            f"queue and shared memory may take {facts.promised_bytes / GIB:.1f} GiB, "
            f"{facts.available_bytes / GIB:.1f} GiB are available",
            "a smaller queue.max_bytes or shared_memory_bytes",
        ))  # fmt: skip
    return findings
