"""Who may do what: keys, their scopes, and tenants that cannot see each other.

Whoever reads the table of keys learns none, because it holds hashes (`keys`). Whoever guesses learns nothing from the time that
an answer takes: what is looked up is the hash of the guess, and what is found is compared once more in constant time.

Every call of the store carries the tenant of the key. A tenant's name comes from nowhere else, so a request cannot name another.
"""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any, NamedTuple, Protocol

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from palate.server.guarding import ALWAYS, Bucket, Limits
from palate.server.keys import SCOPES, TOKEN, Scoped, digest
from palate.server.problems import Problem, request_id

OPEN = frozenset({"/health", "/ready", "/openapi.json", "/docs", "/redoc"})
UNPACED = OPEN.union(ALWAYS)  # a machine that asks whether the service lives is never told that it asks too often
LOCAL_TENANT = "default"  # of a server without keys

FRESH = 5.0  # seconds for which a key is believed before the store is asked again: a revoked one works no longer than that
STALE = 60.0  # seconds for which a key that was good is believed while the store does not answer
MOST_KEPT = 4096  # keys, known and unknown ones, that are remembered
UNKNOWN_PER_SECOND, UNKNOWN_BURST = 20.0, 100.0  # keys never seen before for which the store is asked


class StoredKey(Protocol):
    """A key as the store has it (`palate.store.records.ApiKey`); the times are unix seconds."""

    @property
    def id(self) -> int: ...
    @property
    def hash(self) -> bytes: ...
    @property
    def tenant(self) -> str: ...
    @property
    def scopes(self) -> Collection[str]: ...
    @property
    def expires(self) -> float | None: ...
    @property
    def revoked(self) -> float | None: ...


class KeyTable(Protocol):
    """Where the keys are: `store.keys`."""

    def find(self, hash: bytes, /) -> StoredKey | None: ...


class Caller(NamedTuple):
    """Whose request it is. `key_id` is empty on a server without keys."""

    tenant: str
    scopes: frozenset[str]
    key_id: str


LOCAL = Caller(LOCAL_TENANT, frozenset(SCOPES), "")


class _Kept(NamedTuple):
    key: StoredKey | None
    read: float


class KeyRing:
    """The keys of a store, remembered for seconds, so that a request does not wait for it.

    A revoked or expired key is refused within `FRESH` seconds. While the store does not answer, keys that were good work on for
    `STALE` seconds, and others are told that the store is away. An unknown key is looked up once in `FRESH` seconds, and unknown
    keys 20 times a second altogether, so that guessing costs the store nothing.

    Args:
        table: the store's keys; its `find` may block, and is called in a thread.
        clock: seconds that never go back.
        now: seconds since 1970, against which expiry is read.
    """

    def __init__(self, table: KeyTable, *, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time):
        self._table, self._clock, self._now = table, clock, now
        self._kept: dict[bytes, _Kept] = {}
        self._unknown = Bucket(UNKNOWN_PER_SECOND, UNKNOWN_BURST, clock)

    async def caller(self, token: str) -> Caller:
        """Whose key this is.

        Raises:
            Problem: 401, a key that is not known, expired or revoked; 429, too many unknown keys at the moment; 503, the store
                does not answer.
        """
        if TOKEN.fullmatch(token) is None:
            raise _denied("the key has another form; expected palate_ and 43 characters")
        hashed = digest(token)
        key = await self._found(hashed)
        if key is None or not hmac.compare_digest(key.hash, hashed):
            raise _denied("the key is not known; expected one that `palate keys add` has made")
        if key.revoked is not None:
            raise _denied("the key was revoked")
        if key.expires is not None and key.expires <= self._now():
            raise _denied("the key has expired")
        return Caller(key.tenant, frozenset(key.scopes), str(key.id))

    async def _found(self, hashed: bytes) -> StoredKey | None:
        kept, now = self._kept.get(hashed), self._clock()
        if kept is not None and now - kept.read < FRESH:
            return kept.key
        if kept is None:
            wait = self._unknown.take()
            if wait:
                raise Problem.later(429, "too many unknown keys at the moment; try again", seconds=wait, code="unknown_keys")
        try:
            key = await asyncio.to_thread(self._table.find, hashed)
        except OSError:  # every error of a store is one
            if kept is not None and kept.key is not None and now - kept.read < STALE:
                return kept.key
            raise Problem.later(503, "the store of the keys does not answer; try again", code="store") from None
        self._kept.pop(hashed, None)  # to the end of the order in which they are forgotten
        while len(self._kept) >= MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[hashed] = _Kept(key, now)
        return key


def _denied(detail: str) -> Problem:
    return Problem(401, detail, headers={"WWW-Authenticate": 'Bearer realm="palate"'})


class Access:
    """ASGI middleware: every request has a `Caller`, found before its body is read, and a key asks no more often than it may.

    Args:
        app: what is behind it.
        keys: None for a server without keys, on loopback: then every request is the tenant "default" with all scopes.
        limits: `per_second` and `burst` of one key.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, limits: Limits):
        self.app, self.keys, self.limits = app, keys, limits
        self._buckets: dict[str, Bucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            state = scope.setdefault("state", {})
            try:
                if self.keys is None:
                    state["caller"] = LOCAL
                elif scope["path"] not in OPEN:
                    state["caller"] = await self.keys.caller(_token(scope))
                if scope["path"] not in UNPACED:
                    self._paced(state["caller"].key_id)
            except Problem as problem:
                await problem.response(request_id(scope))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _paced(self, key_id: str) -> None:
        rate = self.limits.per_second
        if rate is None:
            return
        bucket = self._buckets.get(key_id)
        if bucket is None:
            if len(self._buckets) >= MOST_KEPT:  # a full bucket is as good as a new one
                self._buckets = {name: kept for name, kept in self._buckets.items() if not kept.full}
            bucket = self._buckets[key_id] = Bucket(rate, self.limits.burst)
        wait = bucket.take()
        if wait:
            raise Problem.later(429, f"more than {rate:g} requests a second with this key; wait {wait:.1f} s", seconds=wait)


def _token(scope: Scope) -> str:
    kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not token.strip():
        raise _denied("no key; expected the header Authorization: Bearer palate_...")
    return token.strip()


_BEARER = HTTPBearer(auto_error=False, description="A key made by `palate keys add`; a server on loopback may be without keys.")
_SIGNED = Security(_BEARER)


def needs(scope: Scoped) -> Callable[..., Awaitable[Caller]]:
    """The dependency of a route that asks for `scope`: gives its `Caller`, and answers 403 to a key without it."""

    async def dependency(request: Request, _: HTTPAuthorizationCredentials | None = _SIGNED) -> Caller:
        return permitted(request.scope, scope)

    return dependency


def permitted(request: Any, scope: Scoped) -> Caller:
    """The `Caller` that `Access` has put into an ASGI scope.

    Raises:
        Problem: 401, there is none; 403, its key lacks `scope`.
    """
    caller = request.get("state", {}).get("caller")
    if not isinstance(caller, Caller):
        raise _denied("no key; expected the header Authorization: Bearer palate_...")
    if scope not in caller.scopes:
        has = ", ".join(sorted(caller.scopes)) or "nothing"
        raise Problem(403, f"the key may do {has}, and this needs {scope}; use a key made with --scope {scope}", code="scope")
    return caller
