"""The Serve application: `serve deploy configs/ray_serve.yaml`.

Two deployments. A **worker** for each accelerator is a `Segmenter` that Ray places, restarts, scales and drains. A
**front** on each node takes HTTP, and is what the broker is on one host: it refuses what is too large or too much,
holds the deadline, gives an image to another worker when its own is lost and gives it up after `max_attempts`, counts
outcomes, and tells the cluster's statistics on /metrics, /v1/stats, /healthz and /readyz.
"""
from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import msgspec
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from blendmaskd import logs, settings
from blendmaskd.choices import remedy
from blendmaskd.core import metrics
from blendmaskd.core.stats import Stats
from blendmaskd.core.suspects import Suspects, Suspicion
from blendmaskd.http import bodies, rest
from blendmaskd.http.rest import Failure
from blendmaskd.logs import about
from blendmaskd.protocol import Code, Failed, Image, Options
from blendmaskd.settings import Settings, SettingsError
from blendmaskd_workers.cluster import placement, statistics
from blendmaskd_workers.cluster.channel import Answer, WorkerLost
from blendmaskd_workers.cluster.segmenter import Segmenter, leases_at_once

log = logging.getLogger("blendmaskd.front")

SNAPSHOT_S = 3.0  # for all replicas to tell what they did
AT_A_FRONT = 1024  # requests at once; those that wait for a worker are bounded by queue.max_jobs
QUIET = {"enable_access_log": False}  # a line for each image costs more than the image
Wanted = rest.Request[rest.Query]
LOST = (RayActorError, ReplicaUnavailableError, WorkerLost)


