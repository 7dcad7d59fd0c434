"""A client of a running service (`palate serve`): `Client`, and `AsyncClient` whose methods are awaited.

    with Client("http://127.0.0.1:8000") as palate:
        palate.consent("ada", "personalise", "2026-01")
        palate.feedback("ada", {"kind": "choice", "prompt": "Lunch?", "chosen": "Soup.", "rejected": "Consider a sandwich."})
        best = palate.rank("ada", "Dinner?", ["Soup.", "A salad, perhaps."]).results[0].index

What passes (no connection, no answer in time, 408, 429, 502, 503, 504) is tried again, with pauses that double and are partly
random, or are as long as the service says. What is tried again is done once: reading changes nothing, and feedback carries an
idempotency key of its own. The steps of that are a generator without a connection (`_attempts`), which both clients drive;
neither httpx's own retries, which know of connections only, nor a library's decorators could be shared like this.
"""

import asyncio
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, Self, TypeVar
from urllib.parse import urlsplit

from palate import calling
from palate.calling import AnswerError, Call, Line
from palate.errors import DataError, MismatchError, MissingExtraError, PalateError, UnknownUserError

if TYPE_CHECKING:
    import httpx

P = ParamSpec("P")
T = TypeVar("T")

PASSES = frozenset({408, 429, 502, 503, 504})
NOT_BEGUN = frozenset({429, 503})  # what the service says before it does anything
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 20.0  # seconds
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
MOST_QUOTED = 300  # characters of a foreign answer in an error


class ServiceError(PalateError, ConnectionError):
    """A service that refused, failed, or did not answer within the limits.

    Attributes:
        status: of HTTP; None where there was no answer.
        code: one word of the service for what it was, such as "busy".
        request_id: by which its log knows the request.
    """

    status: int | None = None
    code: str | None = None
    request_id: str | None = None


class DeniedError(ServiceError):
    """The key is missing, not known, expired or revoked, or lacks a scope."""


@dataclass(frozen=True)
class Patience:
    """How long a client waits and how often it asks.

    Args:
        timeout: seconds for one answer.
        retries: of a request that failed in a way that may pass.
        total: seconds for a request with all its retries; a pause that would end later is not begun.

    Raises:
        DataError: a number that is not positive (retries may be 0).
    """

    timeout: float = 10.0
    retries: int = 4
    total: float = 60.0

    def __post_init__(self) -> None:
        if not (0 < self.timeout < float("inf") and 0 < self.total < float("inf") and self.retries >= 0):
            raise DataError(f"{self}; expected positive seconds, and retries from 0")


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    content: bytes


class _Route(Generic[P, T]):
    """A function that builds a `Call`, as the method of a client that sends it."""

    def __init__(self, build: Callable[P, Call[T]]):
        self.build = build

    def __get__(self, client: "Client | None", kind: type) -> Callable[P, T]:
        def method(*given: P.args, **named: P.kwargs) -> T:
            if client is None:
                raise TypeError(f"{kind.__name__}.{self.build.__name__} is called on the class; call it on a client")
            return client.send(self.build(*given, **named))

        return wraps(self.build)(method)


class _AwaitedRoute(Generic[P, T]):
    """The same for a client whose methods are awaited."""

    def __init__(self, build: Callable[P, Call[T]]):
        self.build = build

    def __get__(self, client: "AsyncClient | None", kind: type) -> Callable[P, Awaitable[T]]:
        async def method(*given: P.args, **named: P.kwargs) -> T:
            if client is None:
                raise TypeError(f"{kind.__name__}.{self.build.__name__} is called on the class; call it on a client")
            return await client.send(self.build(*given, **named))

        return wraps(self.build)(method)


