"""What the service answers when it does not do what was asked: one shape, for every reason (RFC 9457, problem details).

Middleware, dependencies and routes raise `Problem`, or one of the library's own errors; the caller reads what was wrong, what was
expected and what to do. The input is never repeated, because answers end up in other people's logs.
"""

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from palate.errors import DataError, MismatchError, PalateError, UnknownUserError
from palate.server.batching import OverloadedError

MEDIA_TYPE = "application/problem+json"
MOST_ERRORS = 20  # of one request that are listed; the rest are counted
LONGEST_PLACE = 120  # characters of the place of an error: it may hold a key of the caller's JSON
MOST_FRAMES = 6  # lines of code that are kept of a failure, the innermost ones
PAUSE = 1.0  # seconds after which to try again what failed for the moment


class Kind(NamedTuple):
    """What a status means here: a title, a word for programs, and a sentence for the OpenAPI document."""

    title: str
    code: str
    meaning: str


KINDS: Mapping[int, Kind] = {
    400: Kind("Bad Request", "bad_request", "It cannot be read: bad JSON, bad UTF-8, a bad path."),
    401: Kind("Unauthorized", "unauthorized", "No key, or one that is not known, expired or revoked."),
    403: Kind("Forbidden", "forbidden", "The key may not do this, or the user has not consented."),
    404: Kind("Not Found", "not_found", "There is no such user, event, model or route."),
    405: Kind("Method Not Allowed", "method", "The route exists and does not take this method."),
    408: Kind("Request Timeout", "slow_body", "The body did not arrive in time."),
    409: Kind(
        "Conflict",
        "conflict",
        "It contradicts what is stored: another version, another payload under the same idempotency key, another model.",
    ),
    413: Kind("Content Too Large", "too_large", "The body is too large."),
    414: Kind("URI Too Long", "too_long", "The path or the query is too long."),
    415: Kind("Unsupported Media Type", "media_type", "The body is not application/json, or it is compressed."),
    422: Kind("Unprocessable Content", "invalid", "It can be read, and it is not what is expected; `errors` says where."),
    429: Kind("Too Many Requests", "too_many", "Too many requests; `Retry-After` says how long to wait."),
    431: Kind("Request Header Fields Too Large", "headers_too_large", "The headers are too large."),
    500: Kind("Internal Server Error", "failed", "A fault of the service; the request id finds it in the log."),
    503: Kind("Service Unavailable", "busy", "Too busy, shutting down, or the store does not answer; nothing was acknowledged."),
    504: Kind(
        "Gateway Timeout",
        "too_slow",
        "It took too long; whether it was done is not known, so repeat it with the same idempotency key.",
    ),
}
ROUTES = {
    404: "there is no such route; /openapi.json lists them",
    405: "the route does not take this method; Allow names those it does",
}
ANYWHERE = tuple(status for status in KINDS if status != 409)  # statuses that any route may answer


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    model_config = ConfigDict(extra="forbid")

    where: str
    why: str