class Replicas(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Between how many workers Ray chooses by load."""

    min: int
    max: int


class Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`args` of the application in Serve's configuration file."""

    settings: str | dict[str, Any]  # a settings file on the head node, or its tree
    replicas: int | Replicas | None = None  # workers; None: as many as the cluster has devices when it is deployed
    fronts: int | None = None  # at most one on a node; None: one for each node there is when it is deployed


def application(arguments: dict[str, Any]) -> Application:
    """Serve's application builder. Raises `SettingsError`, `PlacementError` or `HostError`."""
    try:
        args = msgspec.convert(arguments, Arguments)
    except msgspec.ValidationError as error:
        raise SettingsError(f"args: {error}{remedy(str(error), Arguments)}") from None
    given = args.settings
    loaded = settings.load(given) if isinstance(given, str) else settings.from_tree(_with_numbers(given))
    tree = settings.to_tree(loaded)
    worker = serve.deployment(**worker_options(loaded, args.replicas))(Worker).bind(tree)
    front = serve.deployment(
        num_replicas=args.fronts or sum(node["Alive"] for node in ray.nodes()), max_replicas_per_node=1,
        max_ongoing_requests=AT_A_FRONT, ray_actor_options={"num_cpus": 0}, logging_config=QUIET,
    )  # fmt: skip
    bound: Application = front(Front).bind(tree, worker)
    return bound


def _with_numbers(tree: Any) -> Any:
    """Keys that are numbers as numbers: Serve's configuration goes through JSON, whose keys are text."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if str(key).isdigit() else key: _with_numbers(value) for key, value in tree.items()}


def worker_options(loaded: Settings, replicas: int | Replicas | None) -> dict[str, Any]:
    """Options of the workers' deployment: what Ray is told by the settings."""
    window = leases_at_once(loaded)
    options: dict[str, Any] = {
        "ray_actor_options": placement.actor_options(loaded),
        "max_ongoing_requests": window,
        "max_queued_requests": loaded.queue.max_jobs,
        "graceful_shutdown_timeout_s": loaded.drain_s,
        "logging_config": QUIET,
    }
    if isinstance(replicas, Replicas):
        scaling = {"min_replicas": replicas.min, "max_replicas": replicas.max, "target_ongoing_requests": window}
        return options | {"autoscaling_config": scaling}
    found = placement.capacity(loaded, ray.cluster_resources()) if replicas is None else replicas
    if found < 1:
        raise placement.PlacementError(f"devices = {loaded.devices}: no node of the cluster has such a device; its "
                                       f"resources are {dict(ray.cluster_resources())}")  # fmt: skip
    return options | {"num_replicas": found}


class Worker:
    """One accelerator."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self._segmenter = Segmenter(settings.from_tree(tree))

    async def segment(
        self, image: Image, options: Options, payload: bytes, left_s: float, alone: bool
    ) -> Answer | Failed:
        """Raises `WorkerLost`. When the caller cancels, the image is not run."""
        body = None if image.kind == "path" else payload
        return await asyncio.wrap_future(self._segmenter.submit(image, body, options, left_s, alone=alone))

    def snapshot(self) -> dict[str, Any]:
        return self._segmenter.snapshot()

    def check_health(self) -> None:
        """Ray asks now and then, and replaces the worker when this raises."""
        trouble = self._segmenter.trouble()
        if trouble:
            raise RuntimeError(trouble)

    def __del__(self) -> None:
        """Drained; Ray calls it before it ends the process."""
        with suppress(AttributeError):  # it did not come to start
            self._segmenter.close()


class Front:
    def __init__(self, tree: dict[str, Any], worker: DeploymentHandle) -> None:
        self._settings = settings.from_tree(tree)
        self._worker = worker
        _, self._node = placement.own_node()
        self._started = time.time()
        self._stats = Stats(self._settings.window_s)
        self._outcomes: Counter[str] = Counter()
        self._given_up = Suspects()  # images that it gave up
        self._in_flight = 0
        self._seq = 0
        logs.configure(self._settings.log, slot=f"{self._node}/front")

    async def __call__(self, request: Request) -> Response:
        path = request.url.path.removeprefix(request.scope.get("root_path", "")).rstrip("/")
        match request.method, path:
            case "POST", "/v1/segment":
                return await self._segment(request)
            case "GET", "/metrics":
                return Response(statistics.render(*await self._snapshots()), media_type=statistics.CONTENT_TYPE)
            case "GET", "/v1/stats":
                whole, *_ = await self._snapshots()
                return Response(msgspec.json.encode(whole), media_type="application/json")
            case "GET", "/healthz" | "/readyz":
                whole, *_ = await self._snapshots()
                healthz, readyz, text = metrics.health(statistics.named(whole), 0.0)
                status = healthz if path == "/healthz" else readyz
                return Response(text, status, media_type="text/plain")
        reason = f"{request.method} {path}: there are POST /v1/segment and GET /v1/stats, /metrics, /healthz, /readyz"
        return _failure(Failure(Code.BAD_REQUEST, reason, status=HTTPStatus.NOT_FOUND))

    # -- images -------------------------------------------------------------------------------------------------------

    async def _segment(self, http_request: Request) -> Response:
        arrived = time.monotonic()
        self._in_flight += 1
        outcome: Answer | Failed = Failed(job="", code=Code.CANCELLED, reason="the client left")
        timings: dict[str, float] = {}
        try:
            outcome = await self._outcome(http_request, arrived)
        finally:
            self._in_flight -= 1
            if isinstance(outcome, Answer):
                timings = _all_timings(outcome, time.monotonic() - arrived)
            self._count(outcome, timings)
        return _response(outcome, timings)

    async def _outcome(self, http_request: Request, arrived: float) -> Answer | Failed:
        content_type = http_request.headers.get("content-type", "")
        most = bodies.largest(content_type, self._settings.limits.max_image_bytes)
        try:
            _check_size(int(http_request.headers.get("content-length") or 0), most)
            body = await http_request.body()
            _check_size(len(body), most)
            request = rest.read(http_request.query_params, content_type, body, self._settings.deadline_s, rest.Query)
            _check_size(len(request.payload), self._settings.limits.max_image_bytes)
        except Failure as failure:
            return Failed(job="", code=failure.problem.code, reason=failure.problem.detail)
        return await self._ask(request, arrived + request.deadline_s)

    async def _ask(self, request: Wanted, deadline: float) -> Answer | Failed:
        """One worker, and another if that is lost: alone then, in case the image is what it died of."""
        lost, payload = "", request.payload
        for attempt in range(self._settings.max_attempts):
            known = self._given_up.find(request.image, [payload], time.monotonic())
            if known is not None:  # since it came, perhaps: others may submit it too
                return Failed(job="", code=Code.WORKER_LOST, reason=known.reason(time.monotonic()))
            left_s = deadline - time.monotonic()
            try:
                async with asyncio.timeout(left_s):
                    outcome: Answer | Failed = await self._worker.segment.remote(
                        request.image, request.query.options, payload, left_s, attempt > 0
                    )
                    return outcome
            except TimeoutError:
                return Failed(job="", code=Code.TIMEOUT, reason="the deadline passed")
            except BackPressureError:
                limit = self._settings.queue.max_jobs
                return Failed(job="", code=Code.BUSY, reason=f"{limit} images wait already (queue.max_jobs)")
            except DeploymentUnavailableError as error:
                return Failed(job="", code=Code.UNAVAILABLE, reason=str(error))
            except LOST as error:
                lost = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
                log.warning("a worker was lost with an image: %s", lost, extra=about(attempt=attempt + 1))
        return self._give_up(request, f"lost {self._settings.max_attempts} workers: {lost}")

    def _give_up(self, request: Wanted, reason: str) -> Failed:
        """And remember it: whoever submits it again would lose more workers."""
        suspicion = Suspicion(self._given_up.identify(request.image, [request.payload]), given_up=reason)
        self._given_up.keep(suspicion, time.monotonic())
        return Failed(job="", code=Code.WORKER_LOST, reason=reason)

    def _count(self, outcome: Answer | Failed, timings: Mapping[str, float]) -> None:
        if isinstance(outcome, Answer):
            self._outcomes["answered"] += 1
            self._stats.answered(timings)
        else:
            self._outcomes[outcome.code] += 1
            self._stats.failed(time.time(), outcome.job, outcome.code, outcome.reason)

    # -- statistics ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """What this front saw, in the form of `blendmaskd.core.stats`, without devices."""
        failures = {code: number for code, number in self._outcomes.items() if code != "answered"}
        return self._stats.snapshot(
            time.monotonic(), time.time(), [], node=self._node, started=self._started, in_flight=self._in_flight,
            answered=self._outcomes["answered"], failures=failures, engine=self._settings.engine,
        )  # fmt: skip

    async def _snapshots(self) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
        """The cluster's, and those of all fronts and of all workers that answer in time."""
        own = serve.get_replica_context()
        fronts = serve.get_deployment_handle(own.deployment, own.app_name)
        gathered = await asyncio.gather(*(_broadcast(handle) for handle in (fronts, self._worker)))
        told, workers = gathered[0] or [self.snapshot()], gathered[1]
        self._seq += 1
        return statistics.combine(told, workers, seq=self._seq, queue=self._settings.queue), told, workers


async def _broadcast(handle: DeploymentHandle) -> list[dict[str, Any]]:
    try:
        found = await handle.broadcast("snapshot").results_async(timeout_s=SNAPSHOT_S, return_exceptions=True)
    except Exception as error:  # no replica yet, or Ray cannot say
        log.warning("snapshots: %s: %s", type(error).__name__, error)
        return []
    return [each for each in found if isinstance(each, dict)]


def _all_timings(answer: Answer, total_s: float) -> dict[str, float]:
    """With `total`, and as `queue` what passed outside of the worker: Ray's queue and transport."""
    inside = sum(answer.timings.values())
    return {"queue": max(total_s - inside, 0.0), **answer.timings, "total": total_s}


def _response(outcome: Answer | Failed, timings: Mapping[str, float]) -> Response:
    if isinstance(outcome, Failed):
        return _failure(Failure(outcome.code, outcome.reason, outcome.retry_after_s))
    detections = msgspec.msgpack.decode(outcome.detections)
    found = rest.Segmentation(width=outcome.width, height=outcome.height, device=outcome.device, node=outcome.node,
                              timings=dict(timings), detections=detections)  # fmt: skip
    return Response(msgspec.json.encode(found), media_type="application/json")


def _failure(failure: Failure) -> Response:
    return Response(failure.body, failure.status, failure.headers)


def _check_size(found: int, most: int) -> None:
    """Raises `Failure`."""
    if found > most:
        raise Failure(Code.TOO_LARGE, f"{found} bytes: at most {most} (limits.max_image_bytes)")
