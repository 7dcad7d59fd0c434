"""What can be seen of a running service: numbers for Prometheus, and a log of JSON lines. Neither holds a text or a user's id.

A log line has the route's template in place of the path, and a keyed hash in place of a user's id: two lines about the same user
can be told to be, by nobody can it be told who, and when the key is gone (by default with the process) not even by whoever knows
the id. Of an error there is its kind and the lines of code that it passed, never its words, which may quote what a user wrote.
"""

import hashlib
import hmac
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from palate.server.problems import Failure, Problem

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds by machines: counted, and logged where they fail
SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_UNQUOTED = re.compile(r"[^\n'\"(<{:%]*")  # the beginning of a line of another library, before it quotes anything
OTHERS = ("asyncio", "concurrent.futures", "psycopg", "sqlalchemy")  # loggers that may tell of our requests


class Metrics:
    """The numbers of one service, in a registry of its own. No label can hold a user's id: all have few values, known here.

    Attributes:
        requests: by method, route and status.
        seconds: of a request, by route.
        in_progress: requests now.
        waiting: entries of a queue now, by queue; set with `watch`.
        batches: texts of an encoder's call.
        cache: look-ups, by cache ("rewards", "profiles") and whether it was found ("yes", "no").
        feedback: events that were acknowledged, by kind.
        conflicts: writes that found another version and were done again.
        failures: answers that are the service's own failing, by kind of error.
    """

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("palate_requests", "Requests answered.", ("method", "route", "status"), registry=own)
        self.seconds = Histogram("palate_request_seconds", "Seconds of a request.", ("route",), buckets=SECONDS, registry=own)
        self.in_progress = Gauge("palate_requests_in_progress", "Requests being answered.", registry=own)
        self.waiting = Gauge("palate_queue_waiting", "Entries that wait.", ("queue",), registry=own)
        self.batches = Histogram("palate_encoder_batch_texts", "Texts in a call of the encoder.", buckets=TEXTS, registry=own)
        self.cache = Counter("palate_cache", "Look-ups.", ("cache", "found"), registry=own)
        self.feedback = Counter("palate_feedback_acknowledged", "Events written and acknowledged.", ("kind",), registry=own)
        self.conflicts = Counter("palate_conflicts", "Writes that were done again on another version.", registry=own)
        self.failures = Counter("palate_failures", "Failures of the service itself.", ("kind",), registry=own)
        ProcessCollector(registry=own)
        PlatformCollector(registry=own)
        GCCollector(registry=own)

    def watch(self, queue: str, size: Callable[[], int]) -> None:
        """Have the length of a queue asked for whenever the metrics are read."""
        self.waiting.labels(queue).set_function(size)

    def render(self) -> tuple[bytes, str]:
        """(body, media type) of an answer to Prometheus."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class Log:
    """JSON lines, one for each event.

    Args:
        stream: where they go; standard error by default.
        key: of the hashes of user ids. By default one that nobody keeps: lines of two runs cannot be told to be about one user.
    """

    def __init__(self, stream: TextIO | None = None, key: bytes | None = None):
        self._key = key or secrets.token_bytes(32)
        write: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
            structlog.WriteLogger(stream or sys.stderr),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
            cache_logger_on_first_use=True,
        )
        self._write = write

    def name(self, tenant: str, user_id: str) -> str:
        """Sixteen characters in place of a user's id: the beginning of HMAC-SHA256 of (tenant, id)."""
        return hmac.new(self._key, f"{tenant}\x00{user_id}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:16]

    def say(self, event: str, **facts: str | float | None) -> None:
        """One line. The facts are numbers and words of the program's own, never of a user's."""
        self._write.info(event, **{name: value for name, value in facts.items() if value is not None})

    def failed(self, event: str, failure: Failure, **facts: str | float | None) -> None:
        """One line about an error: its kind, and where it came from."""
        known = {name: value for name, value in facts.items() if value is not None}
        self._write.error(event, **failure.facts(), **known)


class Observing:
    """ASGI middleware, the outermost: gives each request an id, counts and logs it, and answers what nobody foresaw with 500.

    A caller's `X-Request-ID` of up to 64 letters, digits, dots, dashes and underscores is kept; any other is replaced.

    Args:
        app: what is behind it.
        metrics: counted in; None for none.
        log: written to; None for none.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics | None = None, log: Log | None = None):
        self.app, self.metrics, self.log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status, start = 0, time.perf_counter()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if self.metrics is not None:
            self.metrics.in_progress.inc()
        try:
            await self.app(scope, receive, counted)
        except Exception as error:
            scope["state"]["failure"] = Failure.of(error)
            if status:
                raise  # half an answer is out: the server has to close the connection
            problem = Problem(500, "the service failed; the request id finds the reason in its log", code="failed")
            await problem.response(request_id)(scope, receive, counted)
        finally:
            if self.metrics is not None:
                self.metrics.in_progress.dec()
            self._note(scope, status, time.perf_counter() - start)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        state, route = scope["state"], _template(scope)
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        failure = state.get("failure")
        if self.metrics is not None:
            self.metrics.requests.labels(method, route, str(status or "gone")).inc()  # gone: nobody was there to answer
            self.metrics.seconds.labels(route).observe(seconds)
            if failure is not None:
                self.metrics.failures.labels(failure.kind).inc()
        if self.log is None or (route in QUIET and status < 400):
            return
        caller, user = state.get("caller"), scope.get("path_params", {}).get("user_id")
        facts: dict[str, str | float | None] = {
            "request_id": state["request_id"],
            "method": method,
            "route": route,
            "status": status,
            "ms": round(1e3 * seconds, 3),
            "tenant": getattr(caller, "tenant", None),
            "key": getattr(caller, "key_id", None) or None,
            "user": None if user is None else self.log.name(getattr(caller, "tenant", ""), str(user)),
        }
        if failure is None:
            self.log.say("request", **facts)
        else:
            self.log.failed("request", failure, **facts)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            asked = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(asked):
                return str(asked)
    return secrets.token_hex(16)


def _template(scope: Scope) -> str:
    """The route as it was declared, "/v1/users/{user_id}"; the path itself would hold ids, and there is no end of paths."""
    return str(getattr(scope.get("route"), "path", "none"))


class JsonLine(logging.Formatter):
    """Records of other libraries' loggers as lines like our own: their words, which are fixed, and of an error its kind only.

    uvicorn's words are kept whole. The others' are cut where they begin to quote: asyncio has the whole of an error in its line.
    """

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        served = record.name.partition(".")[0] == "uvicorn"
        words = record.getMessage() if served and not record.exc_info else str(record.msg)
        if not served and (found := _UNQUOTED.match(words)):
            words = found[0].strip(" :")
        facts: dict[str, Any] = {"event": words, "logger": record.name}
        if record.exc_info and record.exc_info[1] is not None:
            facts |= Failure.of(record.exc_info[1]).facts()
        facts |= {"level": record.levelname.lower(), "timestamp": f"{stamp}.{int(record.msecs):03d}Z"}
        return str(structlog.processors.JSONRenderer()(None, "", facts))


def uvicorn_logging() -> dict[str, Any]:
    """`log_config` of uvicorn: its own lines as JSON, those of `OTHERS` too, which would else go to standard error with the words
    of errors, and no access log, which would hold paths and with them user ids."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "palate.server.observing.JsonLine"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
        "loggers": {
            "uvicorn": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
            "uvicorn.error": {"level": "INFO"},
            "uvicorn.access": {"handlers": [], "level": "CRITICAL", "propagate": False},
            **{name: {"handlers": ["stderr"], "level": "WARNING", "propagate": False} for name in OTHERS},
        },
    }
