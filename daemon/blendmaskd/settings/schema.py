"""Settings: one frozen tree of values from defaults, a YAML file, the environment and flags, in that order.

Later sources win key by key. Everything is checked when it is loaded: an unknown key, a value of the wrong type or
out of range raises `SettingsError`, which names key, value and reason; nothing is guessed. The tree is passed down;
no module reads the environment or the file again.

Environment: ``BLENDMASKD__QUEUE__MAX_JOBS=64`` sets ``queue.max_jobs``; the value is read as YAML. Flags:
``--set queue.max_jobs=64``, and ``--devices cpu:0 cpu:1`` for the commonest.
"""
from __future__ import annotations

import difflib
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from blendmaskd.endpoints import ENDPOINT_SUFFIXES, ipc_path, parse_place
from blendmaskd.topology import Cpus, parse_cpus
from blendmaskd.wanted import HIDDEN

ENVIRONMENT_PREFIX = "BLENDMASKD__"
HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
PROVIDER = re.compile(r"^[A-Za-z0-9]+ExecutionProvider$")
DEVICE = re.compile(r"^(npu|cuda|cpu):(0|[1-9][0-9]*)$")

LARGEST = 1e9  # of seconds and milliseconds: keeps infinity out
Positive = Annotated[float, Meta(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=LARGEST)]
Count = Annotated[int, Meta(ge=1)]
BatchSize = Annotated[int, Meta(ge=1, le=64)]
MOST_HOST_THREADS = 64
HostThreads = Annotated[int, Meta(ge=1, le=MOST_HOST_THREADS)]


class SettingsError(ValueError):
    """A key, value or file that cannot be used; the message names it and says why."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Model(_Section, frozen=True):
    """The network, its weights and its arithmetic."""

    config: str = "configs/BlendMask/R_50_1x.yaml"  # the network's configuration: a YAML file with AdelaiDet's keys
    # an AdelaiDet checkpoint: {"model": state_dict}, or the state dict alone; for the engine onnx the folder that
    # `scripts/export_onnx.py` wrote
    weights: str | None = None
    # hf32: HF32 on NPUs, TF32 on CUDA; native: what the device does by itself; auto: bf16 on CPUs that measure faster
    # in it, native on NPUs without float32 (910A, 310P), which refuse fp32, hf32 and bf16; else fp32; fp16: not on CPUs
    precision: Literal["fp32", "hf32", "bf16", "fp16", "native", "auto"] = "fp32"
    # true: AdelaiDet's order of operations, image by image; slower. false: the same except for rounding
    exact: bool = False
    # exact: Pillow's resizing, as detectron2's; fast: torch's, inexact: up to 0.4% of values are off by one
    resize: Literal["exact", "fast"] = "exact"
    # record a graph for each size in warm_up; npu and cuda only. Never run on hardware by this project
    graphs: bool = False
    # file with a COCO `categories` list; default: the one beside the weights, COCO's 80, or class_N
    categories: str | None = None
    # onnxruntime's execution providers for the engine onnx, the preferred one first; each must be there
    providers: list[str] = msgspec.field(default_factory=lambda: ["CPUExecutionProvider"])


class Endpoints(_Section, frozen=True):
    """Where the daemon listens."""

    # where clients connect: ipc:///PATH, guarded by its folder's mode, or tcp://HOST:PORT, guarded by keys (`curve`)
    clients: list[str] = msgspec.field(default_factory=lambda: ["ipc:///run/blendmaskd/client.sock"])
    metrics: str | None = "127.0.0.1:9464"  # HOST:PORT of the status page, /metrics, /healthz, /readyz; null: none


class Curve(_Section, frozen=True):
    """Keys for tcp:// endpoints: encryption, and who may connect. `blendmaskd-keys` makes them."""

    server_key: str | None = None  # path of the daemon's server.key_secret, mode 0600; required for tcp://
    client_keys: str | None = None  # folder with the public keys of allowed clients; changes take effect at once


class Http(_Section, frozen=True):
    """The HTTP front, `blendmaskd-http`, a process of its own; the daemon itself reads none of these keys."""

    endpoint: str = "127.0.0.1:9466"  # HOST:PORT where blendmaskd-http listens; another address than loopback: tokens
    # path of the file with a line `NAME TOKEN` for each client, mode 0600; changes take effect at once; null: no tokens
    tokens: str | None = None
    insecure: bool = False  # allow another endpoint than loopback without tokens: anyone who reaches it can submit
    # names by which clients call the front (Host header), beside its addresses and localhost
    hosts: list[str] = []
    certificate: str | None = None  # path of a PEM file with the certificate chain: HTTPS; read anew when it changes
    key: str | None = None  # path of the PEM file with the certificate's private key
    # number of processes that share the endpoint; one takes several hundred photographs per second from clients
    processes: Annotated[int, Meta(ge=1, le=64)] = 1
    max_connections: Count = 256  # of one process; the longest idle one makes room, and where none is, answers are 503
    max_bytes: Count = 1 << 30  # maximum total size of the requests that one process holds, in bytes
    receive_s: Positive = 60.0  # time in which a request has to arrive
    send_s: Positive = 60.0  # time in which a client has to read what waits for it, answer by answer
    idle_s: Positive = 75.0  # how long a connection may be idle
    # how long a request waits for a daemon that is not there, as when it restarts; then it is answered `unavailable`
    daemon_wait_s: NotNegative = 10.0
    # where spans go by OTLP, such as http://127.0.0.1:4318/v1/traces (extra otel); null: none
    traces: str | None = None

    @property
    def url(self) -> str:
        """Where the front listens."""
        return f"{'https' if self.certificate else 'http'}://{self.endpoint}"


