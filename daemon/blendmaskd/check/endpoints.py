"""Asks who listens where the daemon is to, whether it could, and which keys there are."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from blendmaskd.check.endpoint_findings import EndpointFacts, Holder, TcpFacts
from blendmaskd.check.host import is_ours, read
from blendmaskd.keys import KeyFileError, read_pair
from blendmaskd.settings import Settings
from blendmaskd.shell.admission.access import AllowedKeys
from blendmaskd.shell.sockets import is_loopback

UNIT = Path("/etc/systemd/system/blendmaskd.service")
RUNTIME_FOLDER = Path("/run/blendmaskd")  # RuntimeDirectory= of the unit


def wanted(settings: Settings) -> Iterator[EndpointFacts]:
    """Where the settings have the daemon listen."""
    for endpoint in settings.endpoints.clients:
        if endpoint.startswith("ipc://"):
            yield _ipc(endpoint)
        else:
            yield _tcp("endpoints.clients", endpoint, endpoint.removeprefix("tcp://"))
    if settings.endpoints.metrics:
        yield _tcp("endpoints.metrics", settings.endpoints.metrics, settings.endpoints.metrics)


def _ipc(endpoint: str) -> EndpointFacts:
    path = Path(endpoint.removeprefix("ipc://"))
    there = next(folder for folder in (path.absolute().parent, *path.absolute().parents) if folder.exists())
    return EndpointFacts(
        setting="endpoints.clients",
        endpoint=endpoint,
        folder=str(path.parent),
        folder_usable=os.access(there, os.W_OK | os.X_OK),
        by_systemd=path.is_relative_to(RUNTIME_FOLDER) and UNIT.exists(),
        holder=_lock_holder(Path(f"{path}.lock")),
    )


def _lock_holder(path: Path) -> Holder | None:
    """The process that holds the lock beside a socket; see `blendmaskd.shell.sockets`."""
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(_locker(path))
    except OSError:  # not there, or not ours to read: what the folder's rights say then
        return None
    return None


def _locker(path: Path) -> int | None:
    """The pid in /proc/locks, where this process may know it."""
    inode = str(path.stat().st_ino)
    for line in read(Path("/proc/locks")).splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode and fields[4].isdigit():
            return int(fields[4]) or None
    return None


def _tcp(setting: str, endpoint: str, place: str) -> EndpointFacts:
    host, _, port = place.rpartition(":")
    host = host.strip("[]").replace("*", "0.0.0.0")
    number = _bind_errno(host, port)
    holder = None
    if number == errno.EADDRINUSE:
        holder = _listener(int(port))
        if setting == "endpoints.metrics" and holder.pid is None and _is_our_page(place):
            holder = Holder(ours=True)
    open_to_all = setting == "endpoints.metrics" and not is_loopback(place)
    return EndpointFacts(
        setting=setting, endpoint=endpoint, bind_errno=number, open_to_all=open_to_all, holder=holder
    )


def _bind_errno(host: str, port: str) -> int:
    if not port.isdigit():
        return 0  # an endpoint such as tcp://eth0:*, which ZeroMQ understands
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except socket.gaierror:
        return errno.EADDRNOTAVAIL
    except OSError as error:
        return error.errno or 0
    return 0


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


def keys(settings: Settings) -> Iterator[TcpFacts]:
    if not any(endpoint.startswith("tcp://") for endpoint in settings.endpoints.clients):
        return
    server_key, folder = settings.curve.server_key, settings.curve.client_keys
    if not server_key or not folder:
        yield TcpFacts(insecure=True)
        return
    complaint = ""
    try:
        read_pair(server_key)
    except KeyFileError as error:
        complaint = str(error)
    allowed = AllowedKeys(folder)
    change = allowed.refresh()
    yield TcpFacts(server_key=complaint, client_keys=folder, folder_there=os.path.isdir(folder),
                   names=tuple(allowed.names.values()), complaints=tuple(change.complaints))  # fmt: skip
