"""Pure: whether the daemon can listen where it is to, and who may connect."""
from __future__ import annotations

import errno
import os

import msgspec

from blendmaskd.check.finding import Finding, error, ok, warning
from blendmaskd.protocol import MEMORY_SUFFIX

SOCKET_PATH_BYTES = 107  # sockaddr_un, without its final zero


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
    folder: str = ""  # ipc: of the socket
    folder_usable: bool = True  # it can be written, or made
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


def endpoint(facts: EndpointFacts) -> list[Finding]:
    """Whether the daemon can listen there."""
    where = f"{facts.setting}: {facts.endpoint}"
    if facts.holder and facts.holder.ours:
        return [ok("endpoint", f"{where}: served by {facts.holder}")]
    if facts.holder:
        return [error("endpoint", f"{where}: taken by {facts.holder}", f"stop it, or choose another {facts.setting}")]
    problem = _ipc_problem(facts) if facts.endpoint.startswith("ipc://") else _tcp_problem(facts)
    if problem:
        return [problem]
    if facts.open_to_all:
        return [warning("endpoint", f"{where}: free, and open to whoever reaches the port",
                        "127.0.0.1 is this host's alone")]  # fmt: skip
    if facts.by_systemd:
        return [ok("endpoint", f"{where}: systemd makes the folder when the service starts")]
    return [ok("endpoint", f"{where}: free")]


def _ipc_problem(facts: EndpointFacts) -> Finding | None:
    path = facts.endpoint.removeprefix("ipc://")
    size = len(os.fsencode(path))
    if size > SOCKET_PATH_BYTES:
        return error("endpoint", f"{facts.setting}: a path of {size} bytes, {SOCKET_PATH_BYTES} are possible",
                     "a shorter path")  # fmt: skip
    if size + len(MEMORY_SUFFIX) > SOCKET_PATH_BYTES:
        return warning("endpoint", f"{facts.setting}: a path of {size} bytes leaves no room for {MEMORY_SUFFIX}: "
                       "no shared memory", "a shorter path")  # fmt: skip
    if not facts.folder_usable and not facts.by_systemd:
        return error("endpoint", f"{facts.setting}: this user cannot make {path}",
                     "run as the service's user, or --set 'endpoints.clients=[ipc:///tmp/blendmaskd.sock]'")
    return None


def _tcp_problem(facts: EndpointFacts) -> Finding | None:
    where = f"{facts.setting}: {facts.endpoint}"
    match facts.bind_errno:
        case 0:
            return None
        case errno.EADDRINUSE:
            return error("endpoint", f"{where}: taken by another process", f"choose another {facts.setting}")
        case errno.EACCES:
            return error("endpoint", f"{where}: a port below 1024 needs rights", "choose a port above 1023")
        case errno.EADDRNOTAVAIL:
            return error("endpoint", f"{where}: this host has no such address", "ip address lists those it has")
        case other:
            return error("endpoint", f"{where}: {os.strerror(other)}", f"choose another {facts.setting}")


def tcp(facts: TcpFacts) -> list[Finding]:
    """Whether tcp endpoints have keys, and clients."""
    if facts.insecure:
        return [warning("keys", "insecure_tcp: whoever reaches the port can submit jobs and read the traffic",
                        "curve.server_key and curve.client_keys; blendmaskd-keys makes them")]  # fmt: skip
    if facts.server_key:
        return [error("keys", f"curve.server_key: {facts.server_key}", "blendmaskd-keys server")]
    if not facts.folder_there:
        return [error("keys", f"curve.client_keys: {facts.client_keys} is not there", "blendmaskd-keys server")]
    findings = [warning("keys", f"curve.client_keys: {complaint}", "mend or remove the file")
                for complaint in facts.complaints]  # fmt: skip
    if not facts.names:
        return [*findings, warning("keys", f"no client may connect by tcp yet: {facts.client_keys} holds no keys",
                                   "blendmaskd-keys client")]  # fmt: skip
    return [*findings, ok("keys", f"{len(facts.names)} clients may connect by tcp")]