class Queue(_Section, frozen=True):
    """Bounds on jobs; a job beyond any of them is answered `busy` at once.

    A single client can fill at most seven eighths of the queue, all clients of a user or key 63 of 64 parts; the rest
    is reserved for others.
    """

    max_jobs: Count = 256  # maximum number of jobs waiting for a device
    max_bytes: Count = 1 << 30  # maximum total size of their images, in bytes
    # maximum number of unanswered jobs of one client; durable jobs are counted separately; null: the queue's own bound
    max_jobs_per_client: Count | None = None
    max_bytes_per_client: Count | None = None  # the same for the size of their images, in bytes


class Limits(_Section, frozen=True):
    """Bounds on one image."""

    max_image_bytes: Count = 64 << 20  # maximum size of one image as sent, encoded or raw (three bytes per pixel)
    # maximum height x width; decoding takes up to 16 bytes per pixel in each of `runtime.host_threads`
    max_image_pixels: Count = 50_000_000
    # maximum CPU seconds for decoding and resizing one image; more ends its worker, and makes the image a suspect
    max_decode_s: Positive = 20.0
    # maximum number of tcp:// connections; with local ones never more than half of the descriptors
    max_connections: Count = 512


class Paths(_Section, frozen=True):
    """Server-side images: a job may name a file below one of `roots`; with none, it may not."""

    roots: list[str] = []  # folders whose files a job may name, after resolving links; empty: jobs may not name files


class Log(_Section, frozen=True):
    """What is logged to stderr or the journal; see docs/logs.md. Takes effect on reload."""

    format: Literal["text", "json"] = "text"  # text: one line per event; json: one JSON object per line
    level: Literal["debug", "info", "warning", "error"] = "info"  # lowest level written
    # log every state change of a job; false: only jobs that fail through no fault of their client
    jobs: bool = False


class Runtime(_Section, frozen=True):
    """How a worker process is set up when it is started."""

    # CPUs per device, {"npu:0": "0-15"}; auto: those near the device, or else an even split
    cpus: Literal["auto"] | dict[str, str] = "auto"
    task_queue: Literal[0, 1, 2] = 2  # torch_npu's TASK_QUEUE_ENABLE; at most 1 with `model.graphs`
    # torch_npu's CPU_AFFINITY_CONF; its ranges refer to slots (2,npu1:8-15); a mode alone uses the slot's CPUs
    cpu_affinity_conf: str | None = None
    preload: str = "auto"  # tcmalloc: auto (if installed), required, off, or the path of another allocator
    # OMP_NUM_THREADS; auto: the slot's number of CPUs, limited to its share of a CPU quota
    threads: Literal["auto"] | Count = "auto"
    # threads of a worker that decode and resize images and encode masks, beside the one that drives its device; auto:
    # the slot's number of CPUs, limited to its share of a CPU quota, 2 to 64
    host_threads: Literal["auto"] | HostThreads = "auto"

    @property
    def placed(self) -> dict[str, Cpus]:
        """The devices whose CPUs are named here, with these; none with auto."""
        return {} if self.cpus == "auto" else {device: parse_cpus(text) for device, text in self.cpus.items()}


class Restarts(_Section, frozen=True):
    """How dead or unresponsive workers are replaced."""

    first_delay_s: Positive = 0.5  # delay before a dead worker is restarted; doubled after each consecutive death
    longest_delay_s: Positive = 30.0  # upper bound of the restart delay
    # number of consecutive deaths, with less than `stable_s` of service in between, after which a slot fails
    give_up_after: Count = 6
    retry_failed_s: Positive = 60.0  # a failed slot is tried once every so often, until it serves again
    stable_s: Positive = 60.0  # time of service after which earlier deaths no longer count
    start_timeout_s: Positive = 900.0  # maximum time for loading, compiling and warm-up
    # a worker that finishes none of its leases, or sends nothing, for this long is aborted, then killed
    stall_s: Positive = 60.0
    stop_s: Positive = 10.0  # time between asking a worker to exit and killing it


