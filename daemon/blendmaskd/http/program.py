"""Serve HTTP in front of a running daemon.

    blendmaskd-http --settings configs/daemon.yaml
    blendmaskd-http --settings configs/daemon.yaml --set http.endpoint=127.0.0.1:8080

The settings are the daemon's own file: the daemon's first ipc endpoint is where requests go, the keys below `http` say
who may ask. docs/http.md shows the requests. SIGTERM and SIGINT drain and stop.
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

from prometheus_client import multiprocess

from blendmaskd import flags, logs, output
from blendmaskd.assignment import EXIT_CANNOT_BOOT
from blendmaskd.endpoints import parse_place
from blendmaskd.http import certificate
from blendmaskd.http.application import application
from blendmaskd.http.connections import BACKLOG, Server
from blendmaskd.http.metrics import FOLDER_VARIABLE, Metrics
from blendmaskd.http.tokens import Tokens, TokensError, state
from blendmaskd.logs import about
from blendmaskd.settings import Http, Settings, SettingsError
from blendmaskd.shell import systemd
from blendmaskd.shell.addresses import address, is_loopback, unbound

if TYPE_CHECKING:
    from blendmaskd.http.tracing import Tracing

log = logging.getLogger("blendmaskd.http")

NAME = "blendmaskd-http"
AGAIN_S = 1.0  # after a process that died
RENEW_S = 1.0  # certificates


def main(argv: list[str] | None = None) -> int:
    parser = flags.parser(NAME, __doc__)
    parser.add_argument("--check-settings", action="store_true", help="only check them; exit code 78 if invalid")
    parser.add_argument("--descriptor", type=int, help=argparse.SUPPRESS)  # of a socket: one of several processes
    arguments = parser.parse_args(argv)
    try:
        settings = flags.loader(arguments)()
        endpoint, tokens, tls = broker(settings), admitted(settings.http), encryption(settings.http)
        if arguments.check_settings:
            return 0
        listening = listen(settings.http, arguments.descriptor)
    except (SettingsError, TokensError, OSError) as error:
        output.complain(f"{NAME}: {error}")
        return EXIT_CANNOT_BOOT
    logs.configure(settings.log)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # its warnings are of what strangers send
    if settings.http.processes > 1 and arguments.descriptor is None:
        return asyncio.run(several(settings, listening, sys.argv[1:] if argv is None else argv))
    metrics, tracing = Metrics(), traced(settings.http)
    app = application(settings, endpoint, tokens, is_loopback(settings.http.endpoint), metrics, tracing)
    server = Server(app, settings.http, settings.drain_s, tls)
    return asyncio.run(serve(server, settings.http, tls, listening, metrics, alone=arguments.descriptor is None))


def broker(settings: Settings) -> str:
    """Where requests go. Raises `SettingsError`."""
    for endpoint in settings.endpoints.clients:
        if endpoint.startswith("ipc://"):
            return endpoint
    raise SettingsError("endpoints.clients: the HTTP front needs an ipc:///PATH endpoint on its host")


def admitted(http: Http) -> Tokens | None:
    """Who may ask; None: whoever can reach the endpoint. Raises `SettingsError` or `TokensError`."""
    if http.tokens:
        return Tokens(http.tokens)
    if not http.insecure and not is_loopback(http.endpoint):
        raise SettingsError(
            f"http.endpoint = {http.endpoint!r} without tokens is open to anyone who can reach it: name a file of them "
            "as http.tokens, or accept the risk with http.insecure: true"
        )
    return None


def encryption(http: Http) -> ssl.SSLContext | None:
    """Raises `SettingsError`."""
    if not http.certificate or not http.key:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        certificate.load(context, http.certificate, http.key)
    except OSError as error:
        reason = error.strerror or error
        raise SettingsError(f"http.certificate = {http.certificate!r}, http.key = {http.key!r}: {reason}") from None
    return context


def traced(http: Http) -> Tracing | None:
    """Where spans go, if anywhere. Raises ModuleNotFoundError without the extra otel."""
    if http.traces is None:
        return None
    from blendmaskd.http.tracing import Tracing

    return Tracing(http.traces)


def listen(http: Http, descriptor: int | None) -> socket.socket:
    """Raises OSError, which names the endpoint."""
    if descriptor is not None:
        return socket.socket(fileno=descriptor)
    host, port = parse_place(http.endpoint)
    try:
        found = address(host)
        family = socket.AF_INET6 if ":" in found else socket.AF_INET
        listening = socket.socket(family, proto=socket.IPPROTO_TCP)  # named: else asyncio sets no TCP_NODELAY
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((found, port))
        listening.listen(BACKLOG)
    except OSError as error:
        raise OSError(f"http.endpoint = {http.endpoint!r}: {unbound(error)}") from None
    return listening


async def serve(
    server: Server, http: Http, tls: ssl.SSLContext | None, listening: socket.socket, metrics: Metrics, alone: bool
) -> int:
    """Until SIGTERM or SIGINT; when it is not `alone`, also until the process that started it dies."""
    host, port = listening.getsockname()[:2]
    if not alone:
        asyncio.get_running_loop().add_reader(0, server.stop)  # the kernel closes its other end with our parent
    notifier = systemd.from_environment()
    watching = asyncio.create_task(_watch(server, http, tls, metrics, notifier))
    serving = asyncio.create_task(server.serve([listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    log.info("serving %s://%s:%d", "https" if tls else "http", host, port)
    if alone:
        notifier.send(READY="1", STATUS=f"serving {host}:{port}")
    await serving
    watching.cancel()
    return 0


async def _watch(
    server: Server, http: Http, tls: ssl.SSLContext | None, metrics: Metrics, notifier: systemd.Notifier
) -> None:
    """Each second: the loop lives, how many connections there are, and whether there is another certificate."""
    seen = _written(http)
    while True:
        await asyncio.sleep(RENEW_S)
        notifier.send(WATCHDOG="1")
        metrics.connections.set(len(server.server_state.connections))
        if tls is None or (written := _written(http)) == seen:
            continue
        seen = written
        try:
            encryption(http)  # in one that is in use, half of a pair that does not match would stay
            certificate.load(tls, str(http.certificate), str(http.key))
            log.info("the certificate was read anew")
        except (SettingsError, OSError) as error:
            log.error("the certificate that was read before stays: %s", error)


def _written(http: Http) -> list[object]:
    """Which the certificate's files are."""
    return [state(path) for path in (http.certificate, http.key) if path]


