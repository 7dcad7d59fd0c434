"""Keys: who they are, what they may, for how long, and that no key opens another tenant's door."""

import asyncio
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
from fastapi import FastAPI, Security
from starlette.testclient import TestClient

from palate.errors import DataError, StoreDownError
from palate.server import access, problems
from palate.server.access import FRESH, STALE, UNKNOWN_BURST, Access, Caller, KeyRing, needs
from palate.server.guarding import Bodies, Limits
from palate.server.keys import SCOPES, digest, mint, scopes_of
from palate.server.problems import Problem
from palate.store import open_store


class Key(NamedTuple):
    id: int
    tenant: str
    scopes: tuple[str, ...]
    hash: bytes
    expires: float | None = None
    revoked: float | None = None


class Table:
    """Keys in memory, which can be away, and which counts how often it is asked."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Key] = {}
        self.asked, self.away = 0, False

    def find(self, hash: bytes) -> Key | None:
        self.asked += 1
        if self.away:
            raise StoreDownError("sesame.example does not answer")
        return self.rows.get(hash)

    def add(self, tenant: str, *scopes: str, expires: float | None = None) -> str:
        token, hashed = mint()
        self.rows[hashed] = Key(len(self.rows) + 1, tenant, scopes, hashed, expires)
        return token


class Clock:
    """Seconds that pass when a test says so; also the time of day."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def ring(table: Table) -> tuple[KeyRing, Clock]:
    clock = Clock()
    return KeyRing(table, clock=clock, now=clock), clock


def ask(keys: KeyRing, token: str) -> Caller | tuple[int, str]:
    """The caller, or the status and the words of the refusal."""
    try:
        return asyncio.run(keys.caller(token))
    except Problem as problem:
        return problem.status_code, problem.detail


def test_keys_are_256_random_bits_of_which_a_hash_is_kept() -> None:
    minted = [mint() for _ in range(200)]
    assert len({token for token, _ in minted}) == 200
    for token, hashed in minted[:20]:
        assert re.fullmatch(r"palate_[A-Za-z0-9_-]{43}", token)
        assert hashed == hashlib.sha256(token.encode()).digest() == digest(token)


def test_scopes_by_name() -> None:
    assert scopes_of("feedback, rank") == ("rank", "feedback")
    for wrong, why in (("rank,write", "the scopes write do not exist"), (" , ", "0 scopes")):
        with pytest.raises(DataError, match=why):
            scopes_of(wrong)


def test_a_good_key_and_all_kinds_of_bad_ones() -> None:
    table = Table()
    keys, clock = ring(table)
    good, short = table.add("acme", "rank", "feedback"), table.add("acme", "rank", expires=clock.at + 60)
    assert ask(keys, good) == Caller("acme", frozenset({"rank", "feedback"}), "1")
    assert ask(keys, short) == Caller("acme", frozenset({"rank"}), "2")
    for unknown in (good[:-1] + ("A" if good[-1] != "A" else "B"), good.lower(), mint()[0]):
        assert ask(keys, unknown) == (401, "the key is not known; expected one that `palate keys add` has made")
    for wrong in ("", "palate_", good + "A", good.removeprefix("palate_"), good[:-1] + "\n", "palate_" + "é" * 43):
        assert ask(keys, wrong) == (401, "the key has another form; expected palate_ and 43 characters")
    clock.at += 60
    assert ask(keys, short) == (401, "the key has expired")


def test_a_row_under_a_wrong_hash_opens_nothing() -> None:
    """What the store gives is compared once more: a store that finds loosely would otherwise let anybody in."""

    class Loose(Table):
        def find(self, hash: bytes) -> Key | None:
            return next(iter(self.rows.values()))

    table = Loose()
    table.add("acme", "rank")
    assert ask(ring(table)[0], mint()[0]) == (401, "the key is not known; expected one that `palate keys add` has made")


def test_a_revoked_key_works_for_seconds_at_most_and_the_store_is_asked_rarely() -> None:
    table = Table()
    keys, clock = ring(table)
    token = table.add("acme", "rank")
    for _ in range(100):
        assert isinstance(ask(keys, token), Caller)
    assert table.asked == 1
    hashed = digest(token)
    table.rows[hashed] = table.rows[hashed]._replace(revoked=clock.at)
    clock.at += FRESH
    assert ask(keys, token) == (401, "the key was revoked")


def test_while_the_store_is_away_known_keys_go_on_for_a_minute() -> None:
    table = Table()
    keys, clock = ring(table)
    token, other = table.add("acme", "rank"), table.add("acme", "rank")
    assert isinstance(ask(keys, token), Caller)
    table.away = True
    clock.at += STALE - 1
    assert isinstance(ask(keys, token), Caller)
    assert ask(keys, other) == (503, "the store of the keys does not answer; try again")
    clock.at += 1
    assert ask(keys, token) == (503, "the store of the keys does not answer; try again")
    table.away = False
    assert isinstance(ask(keys, token), Caller)


def test_guessing_costs_the_store_little_and_known_keys_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MOST_KEPT", 50)
    table = Table()
    keys, clock = ring(table)
    token = table.add("acme", "rank")
    assert isinstance(ask(keys, token), Caller)
    answers = [ask(keys, mint()[0]) for _ in range(300)]
    assert {answer[0] for answer in answers if isinstance(answer, tuple)} == {401, 429}
    assert table.asked <= UNKNOWN_BURST + 1
    assert len(keys._kept) <= 50
    clock.at += 1
    assert isinstance(ask(keys, token), Caller)


# -- over HTTP