class Timed(_Section, frozen=True):
    """The `timed` engine's latency table: batch size to milliseconds (defaults: one Ascend 910, 800x800)."""

    # milliseconds by batch size, interpolated between entries; engine `timed` only
    latency_ms: dict[BatchSize, NotNegative] = msgspec.field(
        default_factory=lambda: {1: 21.79, 2: 38.90, 4: 122.43, 8: 226.38}
    )
    # how many of these milliseconds the second visit takes, which blends the masks; at most all
    blend_ms: dict[BatchSize, NotNegative] = msgspec.field(default_factory=lambda: {1: 2.0, 2: 3.6})
    # .npz file of recorded candidates and masks used for every image; the host's work is then the native engine's
    outputs: str | None = None


class Settings(_Section, frozen=True):
    """The whole tree. Field names are the keys of the YAML file."""

    # npu:N, cuda:N or cpu:N, one worker process each; N counts the devices visible to the daemon
    devices: list[str] = msgspec.field(default_factory=lambda: ["npu:0", "npu:1"])
    # native: the built-in network; onnx: the same, exported, on CPUs by onnxruntime (docs/onnx.md); adelaidet: an
    # installed AdelaiDet; timed: a latency table, for load tests
    engine: Literal["native", "onnx", "adelaidet", "timed"] = "native"
    model: Model = Model()
    endpoints: Endpoints = Endpoints()
    curve: Curve = Curve()
    http: Http = Http()
    # allow tcp:// without keys: anyone who reaches the port can submit jobs and read the traffic
    insecure_tcp: bool = False
    # images per run on the device; auto: the batch with the highest throughput, learned per padded size; 1 with exact
    batch: Literal["auto"] | BatchSize = "auto"
    # known milliseconds by batch size, as a start for `batch: auto`; the timed engine's table is known
    batch_latency_ms: dict[BatchSize, Positive] = {}
    # upper bound of the device time of a batch that `batch: auto` may choose
    latency_target_ms: Positive | None = None
    # how long an idle device waits for a batch to fill; it never waits while jobs arrive one at a time
    max_wait_ms: NotNegative = 0.0
    # image sizes (height, width) to run, alone and in a full batch, before a worker is ready
    warm_up: list[tuple[Count, Count]] = msgspec.field(default_factory=lambda: [(800, 800)])
    queue: Queue = Queue()
    limits: Limits = Limits()
    paths: Paths = Paths()
    # maximum shared memory of all local clients together; one region has at most a quarter; 0: images use the socket
    shared_memory_bytes: Annotated[int, Meta(ge=0)] = 1 << 30
    # file on a local disk that stores durable jobs and their answers, created if missing; null: no durable jobs
    spool: str | None = None
    # maximum size of images and answers in the spool; beyond it durable jobs are answered `busy`
    spool_bytes: Count = 4 << 30
    spool_keep_s: Positive = 604800.0  # how long an answer is kept, counted while the daemon runs
    # number of workers that may die on a job before it fails; 1: all that was on the device of one that dies fails
    max_attempts: Count = 2
    deadline_s: Positive = 60.0  # default deadline of a job
    drain_s: Positive = 30.0  # time allowed for accepted jobs to finish after SIGTERM
    window_s: Positive = 10.0  # window over which FPS are averaged
    # how often npu-smi is asked for the health of NPUs; a slot whose card is in Alarm or Critical rests; 0: never
    npu_health_s: NotNegative = 10.0
    log: Log = Log()
    # show the last image and its results on the status page, to anyone who can open it
    show_last_image: bool = False
    runtime: Runtime = Runtime()
    restarts: Restarts = Restarts()
    # variables added to every worker's environment, overriding those the daemon sets; no statistics show their values
    worker_env: dict[str, str] = {}
    timed: Timed = Timed()


def load(
    path: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    devices: Sequence[str] | None = None,
) -> Settings:
    """Settings from a YAML file, an environment and ``key.sub=value`` overrides, checked.

    Raises `SettingsError` for an unreadable file, an unknown key or a bad value.
    """
    tree = _read(path) if path else {}
    for name, text in sorted((environment or {}).items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            _put(tree, _keys(name.removeprefix(ENVIRONMENT_PREFIX), "__"), _yaml(text, name), name)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise SettingsError(f"--set {override}: expected KEY=VALUE")
        _put(tree, _keys(key, "."), _yaml(text, key), key)
    if devices:
        tree["devices"] = list(devices)
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> Settings:
    """Settings from nested plain values; raises `SettingsError`."""
    runtime = tree.get("runtime")
    if isinstance(runtime, dict) and runtime.get("preload") is False:  # YAML reads a bare `off` as false
        tree = {**tree, "runtime": {**runtime, "preload": "off"}}
    try:
        settings = msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(str(error), tree)) from None
    _check(settings)
    return settings


