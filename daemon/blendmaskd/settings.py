"""Settings: one frozen tree of values from defaults, a YAML file, the environment and flags, in that order.

Later sources win key by key. Everything is checked when it is loaded: an unknown key, a value of the wrong type or
out of range raises `SettingsError`, which names key, value and reason; nothing is guessed. The tree is passed down;
no module reads the environment or the file again.

Environment: ``BLENDMASKD__QUEUE__MAX_JOBS=64`` sets ``queue.max_jobs``; the value is read as YAML. Flags:
``--set queue.max_jobs=64``, and ``--devices cpu:0 cpu:1`` for the commonest.
"""
from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

ENVIRONMENT_PREFIX = "BLENDMASKD__"
DEVICE = re.compile(r"^(npu|cuda|cpu):(0|[1-9][0-9]*)$")
CPU_LIST = re.compile(r"^\d+(-\d+)?(,\d+(-\d+)?)*$")

LARGEST = 1e9  # of seconds and milliseconds: keeps infinity out
Positive = Annotated[float, Meta(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=LARGEST)]
Count = Annotated[int, Meta(ge=1)]
BatchSize = Annotated[int, Meta(ge=1, le=64)]


class SettingsError(ValueError):
    """A key, value or file that cannot be used; the text names it and says why."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Model(_Section, frozen=True):
    """Which network, with which weights, in which arithmetic."""

    config: str = "configs/BlendMask/R_50_1x.yaml"  # AdelaiDet's own keys
    weights: str | None = None  # a checkpoint: {"model": state_dict}
    # fp32: exact; hf32: HF32 on NPUs, TF32 on CUDA; auto: bf16 on CPUs with AVX512-BF16 or AMX, else fp32; fp16: no CPU
    precision: Literal["fp32", "hf32", "bf16", "fp16", "auto"] = "fp32"
    # record the network's launches for each size of warm_up; npu and cuda. Never run on hardware by this project
    graphs: bool = False
    categories: str | None = None  # a COCO `categories` list; default: beside the weights, else COCO's 80, else class_N


class Endpoints(_Section, frozen=True):
    """Where the daemon listens."""

    # ipc:///PATH, guarded by the mode of its folder, or tcp://HOST:PORT, guarded by keys (curve)
    clients: list[str] = msgspec.field(default_factory=lambda: ["ipc:///run/blendmaskd/client.sock"])
    metrics: str | None = "127.0.0.1:9464"  # host:port of the status page, /metrics, /healthz, /readyz; null: off


class Curve(_Section, frozen=True):
    """Keys for tcp:// endpoints: encryption, and who may connect. `blendmaskd-keys` makes them."""

    server_key: str | None = None  # the daemon's server.key_secret, of mode 0600; needed for tcp://
    client_keys: str | None = None  # folder of the public keys that may connect; watched, no restart for a change


class Queue(_Section, frozen=True):
    """Bounds on jobs; over any, a job is answered `busy` at once.

    One client alone fills seven eighths of the queue: the rest is for others.
    """

    max_jobs: Count = 256  # that wait for a device
    max_bytes: Count = 1 << 30  # of the images that wait
    # unanswered, waiting or on a device; its durable jobs are counted apart; null: as many as the queue lets it
    max_jobs_per_client: Count | None = None
    max_bytes_per_client: Count | None = None  # of the images of its unanswered jobs, durable ones counted apart


class Limits(_Section, frozen=True):
    """Bounds on one image."""

    max_image_bytes: Count = 64 << 20  # of one payload, encoded or raw
    # height x width, checked before decoding, which takes up to 16 bytes for each, in up to four threads of a worker
    max_image_pixels: Count = 50_000_000
    max_connections: Count = 512  # over tcp://, at most half of the descriptors that the process has left


class Paths(_Section, frozen=True):
    """Server-side images: a job may name a file below one of `roots`. Empty: refused."""

    roots: list[str] = []  # folders below which a job may name a file, links resolved; empty: no job may


class Log(_Section, frozen=True):
    """What is written to stderr, or the journal; see docs/logs.md. A reload changes it."""

    format: Literal["text", "json"] = "text"  # a line each; json: an object in a line
    level: Literal["debug", "info", "warning", "error"] = "info"  # and above
    # a line at each change of each job's state, by its name. Off: only of jobs that fail by no fault of their client
    jobs: bool = False


