"""The routes of the front, and what is done for each."""
from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import yaml
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from blendmaskd.choices import remedy
from blendmaskd.client.exchange import JobFailed
from blendmaskd.client.exchange import Segmentation as Answer
from blendmaskd.coco import categories
from blendmaskd.coco.categories import Category
from blendmaskd.core.metrics import health
from blendmaskd.core.stats import SHOWN, SHOWN_OF_A_DEVICE
from blendmaskd.http import bodies, kserve, openapi, rest
from blendmaskd.http.guard import Budget, Guard, Held
from blendmaskd.http.metrics import Metrics
from blendmaskd.http.rest import Failure, Job, JobName, JobQuery, Nothing, Segmentation, SegmentQuery, WaitQuery
from blendmaskd.http.tokens import Tokens
from blendmaskd.http.upstream import Upstream
from blendmaskd.protocol import Code
from blendmaskd.settings import Settings
from blendmaskd.shell import csp

if TYPE_CHECKING:
    from blendmaskd.http.tracing import Tracing

REFRESH_S = 1.0
TRY = csp.page("blendmaskd.http", "try.html")
T = TypeVar("T")


class Front:
    """What the handlers need. `application` makes the whole."""

    def __init__(
        self, settings: Settings, endpoint: str, tokens: Tokens | None, metrics: Metrics, tracing: Tracing | None
    ) -> None:
        """`endpoint` is the broker's."""
        self._settings = settings
        self._tokens = tokens
        self._metrics = metrics
        self._budget = Budget(settings.http.max_bytes)
        self._upstream = Upstream(endpoint, settings.http.daemon_wait_s)
        self._tracing = tracing
        self._statistics = {name: kserve.Statistics() for name in kserve.INPUTS}

    def routes(self) -> list[Route]:
        return [
            Route("/v1/segment", self.segment, methods=["POST"]),
            Route("/v1/jobs", self.submit, methods=["POST"]),
            Route("/v1/jobs/{job}", self.fetch, methods=["GET"]),
            Route("/v1/jobs/{job}", self.forget, methods=["DELETE"]),
            Route("/v1/categories", self.categories),
            Route("/v1/stats", self.stats),
            Route("/v2", as_json(kserve.PRODUCT), methods=["GET"]),  # a response is an ASGI application too
            Route("/v2/health/live", as_json({"live": True}), methods=["GET"]),
            Route("/v2/health/ready", self.ready),
            Route("/v2/repository/index", as_json(kserve.INDEX), methods=["POST"]),
            Route("/v2/models/stats", self.all_statistics),
            *(Route(f"/v2/models/{{model}}{version}{end}", handler, methods=[method])
              for version in ("", "/versions/{version}")
              for end, handler, method in (("", self.model, "GET"), ("/ready", self.model_ready, "GET"),
                                           ("/config", self.config, "GET"), ("/stats", self.statistics, "GET"),
                                           ("/infer", self.infer, "POST"))),
            Route("/", page(*TRY), methods=["GET"]),
            Route("/openapi.json", Response(openapi.TEXT, media_type="application/json"), methods=["GET"]),
            Route("/docs", page(openapi.PAGE, csp.policy(openapi.PAGE.decode())), methods=["GET"]),
            # whatever the daemon does, starting the front anew would not help
            Route("/healthz", Response("ok\n", media_type="text/plain"), methods=["GET"]),
            Route("/readyz", self.readyz),
            Route("/metrics", self.metrics),
        ]

    @contextlib.asynccontextmanager
    async def life(self, _: Starlette) -> AsyncIterator[None]:
        refreshing = asyncio.create_task(self._refresh())
        yield
        refreshing.cancel()
        await self._upstream.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def _refresh(self) -> None:
        while self._tokens is not None:
            await asyncio.sleep(REFRESH_S)
            self._tokens.refresh()
            await self._upstream.close(keep=self._tokens.names | {""})

    # -- images ---------------------------------------------------------------------------------------------------

    async def segment(self, request: Request) -> Response:
        async with Held(self._budget, self._settings.http.receive_s) as held:
            wanted = await self._wanted(held, request, SegmentQuery)
            return as_json(segmentation(await self._segmented(request, wanted)))

    async def submit(self, request: Request) -> Response:
        async with Held(self._budget, self._settings.http.receive_s) as held:
            wanted = await self._wanted(held, request, JobQuery)
            job = wanted.query.job or secrets.token_hex(16)
            await self._for(request, self._upstream.submit(request.scope["client_name"], wanted, job))
            answer = as_json(Job(job=job, state="waiting"), HTTPStatus.ACCEPTED)
            answer.headers["location"] = f"/v1/jobs/{job}"
            return answer

    async def fetch(self, request: Request) -> Response:
        job, wait = _job(request), query(request, WaitQuery).wait
        found = await self._for(request, self._upstream.fetch(request.scope["client_name"], job, wait))
        match found:
            case None:
                return as_json(Job(job=job, state="waiting"))
            case JobFailed():
                error = Failure(found.code, found.reason, found.retry_after_s).problem
                return as_json(Job(job=job, state="failed", error=error))
        return as_json(Job(job=job, state="done", result=segmentation(found)))

    async def forget(self, request: Request) -> Response:
        job, _ = _job(request), query(request, Nothing)
        await self._for(request, self._upstream.forget(request.scope["client_name"], job))
        return Response(status_code=HTTPStatus.NO_CONTENT)

    async def _wanted(self, held: Held, request: Request, kind: type[rest.Q]) -> rest.Request[rest.Q]:
        """What a request wants, with its body."""
        content_type = request.headers.get("content-type", "")
        most = bodies.largest(content_type, self._settings.limits.max_image_bytes)
        body = await held.read(request, most)
        return rest.read(_parameters(request), content_type, body, self._settings.deadline_s, kind)

    async def _segmented(self, request: Request, wanted: rest.Request[SegmentQuery]) -> Answer:
        found = await self._for(request, self._upstream.segment(request.scope["client_name"], wanted))
        request.scope["answer"] = found  # for traces
        return found

    async def _for(self, request: Request, call: Coroutine[Any, Any, T]) -> T:
        """The broker's answer, for as long as whoever asks is there. Raises ClientDisconnect."""
        asking, leaving = asyncio.create_task(call), asyncio.create_task(_left(request))
        try:
            await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise ClientDisconnect
            return asking.result()
        finally:
            asking.cancel()
            leaving.cancel()

    # -- KServe v2 ------------------------------------------------------------------------------------------------

    async def ready(self, request: Request) -> Response:
        status, _ = await self._readiness()
        return as_json({"ready": status == HTTPStatus.OK}, status)

    async def model_ready(self, request: Request) -> Response:
        name, (status, _) = _model(request), await self._readiness()
        return as_json({"name": name, "ready": status == HTTPStatus.OK}, status)

    async def model(self, request: Request) -> Response:
        return as_json(kserve.metadata(_model(request)))

    async def config(self, request: Request) -> Response:
        return as_json(kserve.config(_model(request)))

    async def statistics(self, request: Request) -> Response:
        name = _model(request)
        return as_json({"model_stats": [self._statistics[name].as_tree(name)]})

    async def all_statistics(self, request: Request) -> Response:
        return as_json({"model_stats": [each.as_tree(name) for name, each in self._statistics.items()]})

    async def infer(self, request: Request) -> Response:
        model, begun = _model(request), time.monotonic()
        statistics = self._statistics[model]
        try:
            asked, found = await self._infer(request, model)
        except Failure:
            statistics.add("fail", time.monotonic() - begun, {})
            raise
        statistics.add("success", time.monotonic() - begun, found.timings)
        headers, body = kserve.write(model, asked, found.width, found.height, found.detections)
        return Response(body, headers=headers)

    async def _infer(self, request: Request, model: str) -> tuple[kserve.Inference, Answer]:
        async with Held(self._budget, self._settings.http.receive_s) as held:
            body = await held.read(request, bodies.largest("application/json", self._settings.limits.max_image_bytes))
            cut = request.headers.get(kserve.HEADER_LENGTH)
            if cut is not None and not (cut.isdecimal() and cut.isascii() and len(cut) < 12):
                raise Failure(Code.BAD_REQUEST, "Inference-Header-Content-Length is no number of bytes")
            asked, wanted = kserve.read(model, body, None if cut is None else int(cut), self._settings.deadline_s)
            return asked, await self._segmented(request, wanted)

    # -- what is known --------------------------------------------------------------------------------------------

    async def categories(self, request: Request) -> Response:
        query(request, Nothing)
        return as_json(await asyncio.to_thread(known_categories, self._settings))

    async def stats(self, request: Request) -> Response:
        """What any client may see, whoever the front is to the broker."""
        query(request, Nothing)
        snapshot = await self._upstream.snapshot()
        if not snapshot:
            raise Failure(Code.UNAVAILABLE, "the daemon is starting")
        devices = [{key: device[key] for key in SHOWN_OF_A_DEVICE} for device in snapshot["devices"]]
        return as_json({**{key: snapshot[key] for key in SHOWN}, "devices": devices})

    async def readyz(self, request: Request) -> Response:
        status, text = await self._readiness()
        return Response(text, status, media_type="text/plain")

    async def _readiness(self) -> tuple[HTTPStatus, str]:
        try:
            snapshot = await self._upstream.snapshot()
        except Failure as failure:
            return HTTPStatus.SERVICE_UNAVAILABLE, f"{failure}\n"
        _, status, text = health(snapshot, max(0.0, time.time() - snapshot.get("time", 0.0)))
        return status, text

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