class ProblemBody(BaseModel):
    """Why a request was not done (RFC 9457)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "Not Found",
                    "status": 404,
                    "detail": "there is no user 'ada'; expected one who has given feedback or consent",
                    "code": "unknown_user",
                    "request_id": "2f0c7a61e4b84f6d8f5a3f0c9a1b7d52",
                    "errors": [],
                }
            ]
        }
    )

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None
    errors: list[Fault]


class Problem(HTTPException):
    """A request that is not done.

    Args:
        status: of HTTP.
        detail: what was wrong, what was expected, what to do.
        code: one word for programs, such as "unknown_user"; by default the status in words.
        headers: of the answer.
        errors: (where, why) of every fault.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[tuple[str, str]] = (),
    ):
        super().__init__(status, detail, dict(headers or {}))
        self.kind = KINDS.get(status, Kind("Refused", "refused", ""))
        self.code, self.errors = code or self.kind.code, tuple(errors)

    @classmethod
    def later(cls, status: int, detail: str, *, seconds: float = PAUSE, code: str | None = None) -> "Problem":
        """A request that may be repeated after `seconds` (429 or 503, with `Retry-After` in whole seconds, rounded up)."""
        return cls(status, detail, code=code, headers={"Retry-After": str(max(1, -int(-seconds // 1)))})

    def response(self, request_id: str | None) -> JSONResponse:
        """The answer, for routes and middleware alike."""
        content = {
            "type": "about:blank",
            "title": self.kind.title,
            "status": self.status_code,
            "detail": self.detail,
            "code": self.code,
            "request_id": request_id,
            "errors": [{"where": where, "why": why} for where, why in self.errors],
        }
        return JSONResponse(content, self.status_code, dict(self.headers or {}), MEDIA_TYPE)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of FastAPI for these statuses and those that any route may answer, so that no answer is undocumented.

    The shape is named, and `install` adds it: FastAPI's own `model=` would promise plain application/json.
    """
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    return {status: {"description": KINDS[status].meaning, "content": content} for status in sorted({*ANYWHERE, *statuses})}


class Failure(NamedTuple):
    """What a log may hold of an error: its classes, and where it came from, never its words.

    Made at once, because a framework that has handled an error drops its traceback.
    """

    kind: str
    causes: tuple[str, ...]
    where: tuple[str, ...]

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """The class of `error` with its module, those of its causes, and the innermost "file:line function", outermost first."""
        causes: list[str] = []
        cause = error.__cause__ or error.__context__
        while cause is not None and len(causes) < MOST_FRAMES:
            causes.append(type(cause).__qualname__)
            cause = cause.__cause__ or cause.__context__
        frames = traceback.extract_tb(error.__traceback__)[-MOST_FRAMES:]
        places = [(Path(frame.filename), frame) for frame in frames]
        where = (f"{path.parent.name}/{path.name}:{frame.lineno} {frame.name}" for path, frame in places)
        return cls(f"{type(error).__module__}.{type(error).__qualname__}", tuple(causes), tuple(where))

    def facts(self) -> dict[str, str | list[str]]:
        """The fields of a line of the log."""
        return {"error": " from ".join([self.kind, *self.causes]), "where": list(self.where)}


def of_error(error: PalateError) -> Problem:
    """The problem that an error of the library is. Where it is the service's own, its words stay in the process."""
    if isinstance(error, UnknownUserError):
        return Problem(404, str(error), code="unknown_user")
    if isinstance(error, MismatchError):
        return Problem(409, str(error), code="mismatch")
    if isinstance(error, DataError):
        return Problem(422, str(error), code="bad_data")
    if isinstance(error, OverloadedError):
        return Problem.later(503, str(error), seconds=error.retry_after, code="busy")
    if isinstance(error, OSError):  # the store, or an encoder elsewhere: its words may hold addresses and paths
        return Problem.later(503, "what this needs does not answer, so nothing was acknowledged; try again", code="unavailable")
    return Problem(500, "the service failed; the request id finds the reason in its log", code="failed")


def invalid(error: RequestValidationError | ValidationError) -> Problem:
    """What does not fit the schema, as places and reasons without the values: 400 for what is no JSON, else 422.

    The code is "invalid" where the schema says so too, and "bad_data" where the shape is right and the meaning is not.
    """
    found = list(error.errors())
    if any(fault["type"] == "json_invalid" for fault in found):
        why = str(found[0].get("ctx", {}).get("error", "it cannot be read"))
        return Problem(400, f"the body is no JSON: {why}", code="bad_json")
    faults = [(_place(fault["loc"]), _reason(fault)) for fault in found[:MOST_ERRORS]]
    first = f"{faults[0][0]}: {faults[0][1]}" if faults else "it does not fit the schema"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    meant = all(fault["type"] == "value_error" for fault in found)  # by a validator of ours: of the right shape, and no sense
    return Problem(422, f"{first}{more}", code="bad_data" if meant else "invalid", errors=faults)


def _reason(fault: Mapping[str, Any]) -> str:
    """pydantic's words, but for the one of its reasons that repeats what was sent, whole."""
    if fault["type"] == "union_tag_invalid":
        return f"{fault['ctx']['discriminator']} is none of {fault['ctx']['expected_tags']}"
    return str(fault["msg"])


def _place(parts: Sequence[int | str]) -> str:
    """The place of a fault; a key of the caller's may be long, and hold half of a pair of surrogates, which cannot be sent."""
    return "/".join(str(part) for part in parts)[:LONGEST_PLACE].encode("utf-8", "replace").decode()


def request_id(scope: Mapping[str, Any]) -> str | None:
    """The id of a request, where `Observing` has given it one."""
    found = scope.get("state", {}).get("request_id")
    return found if isinstance(found, str) else None


def _say_no_nul(schema: dict[str, Any]) -> None:
    """Have the document say of every text in a query what `guarding.Guard` refuses, so that no valid request is refused."""
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    for parameter in (one for operation in operations for one in operation.get("parameters", ()) if one["in"] == "query"):
        for shape in (parameter["schema"], *parameter["schema"].get("anyOf", ())):
            if shape.get("type") == "string":
                shape.setdefault("pattern", r"^[^\x00]*$")


def install(app: FastAPI) -> None:
    """Have every error of a route answered as a problem, and the shape of problems in the OpenAPI document.

    What nobody foresaw is left to `observing.Observing`.
    """

    def allowed(request: Request) -> str:
        """Every method of a path: the framework names those of the first route that it finds only."""
        path = getattr(request.scope.get("route"), "path", "")
        return ", ".join(sorted(method.upper() for method in app.openapi()["paths"].get(path, ())))

    async def problem(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            found = invalid(error)
        elif isinstance(error, Problem):
            found = error
        elif isinstance(error, HTTPException):
            methods = allowed(request) if error.status_code == 405 else ""
            headers = {"Allow": methods} if methods else error.headers
            found = Problem(error.status_code, ROUTES.get(error.status_code, str(error.detail)), headers=headers)
        elif isinstance(error, PalateError):
            found = of_error(error)
        else:
            raise error
        if found.status_code >= 500:
            request.scope.setdefault("state", {})["failure"] = Failure.of(error)  # for the log
        return found.response(request_id(request.scope))

    for kind in (RequestValidationError, HTTPException, PalateError):
        app.add_exception_handler(kind, problem)
    described, whole = app.openapi, list[dict[str, Any]]()

    def openapi() -> dict[str, Any]:
        if not whole:
            schema = described()
            shapes = ProblemBody.model_json_schema(ref_template="#/components/schemas/{model}")
            known = schema.setdefault("components", {}).setdefault("schemas", {})
            known |= shapes.pop("$defs") | {"ProblemBody": shapes}
            _say_no_nul(schema)
            whole.append(schema)
        return whole[0]

    app.openapi = openapi  # type: ignore[method-assign]
