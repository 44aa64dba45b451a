"""Whether the daemon can listen where it is to, who has the place, and which keys may connect."""
from __future__ import annotations

import contextlib
import errno
import os
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from blendmaskd.check.finding import Finding, error, ok, warning
from blendmaskd.check.host import is_ours
from blendmaskd.discovery import read
from blendmaskd.endpoints import LOCK_SUFFIX, SOCKET_PATH_BYTES, ipc_path, parse_place
from blendmaskd.keys import KeyFileError, read_pair
from blendmaskd.protocol import MEMORY_SUFFIX
from blendmaskd.settings import Settings
from blendmaskd.shell.addresses import address, is_loopback, overlap
from blendmaskd.shell.admission.access import AllowedKeys
from blendmaskd.shell.endpoint_files import is_locked, obstacle
from blendmaskd.shell.sockets import StartError, private_folder

UNIT = Path("/etc/systemd/system/blendmaskd.service")
RUNTIME_FOLDER = Path("/run/blendmaskd")  # RuntimeDirectory= of the unit


class Holder(msgspec.Struct, frozen=True):
    """Who has an endpoint."""

    pid: int | None = None  # None: this user may not see it
    command: str = ""
    ours: bool = False  # a running blendmaskd

    def __str__(self) -> str:
        who = "a running blendmaskd" if self.ours else self.command or "another process"
        return who if self.pid is None else f"{who} (pid {self.pid})"


class EndpointFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One place where the daemon is to listen."""

    setting: str  # endpoints.clients, endpoints.metrics
    endpoint: str  # ipc://PATH, tcp://HOST:PORT, HOST:PORT
    folder_usable: bool = True  # ipc: that of the socket can be written, or made
    obstacle: str = ""  # what is at its path and must stay, or has its port by these settings
    by_systemd: bool = False  # the installed unit makes the folder when it starts
    bind_errno: int = 0  # tcp: what a trial bind said
    open_to_all: bool = False  # without keys, on an address that others reach
    holder: Holder | None = None


class TcpFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Who may connect by tcp."""

    insecure: bool = False
    server_key: str = ""  # what is wrong with it
    client_keys: str = ""  # the folder
    folder_there: bool = True
    names: tuple[str, ...] = ()  # of the clients
    complaints: tuple[str, ...] = ()  # of files that are no keys


def ask(settings: Settings) -> Iterator[EndpointFacts]:
    bound: list[tuple[str, int]] = []
    for endpoint in settings.endpoints.clients:
        if endpoint.startswith("ipc://"):
            yield _ipc(endpoint)
        else:
            yield _tcp("endpoints.clients", endpoint, endpoint.removeprefix("tcp://"), bound)
    if settings.endpoints.metrics:
        yield _tcp("endpoints.metrics", settings.endpoints.metrics, settings.endpoints.metrics, bound)


def _ipc(endpoint: str) -> EndpointFacts:
    path = Path(ipc_path(endpoint))
    lock = Path(f"{path}{LOCK_SUFFIX}")
    there = next(folder for folder in (path.absolute().parent, *path.absolute().parents) if os.path.exists(folder))
    return EndpointFacts(
        setting="endpoints.clients",
        endpoint=endpoint,
        folder_usable=os.access(there, os.W_OK | os.X_OK),
        by_systemd=path.is_relative_to(RUNTIME_FOLDER) and UNIT.exists(),
        obstacle=obstacle(str(path)),
        holder=_holder(_locker(lock)) if is_locked(str(lock)) else None,
    )


def _locker(path: Path) -> int | None:
    """The pid in /proc/locks, where this process may know it."""
    inode = str(path.stat().st_ino)
    for line in read(Path("/proc/locks")).splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode and fields[4].isdigit():
            return int(fields[4]) or None
    return None


def ask_http(settings: Settings) -> EndpointFacts:
    return _tcp("http.endpoint", settings.http.endpoint, settings.http.endpoint, [])


def _tcp(setting: str, endpoint: str, place: str, bound: list[tuple[str, int]]) -> EndpointFacts:
    host, port = parse_place(place)
    number, found = _bind_errno(host, port)
    obstacle = "another endpoint of these settings" if any(overlap((found, port), other) for other in bound) else ""
    bound.append((found, port))
    holder = None
    if number == errno.EADDRINUSE:
        holder = _listener(port)
        if setting == "endpoints.metrics" and holder.pid is None and _is_our_page(place):
            holder = Holder(ours=True)
    open_to_all = setting == "endpoints.metrics" and not is_loopback(place)
    return EndpointFacts(
        setting=setting, endpoint=endpoint, obstacle=obstacle, bind_errno=number, open_to_all=open_to_all, holder=holder
    )