class Client:
    """A service, asked at once. Safe for several threads; close it, or use it in a `with`.

    Args:
        url: such as "http://127.0.0.1:8000".
        key: made by `palate keys add`; where None, that of the variable PALATE_KEY, and without one none is sent.
        patience: how long to wait and how often to ask.
        plain_http: send the key without TLS to another machine, over a network that nobody else reads.
        transport: of httpx, in place of the network; for tests.

    Raises:
        DataError: an address that is none, or a key that would go over the network in clear.
        MissingExtraError: httpx is not installed.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        patience: Patience | None = None,
        plain_http: bool = False,
        transport: "httpx.BaseTransport | None" = None,
    ):
        httpx, self.patience = _httpx(), patience or Patience()
        self.url, settings = _address(url, key, plain_http)
        self._http = httpx.Client(timeout=self.patience.timeout, transport=transport, **settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, call: Call[T]) -> T:
        """The answer to any call.

        Raises:
            UnknownUserError: there is no such user.
            ConsentError: feedback of somebody who has not agreed to it.
            MismatchError: it contradicts what is stored (409).
            DataError: it is not what the service expects.
            DeniedError: the key may not do it.
            ServiceError: the service failed, or did not answer within the limits.
        """
        httpx, steps = _httpx(), _attempts(call, self.patience)
        pause = next(steps)
        while True:
            if pause:
                time.sleep(pause)
            tried: _Answer | Exception
            try:
                found = self._http.request(call.method, call.path, **_sent(call))
                tried = _Answer(found.status_code, found.headers, found.content)
            except httpx.TransportError as error:
                tried = error
            try:
                pause = steps.send(tried)
            except StopIteration as done:
                answer: T = done.value
                return answer

    def every_user(self, page: int = 1000) -> Iterator[Line]:
        """Every user by id, `page` of them in a request. Users who come while it runs may be missed."""
        after: str | None = ""
        while after is not None:
            found = self.users(after=after, limit=page)
            yield from found.users
            after = found.next

    rank = _Route(calling.rank)
    score = _Route(calling.score)
    rank_household = _Route(calling.rank_household)
    feedback = _Route(calling.feedback)
    undo = _Route(calling.undo)
    question = _Route(calling.question)
    explain = _Route(calling.explain)
    set_axis = _Route(calling.set_axis)
    consent = _Route(calling.consent)
    user = _Route(calling.user)
    users = _Route(calling.users)
    export = _Route(calling.export)
    delete = _Route(calling.delete)
    models = _Route(calling.models)
    ready = _Route(calling.ready)


class AsyncClient:
    """A service whose answers are awaited. Arguments and errors as for `Client`; close it, or use it in an `async with`."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        patience: Patience | None = None,
        plain_http: bool = False,
        transport: "httpx.AsyncBaseTransport | None" = None,
    ):
        httpx, self.patience = _httpx(), patience or Patience()
        self.url, settings = _address(url, key, plain_http)
        self._http = httpx.AsyncClient(timeout=self.patience.timeout, transport=transport, **settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        """The answer to any call. Errors as in `Client.send`."""
        httpx, steps = _httpx(), _attempts(call, self.patience)
        pause = next(steps)
        while True:
            if pause:
                await asyncio.sleep(pause)
            tried: _Answer | Exception
            try:
                found = await self._http.request(call.method, call.path, **_sent(call))
                tried = _Answer(found.status_code, found.headers, found.content)
            except httpx.TransportError as error:
                tried = error
            try:
                pause = steps.send(tried)
            except StopIteration as done:
                answer: T = done.value
                return answer

    async def every_user(self, page: int = 1000) -> AsyncIterator[Line]:
        """Every user by id, `page` of them in a request. Users who come while it runs may be missed."""
        after: str | None = ""
        while after is not None:
            found = await self.users(after=after, limit=page)
            for line in found.users:
                yield line
            after = found.next

    rank = _AwaitedRoute(calling.rank)
    score = _AwaitedRoute(calling.score)
    rank_household = _AwaitedRoute(calling.rank_household)
    feedback = _AwaitedRoute(calling.feedback)
    undo = _AwaitedRoute(calling.undo)
    question = _AwaitedRoute(calling.question)
    explain = _AwaitedRoute(calling.explain)
    set_axis = _AwaitedRoute(calling.set_axis)
    consent = _AwaitedRoute(calling.consent)
    user = _AwaitedRoute(calling.user)
    users = _AwaitedRoute(calling.users)
    export = _AwaitedRoute(calling.export)
    delete = _AwaitedRoute(calling.delete)
    models = _AwaitedRoute(calling.models)
    ready = _AwaitedRoute(calling.ready)


def _attempts(call: Call[T], patience: Patience) -> Generator[float, _Answer | Exception, T]:
    """Gives seconds to wait before each attempt, takes what came of it, and returns what the answer says, or raises."""
    import httpx

    start, pause, wait = time.monotonic(), FIRST_PAUSE, 0.0
    for attempt in range(patience.retries + 1):
        tried = yield wait
        if isinstance(tried, _Answer):
            if tried.status < 300:
                return _read(call, tried)
            failed, asked = _error(tried), _seconds(tried.headers.get("retry-after"))
            again = tried.status in (PASSES if call.repeatable else NOT_BEGUN)
        else:
            failed, asked = ServiceError(f"no answer from the service: {type(tried).__name__} {tried}".rstrip()), 0.0
            again = call.repeatable or isinstance(tried, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        wait = max(asked, pause * (0.5 + secrets.randbelow(1000) / 2000))
        pause = min(2 * pause, LONGEST_PAUSE)
        if not again or attempt == patience.retries or time.monotonic() - start + wait > patience.total:
            raise failed from (tried if isinstance(tried, Exception) else None)
    raise AssertionError("the last attempt returns or raises")


def _sent(call: Call[Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"params": dict(call.query), "headers": dict(call.headers)}
    if call.body is not None:
        try:
            out["content"] = json.dumps(call.body, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:  # UnicodeEncodeError, of half a surrogate pair, is a ValueError
            raise DataError(f"the request cannot be written as JSON: {error}") from error
        out["headers"]["Content-Type"] = "application/json"
    return out


def _read(call: Call[T], answer: _Answer) -> T:
    try:
        return call.read(json.loads(answer.content))
    except (ValueError, RecursionError) as error:
        said = (
            f"{call.method} {call.path}: {error}" if isinstance(error, AnswerError) else f"{call.method} {call.path} is no JSON"
        )
        raise ServiceError(f"{said}; is there a service of Palate, of this version, at this address?") from error


def _error(answer: _Answer) -> PalateError:
    """The error that a problem (RFC 9457) is; what comes from something else on the way is quoted."""
    try:
        problem = json.loads(answer.content)
        detail, code, request_id = str(problem["detail"]), str(problem["code"]), problem.get("request_id")
    except (ValueError, RecursionError, TypeError, KeyError):
        text = answer.content[:MOST_QUOTED].decode("utf-8", "replace")
        detail, code, request_id = f"the answer is {text!r}", "", None
    if code == "unknown_user":
        return UnknownUserError(detail)
    if answer.status == 403 and "consent" in code:
        from palate.living.consent import ConsentError

        return ConsentError(detail)
    if answer.status == 409:
        return MismatchError(detail)
    if code and answer.status in (400, 404, 413, 414, 422):
        return DataError(detail)
    failed = (DeniedError if answer.status in (401, 403) else ServiceError)(
        f"the service answered {answer.status}: {detail}" + (f" (request {request_id})" if request_id else "")
    )
    failed.status, failed.code, failed.request_id = answer.status, code or None, request_id
    return failed


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() and len(retry_after) < 7 else 0.0


def _address(url: str, key: str | None, plain_http: bool) -> tuple[str, dict[str, Any]]:
    """The address, and the settings of httpx for it.

    What is for this machine and not encrypted goes through no proxy of the environment: that would read the key, and look for
    "this machine" on its own.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise DataError(
            "the url is no address of a service; expected 'http://127.0.0.1:8000' or 'https://host', without a password"
        )
    address, local = url.rstrip("/"), parts.scheme == "http" and parts.hostname in LOOPBACK
    settings: dict[str, Any] = {"base_url": address, "trust_env": not local}
    key = key or os.environ.get("PALATE_KEY") or None
    if key is None:
        return address, settings
    if not key.isascii() or not key.isprintable() or " " in key:
        raise DataError("the key holds characters that no key has; expected palate_ and 43 characters")
    if parts.scheme == "http" and not local and not plain_http:
        raise DataError(
            f"the key would go to {parts.hostname} without TLS, where anybody on the way can read it; use https://, or "
            "plain_http=True on a network of your own"
        )
    return address, settings | {"headers": {"Authorization": f"Bearer {key}"}}


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise MissingExtraError("the client needs httpx; run: pip install 'palate[client]'") from error
    return httpx
