"""What may be set, with its default and meaning: docs/settings.md is written from here."""
from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from blendmaskd.topology import Cpus, parse_cpus

LARGEST = 1e9  # of seconds and milliseconds: keeps infinity out
Positive = Annotated[float, Meta(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=LARGEST)]
MOST = 10**15  # of bytes, pixels and all that is counted: ZeroMQ, SQLite and torch take no more than 63 bits
Count = Annotated[int, Meta(ge=1, le=MOST)]
BatchSize = Annotated[int, Meta(ge=1, le=64)]
MOST_HOST_THREADS = 64
HostThreads = Annotated[int, Meta(ge=1, le=MOST_HOST_THREADS)]
Threads = Annotated[int, Meta(ge=1, le=1024)]
Side = Annotated[int, Meta(ge=1, le=65_535)]  # of an image
Window = Annotated[float, Meta(ge=1, le=3600)]  # reports come once a second, and each is kept


class SettingsError(ValueError):
    """A key, value or file that cannot be used; the message names it and says why."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Model(Section, frozen=True):
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
    # exact: Pillow's resizing, as detectron2's; fast: torch's, which has up to 0.4% of a photograph's values off by one
    resize: Literal["exact", "fast"] = "exact"
    # record a graph for each size in warm_up; npu and cuda only. Never run on hardware by this project
    graphs: bool = False
    # file with a COCO `categories` list; default: the one beside the weights, COCO's 80, or class_N
    categories: str | None = None
    # onnxruntime's execution providers for the engine onnx, the preferred one first; each must be there
    providers: list[str] = msgspec.field(default_factory=lambda: ["CPUExecutionProvider"])


class Endpoints(Section, frozen=True):
    """Where the daemon listens."""

    # where clients connect: ipc:///PATH, guarded by its folder's mode, or tcp://HOST:PORT, guarded by keys (`curve`)
    clients: list[str] = msgspec.field(default_factory=lambda: ["ipc:///run/blendmaskd/client.sock"])
    metrics: str | None = "127.0.0.1:9464"  # HOST:PORT of the status page, /metrics, /healthz, /readyz; null: none


class Curve(Section, frozen=True):
    """Keys for tcp:// endpoints: encryption, and who may connect. `blendmaskd-keys` makes them."""

    server_key: str | None = None  # path of the daemon's server.key_secret, mode 0600; required for tcp://
    client_keys: str | None = None  # folder with the public keys of allowed clients; changes take effect at once


class Http(Section, frozen=True):
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
    # of one process, at most half of its descriptors; the longest idle one makes room, where none is answers are 503
    max_connections: Count = 256
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


class Queue(Section, frozen=True):
    """Bounds on jobs; a job beyond any of them is answered `busy` at once.

    A single client can fill at most seven eighths of the queue, all clients of a user or key 63 of 64 parts; the rest
    is reserved for others.
    """

    max_jobs: Count = 256  # maximum number of jobs waiting for a device
    max_bytes: Count = 1 << 30  # maximum total size of their images, in bytes
    # maximum number of unanswered jobs of one client; durable jobs are counted separately; null: the queue's own bound
    max_jobs_per_client: Count | None = None
    max_bytes_per_client: Count | None = None  # the same for the size of their images, in bytes


class Limits(Section, frozen=True):
    """Bounds on one image."""

    max_image_bytes: Count = 64 << 20  # maximum size of one image as sent, encoded or raw (three bytes per pixel)
    # maximum height x width; decoding takes up to 16 bytes per pixel in each of `runtime.host_threads` and two more
    max_image_pixels: Count = 50_000_000
    # maximum CPU seconds for decoding and resizing one image; more ends its worker, and makes the image a suspect
    max_decode_s: Positive = 20.0
    # maximum number of tcp:// connections; with local ones never more than half of the descriptors
    max_connections: Count = 512


class Paths(Section, frozen=True):
    """Server-side images: a job may name a file below one of `roots`; with none, it may not."""

    roots: list[str] = []  # folders whose files a job may name, after resolving links; empty: jobs may not name files


class Log(Section, frozen=True):
    """What is logged to stderr or the journal; see docs/logs.md. Takes effect on reload."""

    format: Literal["text", "json"] = "text"  # text: one line per event; json: one JSON object per line
    level: Literal["debug", "info", "warning", "error"] = "info"  # lowest level written
    # log every state change of a job; false: only jobs that fail through no fault of their client
    jobs: bool = False


class Runtime(Section, frozen=True):
    """How a worker process is set up when it is started."""

    # CPUs per device, {"npu:0": "0-15"}; auto: those near the device, or else an even split
    cpus: Literal["auto"] | dict[str, str] = "auto"
    task_queue: Literal[0, 1, 2] = 2  # torch_npu's TASK_QUEUE_ENABLE; at most 1 with `model.graphs`
    # torch_npu's CPU_AFFINITY_CONF; its ranges refer to slots (2,npu1:8-15); a mode alone uses the slot's CPUs
    cpu_affinity_conf: str | None = None
    preload: str = "auto"  # tcmalloc: auto (if installed), required, off, or the path of another allocator
    # OMP_NUM_THREADS; auto: the slot's number of CPUs, limited to its share of a CPU quota
    threads: Literal["auto"] | Threads = "auto"
    # threads of a worker that decode and resize images and encode masks, beside the one that drives its device; auto:
    # the slot's number of CPUs, limited to its share of a CPU quota, 2 to 64
    host_threads: Literal["auto"] | HostThreads = "auto"

    @property
    def placed(self) -> dict[str, Cpus]:
        """The devices whose CPUs are named here, with these; none with auto."""
        return {} if self.cpus == "auto" else {device: parse_cpus(text) for device, text in self.cpus.items()}


class Restarts(Section, frozen=True):
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


class Timed(Section, frozen=True):
    """The `timed` engine's latency table: batch size to milliseconds (defaults: one Ascend 910, 800x800)."""

    # milliseconds by batch size, interpolated between entries; engine `timed` only
    latency_ms: dict[BatchSize, NotNegative] = msgspec.field(
        default_factory=lambda: {1: 21.79, 2: 38.90, 4: 122.43, 8: 226.38}
    )
    # how many of these milliseconds the second visit takes, which blends the masks; at most all
    blend_ms: dict[BatchSize, NotNegative] = msgspec.field(default_factory=lambda: {1: 2.0, 2: 3.6})
    # .npz file of recorded candidates and masks used for every image; the host's work is then the native engine's
    outputs: str | None = None


class Settings(Section, frozen=True):
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
    warm_up: list[tuple[Side, Side]] = msgspec.field(default_factory=lambda: [(800, 800)])
    queue: Queue = Queue()
    limits: Limits = Limits()
    paths: Paths = Paths()
    # maximum shared memory of all local clients together; one region has at most a quarter; 0: images use the socket
    shared_memory_bytes: Annotated[int, Meta(ge=0, le=MOST)] = 1 << 30
    # file on a local disk that stores durable jobs and their answers, created if missing; null: no durable jobs
    spool: str | None = None
    # maximum size of images and answers in the spool; beyond it durable jobs are answered `busy`
    spool_bytes: Count = 4 << 30
    spool_keep_s: Positive = 604800.0  # how long an answer is kept, counted while the daemon runs
    # number of workers that may die on a job before it fails; 1: all that was on the device of one that dies fails
    max_attempts: Count = 2
    deadline_s: Positive = 60.0  # default deadline of a job
    drain_s: Positive = 30.0  # time allowed for accepted jobs to finish after SIGTERM
    window_s: Window = 10.0  # window over which FPS are averaged, 1 to 3600
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
