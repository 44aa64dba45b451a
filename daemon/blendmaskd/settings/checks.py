"""What no type says of settings: values that do not go together, or that nothing could be done with."""
from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from blendmaskd.endpoints import ENDPOINT_SUFFIXES, ipc_path, parse_place
from blendmaskd.settings.schema import Endpoints, Model, Settings, SettingsError

DEVICE = re.compile(r"^(npu|cuda|cpu):(0|[1-9][0-9]*)$")
HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
PROVIDER = re.compile(r"^[A-Za-z0-9]+ExecutionProvider$")


def check(settings: Settings) -> None:
    """Raises `SettingsError`."""
    _check_texts("", msgspec.to_builtins(settings))
    if wrong := [name for name in settings.worker_env if not name or "=" in name]:
        raise SettingsError(f"worker_env: {wrong[0]!r}: expected the name of a variable, without =")
    _check_devices(settings.devices)
    _check_endpoints(settings.endpoints)
    _check_keys(settings)
    _check_http(settings)
    runtime = settings.runtime
    for device, cpus in runtime.placed.items():
        if device not in settings.devices:
            raise SettingsError(f"runtime.cpus.{device}: not among devices {settings.devices}")
        if not cpus and runtime.cpus != "auto":
            text = runtime.cpus[device]
            raise SettingsError(f"runtime.cpus.{device} = {text!r}: expected a CPU list such as 0-7,16")
    preload = runtime.preload
    if preload not in ("auto", "required", "off") and not preload.startswith("/"):
        raise SettingsError(f"runtime.preload = {preload!r}: expected auto, required, off or an absolute path")
    _check_model(settings)
    if settings.spool is not None and settings.spool.endswith("/"):
        raise SettingsError(f"spool = {settings.spool!r}: expected the path of a file")
    _check_files(settings)
    for key in ("latency_ms", "blend_ms"):
        if 1 not in getattr(settings.timed, key):
            raise SettingsError(f"timed.{key}: needs an entry for batch size 1")
    if settings.batch != "auto" and settings.engine == "timed" and settings.batch not in settings.timed.latency_ms:
        raise SettingsError(f"batch = {settings.batch}: timed.latency_ms has no entry for it")


def _check_texts(key: str, value: Any) -> None:
    """What no path and no environment can hold ends the start where it is used, as does what is empty."""
    if value == "" and not key.startswith("worker_env"):
        raise SettingsError(f"{key} = '': leave it out, or say null where that is possible")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_texts(key, name)
            _check_texts(f"{key}.{name}".lstrip("."), inner)
    for inner in value if isinstance(value, list) else ():
        _check_texts(key, inner)
    try:
        fits = not isinstance(value, str) or b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        fits = False
    if not fits:  # it may be a secret: only where it is
        raise SettingsError(f"{key}: expected text without NUL, of characters that the locale's encoding has")


def _check_model(settings: Settings) -> None:
    """What an engine or a device would otherwise refuse only after a reload has begun."""
    precision, graphs = settings.model.precision, settings.model.graphs
    if settings.engine == "adelaidet" and precision not in ("fp32", "hf32", "native"):
        raise SettingsError(f"model.precision = {precision!r}: the engine adelaidet computes in fp32, hf32 or native")
    if settings.engine == "adelaidet" and settings.model.resize == "fast":
        raise SettingsError("model.resize = 'fast': the engine adelaidet resizes as detectron2 does, which is exact")
    if settings.engine == "adelaidet" and graphs:
        raise SettingsError("model.graphs = True: the engine adelaidet does not support graphs")
    cpus = [device for device in settings.devices if device.startswith("cpu:")]
    if settings.engine == "native" and graphs and cpus:
        raise SettingsError(f"model.graphs = True: {cpus[0]} is a CPU, which does not support graphs")
    if settings.engine == "onnx":
        _check_onnx(settings)
    elif settings.model.providers != Model().providers:
        raise SettingsError(f"model.providers = {settings.model.providers}: only the engine onnx has any")
    if settings.model.exact:
        _check_exact(settings)


def _check_onnx(settings: Settings) -> None:
    model, providers = settings.model, settings.model.providers
    if model.precision != "fp32":
        raise SettingsError(f"model.precision = {model.precision!r}: the engine onnx computes in fp32, as was exported")
    if model.graphs:
        raise SettingsError("model.graphs = True: the engine onnx has none to record")
    for device in settings.devices:
        if not device.startswith("cpu:"):
            raise SettingsError(f"devices: {device!r}: the engine onnx serves on cpu:N; the engine native on this one")
    for name in providers:
        if not PROVIDER.match(name):
            raise SettingsError(f"model.providers: {name!r}: expected a name such as CPUExecutionProvider")
    if not providers or len(set(providers)) != len(providers):
        raise SettingsError(f"model.providers = {providers}: name at least one, and none twice")


