"""How a program reaches its daemon: the flags for it, keys, and waiting for one that is starting."""
from __future__ import annotations

import argparse
import os
import time
from typing import Any

from blendmaskd.client.blocking import Client, HandshakeError
from blendmaskd.programs.arguments import positive, seconds
from blendmaskd.programs.errors import NoDaemonError, UsageError

SERVER_KEY_VARIABLE, KEY_VARIABLE = "BLENDMASKD_SERVER_KEY", "BLENDMASKD_KEY"
ANSWER_S = 3.0  # a daemon that runs answers at once


def add_connection(parser: argparse.ArgumentParser) -> None:
    """The arguments of `connect`, and how many jobs to keep in flight."""
    parser.add_argument("--window", metavar="N", type=positive, default=16, help="jobs in flight, default 16")
    parser.add_argument("--timeout", metavar="S", type=seconds, default=60.0, help="for an image's answer, default 60")
    parser.add_argument("--wait", metavar="S", type=seconds, default=ANSWER_S,
                        help=f"for a daemon that is starting, default {ANSWER_S:g}")  # fmt: skip
    add_keys(parser)


def add_keys(parser: argparse._ActionsContainer) -> None:
    """The keys among the arguments of `make_client`."""
    parser.add_argument("--server-key", metavar="FILE", help="the daemon's public key, server.key, for a tcp endpoint; "
                        f"default: ${SERVER_KEY_VARIABLE}")  # fmt: skip
    parser.add_argument("--key", metavar="FILE", help="your own secret key, NAME.key_secret, see blendmaskd-keys; "
                        f"default: ${KEY_VARIABLE}")  # fmt: skip


def make_client(arguments: argparse.Namespace, timeout_s: float) -> Client:
    """A client with the keys of flags, or for a tcp endpoint of the environment.

    Raises `UsageError` for a bad endpoint or key.
    """
    environment = os.environ if arguments.endpoint.startswith("tcp://") else {}
    server_key = arguments.server_key or environment.get(SERVER_KEY_VARIABLE)
    key = arguments.key or environment.get(KEY_VARIABLE)
    try:
        return Client(arguments.endpoint, timeout_s=timeout_s, server_key=server_key, key=key)
    except ValueError as error:
        raise UsageError(str(error)) from None


def connect(arguments: argparse.Namespace) -> Client:
    """A client of a daemon that can serve. Raises `UsageError` for a bad endpoint or key, and `NoDaemonError`."""
    client = make_client(arguments, arguments.wait)
    try:
        wait_for_daemon(client, arguments.wait)
    except BaseException:
        client.close()
        raise
    client.timeout_s = arguments.timeout
    return client


def wait_for_daemon(client: Client, wait_s: float) -> None:
    """Return when a device can serve, or after `wait_s` when one still may: the daemon keeps the jobs until then.

    Raises `NoDaemonError` when nobody answers within `client.timeout_s`, or when all devices have failed.
    """
    deadline = time.monotonic() + wait_s
    try:
        while not (snapshot := client.stats()).get("serving"):
            _refuse_hopeless(client.endpoint, snapshot)
            if time.monotonic() >= deadline:
                return
            time.sleep(0.2)
    except TimeoutError:
        raise NoDaemonError(
            f"no daemon answers at {client.endpoint} within {client.timeout_s:g} s: start one, or check the endpoint "
            f"(endpoints.clients in its settings); --wait S waits longer for one that is starting.{client.hint}"
        ) from None
    except HandshakeError as error:
        raise NoDaemonError(str(error)) from None


def _refuse_hopeless(endpoint: str, snapshot: dict[str, Any]) -> None:
    devices = snapshot.get("devices", [])
    if devices and all(device["state"] in ("failed", "ended") for device in devices):
        reasons = "; ".join(f"{device['device']} {device['state']}: {device['reason']}" for device in devices)
        raise NoDaemonError(f"the daemon at {endpoint} has no device able to serve: {reasons}")
