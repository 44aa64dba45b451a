"""Endpoints as people write them: ipc:///PATH, tcp://HOST:PORT, and HOST:PORT of the pages. Pure.

HOST is an IPv4 address, an IPv6 address in brackets, a name, an interface (to listen), or ``*``: all IPv4 addresses.
"""
from __future__ import annotations

import ipaddress
import re

from blendmaskd.protocol import MEMORY_SUFFIX

LARGEST_PORT = 65535
SOCKET_PATH_BYTES = 107  # sockaddr_un, without its final zero
LOCK_SUFFIX = ".lock"
ENDPOINT_SUFFIXES = ("", MEMORY_SUFFIX, LOCK_SUFFIX)  # of the files of an ipc endpoint

_PLACE = re.compile(r"(?P<host>\[[^\[\]]+\]|\*|[\w.-]+):(?P<port>\d{1,5}|\*)", re.ASCII)


def ipc_path(endpoint: str) -> str:
    """The path in ipc:///PATH. Raises ValueError for one that is not absolute: it would depend on who reads it."""
    path = endpoint.removeprefix("ipc://")
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ValueError("expected ipc:///PATH, three slashes and the path of a socket from the root")
    return path


def parse_place(text: str) -> tuple[str, int]:
    """Host, without brackets, and port of HOST:PORT; the port ``*`` is 0. Raises ValueError, which says why."""
    if not (found := _PLACE.fullmatch(text)):
        raise ValueError("expected HOST:PORT, an IPv6 address in brackets")
    host, port = found["host"], int(found["port"].replace("*", "0"))
    if port > LARGEST_PORT:
        raise ValueError(f"port {port}: expected at most {LARGEST_PORT}")
    if host.startswith("["):
        host = host[1:-1]
        ipaddress.IPv6Address(host)
    elif re.fullmatch(r"[\d.]+", host):
        ipaddress.IPv4Address(host)
    return host, port


def place(host: str, port: int) -> str:
    """HOST:PORT again, for ZeroMQ."""
    return f"[{host}]:{port or '*'}" if ":" in host else f"{host}:{port or '*'}"
