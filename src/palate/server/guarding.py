"""What a request may cost before anything reads it: sizes, depth, encodings, time and numbers. And headers that protect browsers.

`Guard` looks at the head of a request and watches the clock; `access.Access` stands behind it; `Bodies`, behind that, reads a
body whole, within a size and a time, and checks that it is UTF-8 and JSON that is not absurdly deep, so that nothing is read of
anybody without a key. All of it is linear in the request, and a refused one costs no thread, no encoder and no store.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated
from urllib.parse import unquote_to_bytes

import numpy as np
from pydantic import StringConstraints
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from palate.calling import MAX_NAME, NAME
from palate.errors import DataError
from palate.server.problems import Problem, request_id

ALWAYS = ("/health", "/ready", "/metrics")  # answered however busy the service is
DOCS = ("/docs", "/redoc")
PARTS = 100_000  # arrays and objects of a body: more than any that fits a route, and 4 MB of "[]," would take a parser seconds
LARGE = 256 << 10  # bytes of a body that is checked and parsed in threads, because either takes milliseconds

UserId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME, pattern=NAME)]

# Atomic, so that no body makes it go back: each character is read once. A string without an end reaches to the body's.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = np.zeros(256, np.int32)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # escapes of surrogates, of which two together are one character
_PAIR = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]", re.DOTALL)
_LOOPBACK = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?")


@dataclass(frozen=True)
class Limits:
    """What one request, and one key, may ask for. How many texts and how long, the bodies say (`bodies`).

    Args:
        body_bytes: of a request's body.
        depth: of nested arrays and objects in a body.
        header_bytes: of all headers together.
        path_bytes: of the path and the query, as they are sent.
        upload_seconds: until the whole body is there.
        seconds: for an answer, the upload included.
        at_once: requests that are being answered; more are told to come back.
        per_second: requests of one key, on average; None for no limit.
        burst: requests of one key at once, after a pause.

    Raises:
        DataError: a number that is not positive.
    """

    body_bytes: int = 4 << 20
    depth: int = 32
    header_bytes: int = 16 << 10
    path_bytes: int = 8 << 10
    upload_seconds: float = 10.0
    seconds: float = 30.0
    at_once: int = 512
    per_second: float | None = None
    burst: float = 200.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < float("inf"):
                raise DataError(f"{field.name} is {value}; expected a positive number")


class Bucket:
    """A token bucket: `per_second` on average, `burst` at once. Not for several threads.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.per_second, self.burst, self._clock = per_second, burst, clock
        self._left, self._then = burst, clock()

    def take(self) -> float:
        """Seconds to wait until there is a token again; 0.0 where there was one, and it is taken."""
        now = self._clock()
        self._left = min(self.burst, self._left + (now - self._then) * self.per_second)
        self._then = now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) / self.per_second

    @property
    def full(self) -> bool:
        """Nothing was taken for so long that a new bucket would be the same."""
        return self._left + (self._clock() - self._then) * self.per_second >= self.burst