def service(keys: KeyRing | None, limits: Limits | None = None) -> TestClient:
    app = FastAPI()

    @app.post("/v1/rank")
    async def rank(caller: Annotated[Caller, Security(needs("rank"))], body: dict[str, Any]) -> str:
        return caller.tenant

    @app.get("/v1/users")
    async def users(caller: Annotated[Caller, Security(needs("users"))]) -> list[str]:
        return sorted(caller.scopes)

    @app.get("/health")
    async def health() -> str:
        return "well"

    problems.install(app)
    app.add_middleware(Bodies, limits=limits or Limits())
    app.add_middleware(Access, keys=keys, limits=limits or Limits())
    return TestClient(app)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_scopes_and_tenants_over_http() -> None:
    table = Table()
    client = service(KeyRing(table))
    acme, other = table.add("acme", "rank"), table.add("other", "users", "rank")
    assert client.post("/v1/rank", json={"tenant": "other"}, headers=bearer(acme)).json() == "acme"
    assert client.post("/v1/rank?tenant=acme", json={}, headers=bearer(other) | {"x-tenant": "acme"}).json() == "other"
    assert client.get("/v1/users", headers=bearer(other)).json() == ["rank", "users"]
    refused = client.get("/v1/users", headers=bearer(acme))
    assert (refused.status_code, refused.json()["detail"]) == (
        403,
        "the key may do rank, and this needs users; use a key made with --scope users",
    )
    assert client.get("/health").json() == "well"


@pytest.mark.parametrize("header", [None, "", "Basic YTpi", "Bearer", "Bearer  ", "palate_x"])
def test_no_key_is_refused_before_the_body_is_read(header: str | None) -> None:
    client = service(KeyRing(Table()))
    for path in ("/v1/rank", "/v1/nothing", "/metrics"):
        refused = client.post(path, content=b"\xff no JSON", headers={} if header is None else {"authorization": header})
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Bearer realm="palate"')
        assert "palate_..." in refused.json()["detail"]


def test_without_a_key_nothing_of_a_body_is_read() -> None:
    async def app(*_: Any) -> None:
        raise AssertionError("called without a key")

    async def receive() -> Any:
        raise AssertionError("the body was asked for")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/rank", "headers": [(b"content-length", b"9")]}
    asyncio.run(Access(Bodies(app, Limits()), KeyRing(Table()), Limits())(scope, receive, send))
    assert sent[0]["status"] == 401


def test_without_keys_everybody_is_the_default_tenant() -> None:
    client = service(None)
    assert client.post("/v1/rank", json={}).json() == "default"
    assert client.get("/v1/users").json() == sorted(SCOPES)


def test_a_key_asks_no_more_often_than_it_may_and_others_do_not_suffer() -> None:
    table = Table()
    client = service(KeyRing(table), Limits(per_second=0.01, burst=3))
    one, two = table.add("acme", "users"), table.add("acme", "users")
    statuses = [client.get("/v1/users", headers=bearer(one)) for _ in range(5)]
    assert [answer.status_code for answer in statuses] == [200, 200, 200, 429, 429]
    assert 90 <= int(statuses[3].headers["retry-after"]) <= 100
    assert client.get("/v1/users", headers=bearer(two)).status_code == 200


def test_who_asks_whether_the_service_lives_is_never_told_that_it_asks_too_often() -> None:
    client = service(None, Limits(per_second=0.01, burst=1))
    assert [client.get(path).status_code for path in ("/health", "/health", "/v1/users", "/v1/users", "/health")] == [
        200,
        200,
        200,
        429,
        200,
    ]


def test_the_openapi_document_says_that_keys_are_needed() -> None:
    document = service(None).get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert document["paths"]["/v1/users"]["get"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in document["paths"]["/health"]["get"]


# -- palate keys


def test_keys_from_the_command_line_to_the_service(palate_command: Callable[..., Any], tmp_path: Path) -> None:
    where = ("--store", tmp_path / "profiles.db")
    made = palate_command("keys", "add", *where, "--tenant", "acme", "--scope", "rank,users", "--name", "web", "--expires", "90d")
    token = made.out.strip()
    assert (made.code, re.fullmatch(r"palate_[A-Za-z0-9_-]{43}", token) is not None) == (0, True)
    assert "key 1 of tenant 'acme' for rank, users, until " in made.err
    assert token not in made.err
    with open_store(str(where[1])) as store:
        client = service(KeyRing(store.keys))
        assert client.post("/v1/rank", json={}, headers=bearer(token)).json() == "acme"
        assert client.post("/v1/rank", json={}, headers=bearer(mint()[0])).status_code == 401
        listed = palate_command("keys", "list", *where)
        assert "rank, users" in listed.out
        assert palate_command("keys", "revoke", *where, 1).code == 0
        assert service(KeyRing(store.keys)).get("/v1/users", headers=bearer(token)).json()["detail"] == "the key was revoked"
    assert "revoked 20" in palate_command("keys", "list", *where).out
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert digest(token) in content
    assert token[len("palate_") :].encode() not in content + listed.out.encode()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--tenant", "a", "--scope", "write"), "the scopes write do not exist"),
        (("--tenant", "a", "--scope", "rank", "--expires", "soon"), "--expires is 'soon'; expected a number and m, h or d"),
        (("--tenant", "", "--scope", "rank"), "the tenant has 0 characters"),
    ],
)
def test_keys_that_cannot_be(palate_command: Callable[..., Any], tmp_path: Path, more: tuple[str, ...], why: str) -> None:
    done = palate_command("keys", "add", "--store", tmp_path / "profiles.db", *more)
    assert (done.code, done.out) == (2, "")
    assert why in done.err
    assert palate_command("keys", "revoke", "--store", tmp_path / "profiles.db", 7).code == 2