def _bind_errno(host: str, port: int) -> tuple[int, str]:
    """What binding says, and the address that was tried."""
    found = ""
    try:
        found = address(host)
        with socket.socket(socket.AF_INET6 if ":" in found else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((found, port))
    except socket.gaierror:
        return errno.EADDRNOTAVAIL, found
    except OSError as problem:
        return problem.errno or errno.EADDRNOTAVAIL, found
    return 0, found


def _listener(port: int) -> Holder:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                return _holder(connection.pid)
    return Holder()


def _is_our_page(place: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{place}/metrics", timeout=2) as page:
            return b"blendmaskd_snapshot_seq" in page.read()
    except OSError:
        return False


def _holder(pid: int | None) -> Holder:
    if pid is None:
        return Holder()
    try:
        return Holder(pid=pid, command=psutil.Process(pid).name(), ours=is_ours(pid))
    except psutil.Error:
        return Holder(pid=pid)


def ask_private_folder() -> str:
    """What is wrong with the place of the workers' socket; empty: nothing."""
    try:
        private_folder().cleanup()
    except StartError as problem:
        return str(problem)
    return ""


def judge_private_folder(complaint: str) -> list[Finding]:
    return [error("files", complaint, "docs/troubleshooting.md")] if complaint else []


def ask_keys(settings: Settings) -> Iterator[TcpFacts]:
    if not any(endpoint.startswith("tcp://") for endpoint in settings.endpoints.clients):
        return
    server_key, folder = settings.curve.server_key, settings.curve.client_keys
    if not server_key or not folder:
        yield TcpFacts(insecure=True)
        return
    complaint = ""
    try:
        read_pair(server_key)
    except KeyFileError as problem:
        complaint = str(problem)
    allowed = AllowedKeys(folder)
    change = allowed.refresh()
    yield TcpFacts(server_key=complaint, client_keys=folder, folder_there=os.path.isdir(folder),
                   names=tuple(allowed.names.values()), complaints=tuple(change.complaints))  # fmt: skip


def judge(facts: EndpointFacts) -> list[Finding]:
    where = f"{facts.setting}: {facts.endpoint}"
    if facts.holder and facts.holder.ours:
        return [ok("endpoint", f"{where}: served by {facts.holder}")]
    if facts.holder:
        return [error("endpoint", f"{where}: taken by {facts.holder}", f"stop it, or choose another {facts.setting}")]
    problem = _ipc_problem(facts) if facts.endpoint.startswith("ipc://") else _tcp_problem(facts)
    if problem:
        return [problem]
    if facts.open_to_all:
        return [warning("endpoint", f"{where}: free, and open to anyone who can reach the port",
                        "use 127.0.0.1 to admit only this host")]  # fmt: skip
    if facts.by_systemd:
        return [ok("endpoint", f"{where}: systemd creates the folder when the service starts")]
    return [ok("endpoint", f"{where}: free")]


def _ipc_problem(facts: EndpointFacts) -> Finding | None:
    path = facts.endpoint.removeprefix("ipc://")
    size = len(os.fsencode(path))
    if size > SOCKET_PATH_BYTES:
        return error("endpoint", f"{facts.setting}: a path of {size} bytes, at most {SOCKET_PATH_BYTES} are possible",
                     "use a shorter path")  # fmt: skip
    if size + len(MEMORY_SUFFIX) > SOCKET_PATH_BYTES:
        return warning("endpoint", f"{facts.setting}: a path of {size} bytes leaves no room for {MEMORY_SUFFIX}: "
                       "no shared memory", "use a shorter path")  # fmt: skip
    if facts.obstacle:
        return error("endpoint", f"{facts.setting}: {facts.obstacle}", "stop or move it, or choose another endpoint")
    if not facts.folder_usable and not facts.by_systemd:
        return error("endpoint", f"{facts.setting}: this user cannot create {path}",
                     "run as the service's user, or --set 'endpoints.clients=[ipc:///tmp/blendmaskd.sock]'")
    return None


def _tcp_problem(facts: EndpointFacts) -> Finding | None:
    where = f"{facts.setting}: {facts.endpoint}"
    if facts.obstacle:
        return error("endpoint", f"{where}: taken by {facts.obstacle}", f"choose another {facts.setting}")
    match facts.bind_errno:
        case 0:
            return None
        case errno.EADDRINUSE:
            return error("endpoint", f"{where}: taken by another process", f"choose another {facts.setting}")
        case errno.EACCES:
            return error("endpoint", f"{where}: a port below 1024 needs privileges", "choose a port above 1023")
        case errno.EADDRNOTAVAIL:
            return error("endpoint", f"{where}: this host has no such address", "list its addresses with `ip address`")
        case other:
            return error("endpoint", f"{where}: {os.strerror(other)}", f"choose another {facts.setting}")


def judge_keys(facts: TcpFacts) -> list[Finding]:
    if facts.insecure:
        return [warning("keys", "insecure_tcp: anyone who can reach the port can submit jobs and read the traffic",
                        "set curve.server_key and curve.client_keys; blendmaskd-keys makes them")]  # fmt: skip
    if facts.server_key:
        return [error("keys", f"curve.server_key: {facts.server_key}", "blendmaskd-keys server")]
    if not facts.folder_there:
        return [error("keys", f"curve.client_keys: {facts.client_keys} does not exist", "blendmaskd-keys server")]
    findings = [warning("keys", f"curve.client_keys: {complaint}", "fix or remove the file")
                for complaint in facts.complaints]  # fmt: skip
    if not facts.names:
        return [*findings, warning("keys", f"no client can connect over tcp yet: {facts.client_keys} holds no keys",
                                   "blendmaskd-keys client")]  # fmt: skip
    return [*findings, ok("keys", f"{len(facts.names)} clients may connect by tcp")]
