"""What is really bound for a host that settings name: one address, whoever listens, ZeroMQ or the pages."""
from __future__ import annotations

import errno
import ipaddress
import re
import socket
from typing import TYPE_CHECKING

import psutil

from blendmaskd.endpoints import parse_place

if TYPE_CHECKING:
    import zmq

REMEDY = "choose another endpoint; `blendmaskd check` says what is in the way"
REMEDIES = {
    errno.EADDRNOTAVAIL: "it is no address of this host",
    errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE",
}


def address(host: str) -> str:
    """The address for ``*``, an address, an interface or a name; IPv4 where there is a choice. Raises OSError."""
    if host == "*":
        return "0.0.0.0"
    if host in (interfaces := psutil.net_if_addrs()):
        found = [(each.family, each.address) for each in interfaces[host]]
    else:
        found = [(each[0], str(each[4][0])) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    for family in (socket.AF_INET, socket.AF_INET6):
        if own := [text for kind, text in found if kind == family]:
            return own[0]
    raise OSError(f"{host} has no address")


def unbound(error: OSError | zmq.ZMQError) -> str:
    """What the system said of an endpoint at which nothing can listen, and what to do about it."""
    return f"{error.strerror or error}; {REMEDIES.get(error.errno or 0, REMEDY)}"


def is_loopback(endpoint: str | None) -> bool:
    """Whether HOST:PORT is this host's alone; so is None, which is not listened to."""
    if endpoint is None:
        return True
    try:
        return ipaddress.ip_address(address(parse_place(endpoint)[0])).is_loopback
    except OSError:
        return False


def overlap(one: tuple[str, int], other: tuple[str, int]) -> bool:
    """Whether two addresses with ports exclude each other."""
    (first, port), (second, again) = one, other
    return port == again != 0 and (first == second or "0.0.0.0" in (first, second) or "::" in (first, second))


def is_own_name(host: str | None) -> bool:
    """Whether a Host header names this machine so that no DNS can lie about it. HTTP/1.0 may leave it out."""
    if host is None or (name := host_name(host)) == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def host_name(host: str) -> str:
    """A Host header without its port, in small letters."""
    return re.sub(r":\d*$", "", host.strip()).strip("[]").lower()