class Runtime(_Section, frozen=True):
    """What is applied to a worker process at spawn."""

    cpus: Literal["auto"] | dict[str, str] = "auto"  # {"npu:0": "0-15"}; auto: near the device, else an even split
    task_queue: Literal[0, 1, 2] = 2  # TASK_QUEUE_ENABLE
    # torch_npu's own binding, CPU_AFFINITY_CONF; ranges name slots (2,npu1:8-15), a bare mode gets the slot's CPUs
    cpu_affinity_conf: str | None = None
    preload: str = "auto"  # tcmalloc: auto, required, off, or a library's path
    threads: Literal["auto"] | Count = "auto"  # OMP_NUM_THREADS; auto: the slot's CPUs, within its share of a quota


class Restarts(_Section, frozen=True):
    """How a slot is kept filled."""

    first_delay_s: Positive = 0.5  # before a dead worker is started again; doubled at each death in a row
    longest_delay_s: Positive = 30.0  # that doubling leads to
    give_up_after: Count = 6  # deaths in a row without `stable_s` of service between them
    stable_s: Positive = 60.0  # a worker that served so long is forgiven its earlier deaths
    start_timeout_s: Positive = 900.0  # loading, compiling and warm-up
    stall_s: Positive = 60.0  # leases held and nothing finished, or no sign of life: abort with a stack dump, then kill
    stop_s: Positive = 10.0  # between asking a worker to end and killing it


class Timed(_Section, frozen=True):
    """The `timed` engine's latency table: batch size to milliseconds (defaults: one Ascend 910, 800x800)."""

    # batch size: milliseconds; sizes between entries are interpolated. For the engine `timed` only
    latency_ms: dict[BatchSize, NotNegative] = msgspec.field(
        default_factory=lambda: {1: 21.79, 2: 38.90, 4: 122.43, 8: 226.38}
    )
    # an .npz of the native network's outputs: the host's work is then the native engine's, and each image gets these
    outputs: str | None = None