def application(
    settings: Settings, endpoint: str, tokens: Tokens | None, local: bool, metrics: Metrics, tracing: Tracing | None
) -> ASGIApp:
    """The ASGI application. `local`: it is listened to on a loopback address only."""
    front = Front(settings, endpoint, tokens, metrics, tracing)
    routes = front.routes()
    app = Starlette(
        routes=routes, lifespan=front.life,
        exception_handlers={Failure: on_failure, HTTPException: on_no_route, Exception: on_fault,
                            ClientDisconnect: on_gone},
    )  # fmt: skip
    app.router.redirect_slashes = False
    names = {route.endpoint: route.path for route in reversed(routes)}  # of two paths, the shorter
    return Guard(app, settings.http, tokens, local, metrics, names, tracing)


def page(text: bytes, policy: str) -> Response:
    """A page of one file."""
    return Response(text, media_type="text/html", headers={"content-security-policy": policy})


def segmentation(answer: Answer) -> Segmentation:
    return Segmentation(width=answer.width, height=answer.height, device=answer.device, timings=answer.timings,
                        detections=answer.detections)  # fmt: skip


def as_json(tree: Any, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(tree), status, media_type="application/json")


def query(request: Request, kind: type[T]) -> T:
    """Raises `Failure`."""
    try:
        return msgspec.convert(_parameters(request), kind, strict=False)
    except msgspec.ValidationError as error:
        reason = str(error).replace("Object contains", "the query has")
        raise Failure(Code.BAD_REQUEST, f"{reason}{remedy(str(error), kind)}") from None