def to_tree(settings: Settings) -> dict[str, Any]:
    """The inverse of `from_tree`: plain values, every key present."""
    tree: dict[str, Any] = msgspec.to_builtins(settings)
    return tree


def _read(path: str | Path) -> dict[str, Any]:
    import yaml  # of the extra serve, as in `_yaml`: clients have this module too

    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
        _refuse_doubles(yaml.compose(text, yaml.SafeLoader), str(path))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def _yaml(text: str, name: str) -> Any:
    import yaml

    if " #" in text and not text.startswith(('"', "'", "[", "{")):
        raise SettingsError(f"{name}={text}: YAML takes what follows ' #' for a comment: put the value into quotes")
    try:
        value = yaml.safe_load(text)
        _refuse_doubles(yaml.compose(text, yaml.SafeLoader), name)
    except yaml.YAMLError as error:
        raise SettingsError(f"{name}={text}: not a YAML value: {error}") from None
    return value


def _refuse_doubles(node: Any, source: str, section: str = "", done: tuple[Any, ...] = ()) -> None:
    """Of a key that is given twice, YAML would silently take the last. `done`: the sections around this one."""
    seen: dict[str, int] = {}
    for key, value in node.value if node is not None and node.id == "mapping" and node not in done else ():
        name, line = f"{section}{key.value}", key.start_mark.line + 1
        if name in seen:
            raise SettingsError(f"{source}: {name} is given twice, in lines {seen[name]} and {line}")
        seen[name] = line
        _refuse_doubles(value, source, f"{name}.", (*done, node))


def _keys(name: str, separator: str) -> list[Any]:
    """The way to a value in the tree. Names of settings may be in capitals; below a free map, such as `worker_env`, a
    key stays as it is, and a number is one.
    """
    keys: list[Any] = []
    section, rest = Settings, name
    while rest:
        if not (isinstance(section, type) and issubclass(section, _Section)):
            return [*keys, int(rest) if rest.isdecimal() else rest]
        key, _, rest = rest.partition(separator)
        keys.append(key.lower() if separator == "__" else key)
        section = next((each.type for each in msgspec.structs.fields(section) if each.name == keys[-1]), Settings)
    return keys or [name]


def _put(tree: dict[str, Any], keys: list[Any], value: Any, name: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise SettingsError(f"{name}: {key} is not a section")
    tree[keys[-1]] = value


def _explain(error: str, tree: Any) -> str:
    """msgspec's ``reason - at `$.queue.max_jobs` `` as ``queue.max_jobs = -1: reason``."""
    reason, _, where = error.partition(" - at `$")
    key = where.rstrip("`").lstrip(".")
    value = tree
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(value, list) and part.isdigit():
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part, value)
    unknown = re.search(r"unknown field `(.+)`", reason)
    if unknown:
        return f"{key + '.' if key else ''}{unknown[1]}: unknown key{_instead(key, unknown[1])}"
    if key.startswith("worker_env["):
        value = dict.fromkeys(value, HIDDEN)
    return f"{key or 'settings'} = {value!r}: {reason}"


def _instead(section: str, unknown: str) -> str:
    known = msgspec.to_builtins(Settings())
    for part in section.split(".") if section else ():
        known = known[part]
    close = difflib.get_close_matches(unknown, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _check(settings: Settings) -> None:
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
    if settings.spool is not None and (not settings.spool or settings.spool.endswith("/") or "\0" in settings.spool):
        raise SettingsError(f"spool = {settings.spool!r}: expected the path of a file")
    _check_files(settings)
    for key in ("latency_ms", "blend_ms"):
        if 1 not in getattr(settings.timed, key):
            raise SettingsError(f"timed.{key}: needs an entry for batch size 1")
    if settings.batch != "auto" and settings.engine == "timed" and settings.batch not in settings.timed.latency_ms:
        raise SettingsError(f"batch = {settings.batch}: timed.latency_ms has no entry for it")


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
    against = None
    if settings.engine == "adelaidet":
        against = "the engine adelaidet is AdelaiDet itself"
    elif settings.engine == "timed":
        against = "the engine timed has no network"
    elif settings.engine == "onnx":
        against = "the engine onnx runs the network that is made for inference"
    elif model.precision != "fp32":
        against = f"model.precision = {model.precision!r} may round below float32"
    elif model.resize == "fast":
        against = "model.resize = 'fast' resizes inexactly"
    elif model.graphs:
        against = "model.graphs = True has never been compared with the network as trained"
    elif settings.batch not in ("auto", 1):
        against = f"batch = {settings.batch}: images are run one by one, as libraries sum a batch in another order"
    if against:
        raise SettingsError(f"model.exact = True: {against}; remove one of the two")


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
    try:
        parse_place(endpoints.metrics or "*:*")
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