def _check_exact(settings: Settings) -> None:
    """What would round differently from the network as trained, or cannot run it."""
    model = settings.model
    against = (
        (settings.engine == "adelaidet", "the engine adelaidet is AdelaiDet itself"),
        (settings.engine == "timed", "the engine timed has no network"),
        (settings.engine == "onnx", "the engine onnx runs the network that is made for inference"),
        (model.precision != "fp32", f"model.precision = {model.precision!r} may round below float32"),
        (model.resize == "fast", "model.resize = 'fast' resizes inexactly"),
        (model.graphs, "model.graphs = True has never been compared with the network as trained"),
        (settings.batch not in ("auto", 1),
         f"batch = {settings.batch}: images are run one by one, as libraries sum a batch in another order"),
    )  # fmt: skip
    for holds, reason in against:
        if holds:
            raise SettingsError(f"model.exact = True: {reason}; remove one of the two")


def _check_devices(devices: list[str]) -> None:
    if not devices:
        raise SettingsError("devices = []: name at least one, such as npu:0 or cpu:0")
    for device in devices:
        if not DEVICE.match(device):
            raise SettingsError(f"devices: {device!r}: expected npu:N, cuda:N or cpu:N")
    if len(set(devices)) != len(devices):
        raise SettingsError(f"devices = {devices}: a device is named twice")


def _check_endpoints(endpoints: Endpoints) -> None:
    if len(set(endpoints.clients)) != len(endpoints.clients):
        raise SettingsError(f"endpoints.clients = {endpoints.clients}: one is named twice")
    if not endpoints.clients:
        raise SettingsError("endpoints.clients = []: name at least one, such as ipc:///run/blendmaskd/client.sock")
    for endpoint in endpoints.clients:
        if not endpoint.startswith(("ipc://", "tcp://")):
            raise SettingsError(f"endpoints.clients: {endpoint!r}: expected ipc:///PATH or tcp://HOST:PORT")
        try:
            ipc_path(endpoint) if endpoint.startswith("ipc://") else parse_place(endpoint.removeprefix("tcp://"))
        except ValueError as error:
            raise SettingsError(f"endpoints.clients: {endpoint!r}: {error}") from None
    if endpoints.metrics is None:
        return
    try:
        parse_place(endpoints.metrics)
    except ValueError as error:
        raise SettingsError(f"endpoints.metrics = {endpoints.metrics!r}: {error}") from None


def _check_http(settings: Settings) -> None:
    """Whether the address is public, only the host knows: the front asks when it starts."""
    http = settings.http
    try:
        parse_place(http.endpoint)
    except ValueError as error:
        raise SettingsError(f"http.endpoint = {http.endpoint!r}: {error}") from None
    if http.endpoint == settings.endpoints.metrics and not http.endpoint.endswith(":0"):
        raise SettingsError(f"http.endpoint = {http.endpoint!r}: endpoints.metrics is the same: choose another port")
    if bool(http.certificate) != bool(http.key):
        given, missing = ("certificate", "key") if http.certificate else ("key", "certificate")
        raise SettingsError(f"http.{given} is set, http.{missing} is not: HTTPS needs both")
    if http.tokens and http.insecure:
        raise SettingsError("http.insecure = True: http.tokens say who may ask; remove one of the two")
    if http.traces is not None and not re.match("https?://[^/]", http.traces):
        raise SettingsError(f"http.traces = {http.traces!r}: expected http://HOST:PORT/v1/traces")
    for name in http.hosts:
        if not HOST_NAME.fullmatch(name):
            raise SettingsError(f"http.hosts: {name!r}: expected a name without port, such as gpu1.example.org")


def _check_files(settings: Settings) -> None:
    """Each file that the daemon makes has a path of its own."""
    taken: dict[str, str] = {}
    for setting, path, suffixes in _files(settings):
        for suffix in suffixes:
            name = posixpath.normpath(f"{path}{suffix}")
            if name in taken:
                raise SettingsError(f"{setting}: {name} is also a file of {taken[name]}: give them different paths")
            taken[name] = setting


def _files(settings: Settings) -> Iterator[tuple[str, str, Sequence[str]]]:
    for endpoint in settings.endpoints.clients:
        if endpoint.startswith("ipc://"):
            yield f"endpoints.clients, {endpoint}", ipc_path(endpoint), ENDPOINT_SUFFIXES
    if settings.spool is not None:
        yield f"spool, {settings.spool}", settings.spool, ("", "-wal", "-shm", "-journal")


def _check_keys(settings: Settings) -> None:
    curve = settings.curve
    if bool(curve.server_key) != bool(curve.client_keys):
        given, missing = ("server_key", "client_keys") if curve.server_key else ("client_keys", "server_key")
        raise SettingsError(f"curve.{given} is set, curve.{missing} is not: `blendmaskd-keys server FOLDER` makes both")
    tcp = [endpoint for endpoint in settings.endpoints.clients if endpoint.startswith("tcp://")]
    if tcp and not curve.server_key and not settings.insecure_tcp:
        raise SettingsError(
            f"endpoints.clients: {tcp[0]!r} without keys is open to anyone who can reach it: make keys with "
            "`blendmaskd-keys server FOLDER` and set curve.server_key and curve.client_keys to them, or accept the "
            "risk with insecure_tcp: true"
        )
    if curve.server_key and settings.insecure_tcp:
        raise SettingsError("insecure_tcp = True: tcp:// is secured by curve.server_key; remove one of the two")