def known_categories(settings: Settings) -> Sequence[Category]:
    """Those of the network that the settings name, as far as they can be read here. Raises `Failure`."""
    model = settings.model
    try:
        return categories.resolve(_classes(Path(model.config)), model.weights, model.categories)
    except (categories.CategoriesError, OSError, yaml.YAMLError) as error:
        raise Failure(Code.UNAVAILABLE, f"the categories cannot be read: {error}") from None


@functools.cache
def _classes(config: Path) -> int:
    """The number of classes that a network's configuration names, or the one that it builds on."""
    tree = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    number = tree.get("MODEL", {}).get("FCOS", {}).get("NUM_CLASSES")
    if number is None and "_BASE_" in tree:
        return _classes(config.parent / tree["_BASE_"])
    return len(categories.COCO) if number is None else int(number)


def _parameters(request: Request) -> dict[str, str]:
    """Raises `Failure` for one that is given twice."""
    pairs = request.query_params.multi_items()
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Failure(Code.BAD_REQUEST, "a parameter of the query is given twice")
    return found


def _model(request: Request) -> str:
    """Raises `Failure`."""
    name: str = request.path_params["model"]
    if name not in kserve.INPUTS or request.path_params.get("version", kserve.VERSION) != kserve.VERSION:
        reason = f"there are {' and '.join(kserve.INPUTS)}, of version {kserve.VERSION}"
        raise Failure(Code.BAD_REQUEST, reason, status=HTTPStatus.NOT_FOUND)
    return name


def _job(request: Request) -> str:
    try:
        return msgspec.convert(request.path_params["job"], JobName)
    except msgspec.ValidationError as error:
        raise Failure(Code.BAD_REQUEST, f"the job's name: {error}", status=HTTPStatus.NOT_FOUND) from None


async def _left(request: Request) -> None:
    """Returns when whoever asks has left; its body is read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def on_failure(request: Request, error: Exception) -> Response:
    """KServe's clients read ``error``."""
    assert isinstance(error, Failure)
    if not request.url.path.startswith("/v2"):
        return Response(error.body, error.status, error.headers)
    tree = {"error": str(error), **msgspec.to_builtins(error.problem)}
    return Response(msgspec.json.encode(tree), error.status, {**error.headers, "content-type": "application/json"})


def on_no_route(request: Request, error: Exception) -> Response:
    """404 and 405."""
    assert isinstance(error, HTTPException)
    reason = f"{error.detail}: there are POST /v1/segment, /v1/jobs, GET /v1/categories, /v1/stats; see /docs"
    response = on_failure(request, Failure(Code.BAD_REQUEST, reason, status=HTTPStatus(error.status_code)))
    response.headers.update(error.headers or {})
    return response


def on_fault(request: Request, error: Exception) -> Response:
    """Our own: it is logged with its traceback."""
    reason = "the front has failed; its log says why"
    return on_failure(request, Failure(Code.UNAVAILABLE, reason, status=HTTPStatus.INTERNAL_SERVER_ERROR))


def on_gone(request: Request, error: Exception) -> Response:
    """That nobody reads."""
    return on_failure(request, Failure(Code.CANCELLED, "the client has left"))