class Settings(_Section, frozen=True):
    """The whole tree. Field names are the keys of the YAML file."""

    # npu:N, cuda:N or cpu:N, one worker process each, numbered as the daemon's environment shows them
    devices: list[str] = msgspec.field(default_factory=lambda: ["npu:0", "npu:1"])
    engine: Literal["native", "adelaidet", "timed"] = "native"  # adelaidet: where installed; timed: for load tests
    model: Model = Model()
    endpoints: Endpoints = Endpoints()
    curve: Curve = Curve()
    insecure_tcp: bool = False  # tcp:// without keys: whoever reaches the port can submit, and read the traffic
    # images per run on the device; auto: as many as give most images per second, learned for each padded size
    batch: Literal["auto"] | BatchSize = "auto"
    # what a device is known to take, batch size: milliseconds; where auto begins. The timed engine's table is known
    batch_latency_ms: dict[BatchSize, Positive] = {}
    latency_target_ms: Positive | None = None  # auto never chooses a batch that takes the device longer
    # how long an idle device waits for a batch to fill; not at all while jobs come one at a time
    max_wait_ms: NotNegative = 0.0
    # image sizes (height, width) to run, alone and in a full batch, before a worker is ready
    warm_up: list[tuple[Count, Count]] = msgspec.field(default_factory=lambda: [(800, 800)])
    queue: Queue = Queue()
    limits: Limits = Limits()
    paths: Paths = Paths()
    # of all shared memory of local clients; a region has at most a quarter. 0: off, images come by socket
    shared_memory_bytes: Annotated[int, Meta(ge=0)] = 1 << 30
    # a file on a local disk in which durable jobs and their answers outlive the daemon, made if need be; null: off
    spool: str | None = None
    spool_bytes: Count = 4 << 30  # of images and answers in the spool; over it a durable job is answered `busy`
    spool_keep_s: Positive = 604800.0  # of an answer in the spool, in time that daemons run; then it is dropped
    max_attempts: Count = 2  # times a job may have been started when its worker died
    deadline_s: Positive = 60.0  # of a job that names none
    drain_s: Positive = 30.0  # on SIGTERM, for accepted jobs to finish
    window_s: Positive = 10.0  # over which FPS are counted
    log: Log = Log()
    # on the status page, with its results drawn in: whoever can open the page sees a client's image every few seconds
    show_last_image: bool = False
    runtime: Runtime = Runtime()
    restarts: Restarts = Restarts()
    worker_env: dict[str, str] = {}  # added to every worker's environment, over what the daemon sets; shown by stats
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
            _put(tree, name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"), _yaml(text, name), name)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise SettingsError(f"--set {override}: expected KEY=VALUE")
        _put(tree, key.split("."), _yaml(text, key), key)
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
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
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

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{name}={text}: not a YAML value: {error}") from None


def _put(tree: dict[str, Any], keys: list[str], value: Any, name: str) -> None:
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
    cpus = settings.runtime.cpus
    if isinstance(cpus, dict):
        for device, ranges in cpus.items():
            if device not in settings.devices:
                raise SettingsError(f"runtime.cpus.{device}: not among devices {settings.devices}")
            if not CPU_LIST.match(ranges):
                raise SettingsError(f"runtime.cpus.{device} = {ranges!r}: expected a CPU list such as 0-7,16")
    preload = settings.runtime.preload
    if preload not in ("auto", "required", "off") and not preload.startswith("/"):
        raise SettingsError(f"runtime.preload = {preload!r}: expected auto, required, off or an absolute path")
    _check_model(settings)
    if settings.spool is not None and (not settings.spool or settings.spool.endswith("/")):
        raise SettingsError(f"spool = {settings.spool!r}: expected the path of a file")
    if 1 not in settings.timed.latency_ms:
        raise SettingsError("timed.latency_ms: needs an entry for batch size 1")
    if settings.batch != "auto" and settings.engine == "timed" and settings.batch not in settings.timed.latency_ms:
        raise SettingsError(f"batch = {settings.batch}: timed.latency_ms has no entry for it")


def _check_model(settings: Settings) -> None:
    """What an engine or a device could only refuse when it is too late for a reload."""
    precision, graphs = settings.model.precision, settings.model.graphs
    if settings.engine == "adelaidet" and precision not in ("fp32", "hf32"):
        raise SettingsError(f"model.precision = {precision!r}: the engine adelaidet computes in fp32 or hf32")
    if settings.engine == "adelaidet" and graphs:
        raise SettingsError("model.graphs = True: the engine adelaidet has none")
    cpus = [device for device in settings.devices if device.startswith("cpu:")]
    if settings.engine == "native" and graphs and cpus:
        raise SettingsError(f"model.graphs = True: {cpus[0]} is a CPU, which has none")


def _check_devices(devices: list[str]) -> None:
    if not devices:
        raise SettingsError("devices = []: name at least one, such as npu:0 or cpu:0")
    for device in devices:
        if not DEVICE.match(device):
            raise SettingsError(f"devices: {device!r}: expected npu:N, cuda:N or cpu:N")
    if len(set(devices)) != len(devices):
        raise SettingsError(f"devices = {devices}: a device is named twice")


def _check_endpoints(endpoints: Endpoints) -> None:
    if not endpoints.clients:
        raise SettingsError("endpoints.clients = []: name at least one, such as ipc:///run/blendmaskd/client.sock")
    for endpoint in endpoints.clients:
        if not endpoint.startswith(("ipc://", "tcp://")):
            raise SettingsError(f"endpoints.clients: {endpoint!r}: expected ipc:///PATH or tcp://HOST:PORT")
    if endpoints.metrics is not None and not re.match(r"^.+:\d{1,5}$", endpoints.metrics):
        raise SettingsError(f"endpoints.metrics = {endpoints.metrics!r}: expected HOST:PORT")


def _check_keys(settings: Settings) -> None:
    curve = settings.curve
    if bool(curve.server_key) != bool(curve.client_keys):
        given, missing = ("server_key", "client_keys") if curve.server_key else ("client_keys", "server_key")
        raise SettingsError(f"curve.{given} is set, curve.{missing} is not: `blendmaskd-keys server FOLDER` makes both")
    tcp = [endpoint for endpoint in settings.endpoints.clients if endpoint.startswith("tcp://")]
    if tcp and not curve.server_key and not settings.insecure_tcp:
        raise SettingsError(
            f"endpoints.clients: {tcp[0]!r} without keys is open to whoever reaches it: make keys with "
            "`blendmaskd-keys server FOLDER` and set curve.server_key and curve.client_keys to them; or accept it with "
            "insecure_tcp: true"
        )
    if curve.server_key and settings.insecure_tcp:
        raise SettingsError("insecure_tcp = True: with curve.server_key set, tcp:// is not insecure; leave one out")