async def several(settings: Settings, listening: socket.socket, argv: list[str]) -> int:
    """Processes that share a socket, each started anew when it dies, until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    with tempfile.TemporaryDirectory(prefix="blendmaskd-http-") as folder:
        keeping = [asyncio.create_task(_keep(argv, listening.fileno(), folder, stopping))
                   for _ in range(settings.http.processes)]  # fmt: skip
        notifier = systemd.from_environment()
        notifier.send(READY="1", STATUS=f"{settings.http.processes} processes")
        while not stopping.is_set():
            notifier.send(WATCHDOG="1")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), 1.0)
        await asyncio.gather(*keeping)
    return 0


async def _keep(argv: list[str], descriptor: int, folder: str, stopping: asyncio.Event) -> None:
    """One of several processes; `folder` is where they count."""
    command = [sys.executable, "-P", "-m", "blendmaskd.http.program", *argv, "--descriptor", str(descriptor)]
    environment = {**os.environ, FOLDER_VARIABLE: folder}
    environment.pop("NOTIFY_SOCKET", None)
    while not stopping.is_set():
        child = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.PIPE, env=environment, pass_fds=[descriptor]
        )
        ended, stop = asyncio.create_task(child.wait()), asyncio.create_task(stopping.wait())
        await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            child.terminate()
        code = await ended
        multiprocess.mark_process_dead(child.pid, folder)  # type: ignore[no-untyped-call]
        if not stopping.is_set():
            log.error("a process has ended with %d: another one is started", code, extra=about(pid=child.pid))
            await asyncio.wait({stop}, timeout=AGAIN_S)
        stop.cancel()


if __name__ == "__main__":
    sys.exit(main())
