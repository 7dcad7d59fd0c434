"""The service as an ASGI application: routes over a runtime, behind what guards and observes them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, FastAPI, Request, Response, Security
from starlette.types import Receive, Scope, Send

from palate.errors import PalateError, StoreError
from palate.server import foreign, knowing, own, parsing, problems
from palate.server.access import Access, Caller, KeyRing, needs
from palate.server.bodies import Health, ReadaptAnswer, ReadaptRequest, Readiness
from palate.server.guarding import Bodies, Guard, Limits
from palate.server.observing import Log, Metrics, Observing
from palate.server.parsing import taken, takes
from palate.server.people import People
from palate.server.problems import Failure, Problem, documented
from palate.server.readapting import Readapter
from palate.server.runtime import RefusedError, Runtime, UnknownModelError, UnlearnedError
from palate.version import __version__

LIMITS = Limits()
CHECKED = 1.0  # seconds for which an answer of the store to "are you there" is believed
TAGS = [
    {"name": "rank", "description": "Which response somebody would like best."},
    {"name": "feedback", "description": "What somebody did, kept and learned from. Needs a consent on record."},
    {"name": "users", "description": "What is known of somebody: see, explain, export, delete."},
    {"name": "other stacks", "description": "The shapes of vLLM, Jina, Cohere, OpenAI and OpenRLHF."},
    {"name": "service", "description": "Health, numbers, and models that change."},
]


def create_app(
    runtime: Runtime,
    *,
    keys: KeyRing | None = None,
    limits: Limits = LIMITS,
    metrics: Metrics | None = None,
    log: Log | None = None,
    tls: bool = False,
    local_only: bool | None = None,
    readapt: bool = False,
) -> FastAPI:
    """The application; the runtime is closed when it is shut down.

    Args:
        keys: None for a server without keys, whose every request is the tenant "default".
        limits: on sizes, times and rates.
        metrics: counted in; made where none are given.
        log: written to; None for none.
        tls: whether clients reach this over TLS, so that browsers may be told to insist.
        local_only: answer only under a loopback name; by default where there are no keys.
        readapt: begin to learn everybody again under the newest model at once.
    """
    metrics = Metrics() if metrics is None else metrics
    readapter = Readapter(runtime)
    observe(runtime, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if readapt:
            readapter.start(runtime.lanes[0])
        runtime.deleter.resume()
        recalling = asyncio.create_task(_recalling(runtime.people, log))
        yield
        recalling.cancel()
        await readapter.stop()
        await runtime.close()

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        await app.router(scope, receive, send)

    app = FastAPI(
        routes=list(own.direct(runtime, routed)),
        title="Palate",
        version=__version__,
        summary="Reward models with personal taste, as a service.",
        lifespan=lifespan,
        openapi_tags=TAGS,
        redoc_url=None,
        redirect_slashes=False,  # no answer that the schema does not know, and no address made from a header
        separate_input_output_schemas=False,
    )
    app.include_router(own.router(runtime))
    app.include_router(knowing.router(runtime))
    app.include_router(foreign.router(runtime))
    app.include_router(_service(runtime, metrics, readapter))
    problems.install(app)
    for kind in (RefusedError, UnknownModelError, UnlearnedError):
        app.add_exception_handler(kind, _answered)
    parsing.describe(app)
    app.add_middleware(Bodies, limits=limits)
    app.add_middleware(Access, keys=keys, limits=limits)
    app.add_middleware(Guard, limits=limits, tls=tls, local_only=keys is None if local_only is None else local_only)
    app.add_middleware(Observing, metrics=metrics, log=log)
    return app


async def _recalling(people: People, log: Log | None) -> None:
    """See to it that who was deleted by another process is in no cache for longer than that is fresh.

    A store that does not answer is asked again in time. The log has a line when it stops answering, and one when it does again.
    """
    silent = False
    while True:
        try:
            await people.recall()
        except StoreError as error:
            if log is not None and not silent:
                log.failed("deletions by others cannot be seen", Failure.of(error))
            silent = True
        else:
            if log is not None and silent:
                log.say("deletions by others are seen again")
            silent = False
        await asyncio.sleep(max(1.0, people.fresh))


async def _answered(request: Request, error: Exception) -> Response:
    assert isinstance(error, PalateError)
    return own.problem_of(error).response(problems.request_id(request.scope))


def observe(runtime: Runtime, metrics: Metrics) -> None:
    """Have what happens in a runtime counted."""
    found, missed = (metrics.cache.labels("rewards", word) for word in ("yes", "no"))
    for lane in runtime.lanes:
        lane.on_look = lambda hit: (found if hit else missed).inc()
        lane.batcher.on_batch = metrics.batches.observe
        metrics.watch(f"encoder {lane.name}", lane.batcher.__len__)
    there, away = (metrics.cache.labels("profiles", word) for word in ("yes", "no"))
    runtime.people.on_look = lambda hit: (there if hit else away).inc()
    metrics.watch("store", runtime.committer.__len__)
    runtime.on_conflict = metrics.conflicts.inc
    runtime.on_event = lambda kind: metrics.feedback.labels(kind).inc()


def _service(runtime: Runtime, metrics: Metrics, readapter: Readapter) -> APIRouter:
    out = APIRouter(tags=["service"])
    admin = Annotated[Caller, Security(needs("admin"))]
    checked: tuple[float, str] = (-CHECKED, "")

    @out.get("/health", operation_id="health", summary="The process answers", responses=documented())
    async def health() -> Health:
        return Health(version=__version__)

    @out.get("/ready", operation_id="ready", summary="Requests can be answered now", responses=documented())
    async def ready() -> Readiness:
        nonlocal checked
        if time.monotonic() - checked[0] >= CHECKED:
            try:
                await runtime.people.call(runtime.store.check)
                checked = time.monotonic(), "ok"
            except PalateError as error:
                checked = time.monotonic(), type(error).__name__
        if checked[1] != "ok":
            raise Problem.later(503, f"the store does not answer ({checked[1]})", code="store")
        return Readiness(status="ready", models=[lane.name for lane in runtime.lanes], store="ok")

    @out.get(
        "/metrics",
        operation_id="metrics",
        summary="Numbers for Prometheus",
        response_class=Response,
        responses=documented() | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def numbers(caller: Annotated[Caller, Security(needs("metrics"))]) -> Response:
        body, kind = await asyncio.to_thread(metrics.render)
        return Response(body, media_type=kind)

    @out.post(
        "/v1/readapt",
        operation_id="readapt",
        summary="Learn everybody again under a model, in the background",
        description="It can be stopped and started at any time; users who are up to date are skipped.",
        responses=documented(),
        openapi_extra=takes(ReadaptRequest),
    )
    async def readapt(caller: admin, body: Annotated[ReadaptRequest, taken(ReadaptRequest)]) -> ReadaptAnswer:
        progress = readapter.start(runtime.lane(body.model) or runtime.lanes[0])
        return ReadaptAnswer(**vars(progress))

    @out.get("/v1/readapt", operation_id="readapted", summary="How far that is", responses=documented())
    async def readapted(caller: admin, model: str | None = None) -> ReadaptAnswer:
        lane = runtime.lane(model) or runtime.lanes[0]
        progress = readapter.progress.get(lane.name)
        if progress is None:
            raise Problem(404, "nobody has asked for it since the service started; POST /v1/readapt begins", code="not_started")
        return ReadaptAnswer(**vars(progress))

    return out