class Guard:
    """ASGI middleware that refuses heads which are too large or uncertain, what takes too long, and what is too many at once.

    Args:
        app: what is behind it.
        limits: the limits.
        tls: say to browsers that this address is always asked over TLS (HSTS).
        local_only: only requests for a loopback name are answered. A server without keys needs it: a page in a browser on the
            same machine could otherwise reach it under a name of its own that resolves to 127.0.0.1 (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, limits: Limits, *, tls: bool = False, local_only: bool = False):
        self.app, self.limits, self.local_only = app, limits, local_only
        self.at_once = 0
        self._headers = {
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
            "referrer-policy": "no-referrer",
            "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
            "cross-origin-resource-policy": "same-origin",
        }
        if tls:
            self._headers["strict-transport-security"] = "max-age=31536000"
        # FastAPI's pages load their script from a public address; they show the schema and hold nothing of anybody
        self._docs = self._headers | {
            "content-security-policy": "default-src 'none'; script-src https://cdn.jsdelivr.net 'unsafe-inline'; "
            "style-src https://cdn.jsdelivr.net 'unsafe-inline'; img-src https://fastapi.tiangolo.com data:; "
            "connect-src 'self'; frame-ancestors 'none'"
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, headers = False, self._docs if scope["path"] in DOCS else self._headers

        async def protected(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(headers)
            await send(message)

        try:
            await self._answered(scope, receive, protected)
        except Problem as problem:
            if started:
                raise
            await problem.response(request_id(scope))(scope, receive, protected)

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self.limits
        self._check_head(scope)
        if scope["path"] in ALWAYS:
            await self.app(scope, receive, send)
            return
        if self.at_once >= limits.at_once:
            raise Problem.later(503, f"{self.at_once} requests are being answered, the most at once; try again", code="busy")
        self.at_once += 1
        try:
            async with asyncio.timeout(limits.seconds) as within:
                await self.app(scope, receive, send)
        except TimeoutError:
            if not within.expired():
                raise
            raise Problem(504, f"no answer within {limits.seconds:g} s; whether it was done is not known") from None
        finally:
            self.at_once -= 1

    def _check_head(self, scope: Scope) -> None:
        limits = self.limits
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > limits.header_bytes:
            raise Problem(431, f"{size} bytes of headers; expected at most {limits.header_bytes}")
        raw = scope.get("raw_path") or scope["path"].encode()
        size = len(raw) + len(scope["query_string"])
        if size > limits.path_bytes:
            raise Problem(414, f"a path and query of {size} bytes; expected at most {limits.path_bytes}")
        check_path(raw)
        try:
            query = unquote_to_bytes(scope["query_string"]).decode()
        except UnicodeDecodeError:
            raise Problem(400, "the query is no UTF-8; expected percent-encoded UTF-8", code="bad_query") from None
        if "\x00" in query:
            raise Problem(400, "the query holds a NUL; expected text without one", code="bad_query")
        if self.local_only:
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if len(hosts) != 1 or _LOOPBACK.fullmatch(hosts[0]) is None:  # of two, who is between might believe the other
                raise Problem(
                    403, "a server without keys answers under localhost, 127.0.0.1 or [::1] only; start it with keys", code="host"
                )


class Bodies:
    """ASGI middleware that refuses bodies which are too large, too slow, too deep, or no text; the rest comes whole."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await self._body(scope, receive)
        except Problem as problem:
            await problem.response(request_id(scope))(scope, receive, send)
            return
        if body is not None:  # else the caller has left
            whole: Message = {"type": "http.request", "body": body, "more_body": False}
            await self.app(scope, again(whole, receive), send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, checked; None where the caller left before its end."""
        limits, headers = self.limits, Headers(scope=scope)
        told = headers.get("content-length", "0")
        if told.isdecimal() and int(told[:20]) > limits.body_bytes:
            raise _too_large(limits)
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.upload_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limits.body_bytes:
                        raise _too_large(limits)
                    parts.append(part)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Problem(
                408, f"{size} bytes of the body came within {limits.upload_seconds:g} s, not all", headers={"Connection": "close"}
            ) from None
        body = b"".join(parts)
        if body:
            kind = headers.get("content-type", "")
            if kind.partition(";")[0].strip().lower() != "application/json":
                raise Problem(415, "the body has another content type; expected application/json")
            if headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
                raise Problem(415, "the body is compressed; expected it as it is, without Content-Encoding", code="encoding")
            if len(body) > LARGE:
                await asyncio.to_thread(check_json, body, limits.depth)
            else:
                check_json(body, limits.depth)
        return body


def _too_large(limits: Limits) -> Problem:
    # closed, because the rest of the body would be read as the next request
    return Problem(413, f"the body is larger than {limits.body_bytes} bytes, the most", headers={"Connection": "close"})


def again(message: Message, receive: Receive) -> Receive:
    """A `receive` that gives a message once more, and then what really comes (the rest of a body, or that the caller leaves)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return message

    return replay


def check_path(raw: bytes) -> None:
    """Refuse a path whose decoded form is not certain, since it would name somebody else.

    A server decodes a path leniently: broken UTF-8 becomes the same replacement character for everybody, and an encoded slash
    moves where the id ends.

    Raises:
        Problem: 400, for broken UTF-8, control characters, an encoded slash, or a segment "." or "..".
    """
    segments = raw.split(b"/")
    try:
        decoded = [unquote_to_bytes(segment).decode() for segment in segments]
    except UnicodeDecodeError:
        raise Problem(400, "the path is no UTF-8; expected percent-encoded UTF-8", code="bad_path") from None
    for segment in decoded:
        if "/" in segment:
            raise Problem(400, "the path holds an encoded slash; a user id may have none", code="bad_path")
        if segment in (".", ".."):
            raise Problem(400, f"the path holds the segment {segment!r}; a user id may not be it", code="bad_path")
        if any(char < " " or "\x7f" <= char <= "\x9f" for char in segment):
            raise Problem(400, "the path holds a control character; a user id may have none", code="bad_path")


def check_json(body: bytes, depth: int) -> None:
    """Refuse bytes of which a reader of JSON could make something unexpected.

    Cost: linear; 5 us for a ranking of 16 candidates, a few ms for a megabyte of text, some tens for one of brackets only.

    Raises:
        Problem: 400, for what is not UTF-8, holds a NUL byte (UTF-16 and UTF-32 do), is nested deeper than `depth`, or has half
            of a pair of surrogates, which is no character and can neither be stored nor hashed; 413, for more than `PARTS` arrays
            and objects; 422, for a field that stands twice in an object: readers differ in which of the two they believe.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Problem(400, f"the body is no UTF-8 at byte {error.start}; expected JSON in UTF-8", code="bad_encoding") from None
    if b"\x00" in body:
        raise Problem(400, "the body holds a NUL byte; expected JSON in UTF-8", code="bad_encoding")
    if body.count(b"[") + body.count(b"{") > depth:
        brackets = np.frombuffer(_STRING.sub(b"", body).translate(None, _NOT_BRACKETS), np.uint8)
        if np.cumsum(_STEP[brackets], dtype=np.int32).max(initial=0) > depth:
            raise Problem(400, f"the JSON is nested deeper than {depth} levels, the most", code="too_deep")
        if np.count_nonzero(_STEP[brackets] > 0) > PARTS:
            raise Problem(413, f"the JSON has more than {PARTS} arrays and objects, the most", code="too_many_parts")
    if b"\\u" in body:
        halves = len(_HALF.findall(body))
        # an escaped backslash before a "u" looks like an escape and is none, so then a parser has to say
        if halves and (halves != 2 * len(_PAIR.findall(body)) or b"\\\\u" in body):
            _check_halves(body)
    try:
        _ONCE.decode(text)
    except ValueError:
        return  # no JSON: whoever reads it says where


def _no_field_twice(fields: list[tuple[str, object]]) -> None:
    if len(dict(fields)) < len(fields):
        raise Problem(422, "a field stands twice in one object of the JSON; expected each once", code="field_twice")


# Numbers are not made of their digits: int() refuses some thousands of them, and what a number is matters to nobody here.
_ONCE = json.JSONDecoder(object_pairs_hook=_no_field_twice, parse_int=len, parse_float=len, strict=False)


def _check_halves(body: bytes) -> None:
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Problem(400, "a text holds half of a surrogate pair, which is no character", code="bad_encoding") from None
    except ValueError:
        return  # no JSON: whoever reads it says where
