"""What is refused before anything reads it, what a browser is told, and what a log and the metrics must never hold."""

import asyncio
import gc
import gzip
import io
import json
import logging
import logging.config
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any
from urllib.parse import quote

import pytest
from fastapi import Body, FastAPI
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator
from starlette.testclient import TestClient

from palate.errors import DataError, MismatchError, UnknownUserError
from palate.server import problems
from palate.server.batching import OverloadedError
from palate.server.guarding import PARTS, Bodies, Bucket, Guard, Limits, UserId, check_json, check_path
from palate.server.observing import OTHERS, JsonLine, Log, Metrics, Observing, uvicorn_logging
from palate.server.problems import Problem

SMALL = Limits(body_bytes=2000, depth=5, header_bytes=4000, path_bytes=500, upload_seconds=0.2, seconds=0.3, at_once=2)
ERRORS = {
    "unknown": UnknownUserError("there is no user 'ada'"),
    "mismatch": MismatchError("another model"),
    "data": DataError("0 responses"),
    "busy": OverloadedError("64 texts wait"),
    "store": type("StoreError", (problems.PalateError, OSError), {})("postgresql://palate:sesame@host/ does not answer"),
    "bug": RuntimeError("sesame is what the user wrote"),
}


class Said(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    times: int = 1

    @field_validator("times")
    @classmethod
    def _few(cls, times: int) -> int:
        if times == 7:
            raise ValueError("seven times brings bad luck; expected another number")
        return times


class Service(TestClient):
    """A service of four routes behind `Bodies`, `Guard` and `Observing`, with its log and metrics."""

    def __init__(self, limits: Limits = SMALL, **guard: bool):
        app = FastAPI()
        self.lines, self.metrics = io.StringIO(), Metrics()

        @app.post("/v1/users/{user_id}/say", responses=problems.documented())
        async def say(user_id: UserId, said: Annotated[Said, Body()]) -> dict[str, str]:
            return {"user": user_id, "text": said.text}

        @app.get("/fail/{how}")
        async def fail(how: str) -> None:
            raise ERRORS[how]

        @app.get("/wait")
        async def wait(seconds: float) -> str:
            await asyncio.sleep(seconds)
            return "done"

        @app.put("/wait")
        async def nothing() -> None:
            pass

        @app.get("/health")
        async def health() -> str:
            return "well"

        problems.install(app)
        app.add_middleware(Bodies, limits=limits)
        app.add_middleware(Guard, limits=limits, **guard)
        app.add_middleware(Observing, metrics=self.metrics, log=Log(self.lines, key=b"k" * 32))
        super().__init__(app, base_url="http://127.0.0.1")

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.getvalue().splitlines()]


@pytest.fixture(scope="module")
def service() -> Service:
    return Service()


def say(service: TestClient, body: bytes, **headers: str) -> Any:
    return service.post("/v1/users/ada/say", content=body, headers={"content-type": "application/json"} | headers)


# -- bodies


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (b'{"text": "Yes."}', 200, "Yes."),
        (b'{"text": "\\ud83d\\ude00 \xf0\x9f\x98\x80"}', 200, "\U0001f600 \U0001f600"),
        (b'{"text": "[[[[[[[[ \\" {{{{{{{{"}', 200, '[[[[[[[[ \\"'),
        (b'{"text": "Yes."', 400, "no JSON"),
        (b'{"text": "\xff"}', 400, "no UTF-8 at byte 10"),
        ('{"text": "Yes."}'.encode("utf-16"), 400, "UTF-8"),
        (b'{"text": "a\x00"}', 400, "NUL byte"),
        (b'{"text": "\\ud83d"}', 400, "half of a surrogate pair"),
        (b'{"text": "\\ud83d\\ud83d\\ude00"}', 400, "half of a surrogate pair"),
        (b'{"text": "\\uD83D\\uDE00\\uDE00"}', 400, "half of a surrogate pair"),
        (b'{"text": "\\\\ud83d\\ude00"}', 400, "half of a surrogate pair"),
        (b'{"text": "a", "\\ud83d": 1}', 400, "half of a surrogate pair"),
        (b'{"text": "\\\\ud83d"}', 200, "ud83d"),
        (b"[" * 900 + b"]" * 900, 400, "nested deeper than 5 levels"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, 400, "nested deeper than 5 levels"),
        (b"[" * 6, 400, "nested deeper than 5 levels"),
        (b'{"text": "' + b"a" * 2000 + b'"}', 413, "larger than 2000 bytes"),
        (b'{"text": 5}', 422, "body/text: Input should be a valid string"),
        (b'{"text": "a", "times": NaN}', 422, "times"),
        (b'{"text": "a", "times": 1' + b"0" * 500 + b"}", 200, "a"),
        (b'{"text": "a", "next": 1}', 422, "body/next: Extra inputs are not permitted"),
        (b'{"text": "a", "text": "Yes."}', 422, "twice"),
        (b'{"text": "a", "times": [{"x": 1' + b"0" * 900 + b', "\\u0078": 1}]}', 422, "twice"),
        (b'{"text": "a", "times": [{"x": 1}, {"x": 1}]}', 422, "times"),
        (b"", 422, "body: Field required"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_bodies(service: Service, body: bytes, status: int, why: str) -> None:
    found = say(service, body)
    assert (found.status_code, why in found.text.replace("\\\\", "\\")) == (status, True) or why in found.json().get(
        "text", ""
    ), found.text
    if status >= 400:
        assert found.headers["content-type"] == "application/problem+json"
        problem = problems.ProblemBody.model_validate_json(found.content, strict=True)
        assert (problem.status, problem.request_id) == (status, found.headers["x-request-id"])
        assert "Yes." not in found.text  # what was sent is not sent back


def test_a_body_of_nothing_but_parts_is_refused_before_it_is_parsed() -> None:
    for part in (b"[],", b"{},"):
        check_json(b"[" + part * (PARTS - 2) + b"1]", 5)
        with pytest.raises(Problem, match="more than 100000 arrays and objects"):
            check_json(b"[" + part * PARTS + b"1]", 5)
    check_json(b'["' + b"[]{}" * PARTS + b'"]', 5)  # within a text they are none


def test_what_no_schema_can_say_has_a_code_of_its_own(service: Service) -> None:
    for body, code in ((b'{"text": "a", "times": 7}', "bad_data"), (b'{"text": 1, "times": 7}', "invalid")):
        found = say(service, body)
        assert (found.status_code, found.json()["code"]) == (422, code)
    assert found.json()["detail"].endswith("(and 1 more)")
    assert [error["where"] for error in found.json()["errors"]] == ["body/text", "body/times"]


def test_a_body_without_a_length_is_counted_as_it_comes(service: Service) -> None:
    taken = 0

    def parts() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(50):
            taken += 1
            yield b" " * 100

    found = service.post("/v1/users/ada/say", content=parts(), headers={"content-type": "application/json"})
    assert (found.status_code, found.headers["connection"]) == (413, "close")
    told = say(service, b"{}", **{"content-length": "9" * 30})
    assert told.status_code == 413


def test_other_content_types_are_refused(service: Service) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"):
        assert say(service, b'{"text": "Yes."}', **{"content-type": kind}).status_code == 415
    assert say(service, b'{"text": "Yes."}', **{"content-type": "Application/JSON; charset=utf-8"}).status_code == 200
    assert say(service, b'{"text": "Yes."}', **{"content-encoding": "identity"}).status_code == 200
    packed = say(service, gzip.compress(b'{"text": "Yes."}'), **{"content-encoding": "gzip"})
    assert (packed.status_code, packed.json()["code"]) == (415, "encoding")


@given(st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_depth_is_that_of_a_parser(value: Any) -> None:
    """A flat recursion over the parsed value is the oracle; brackets within strings count for nothing."""

    def depth(part: Any) -> int:
        if not isinstance(part, list | dict):
            return 0
        return 1 + max(map(depth, part.values() if isinstance(part, dict) else part), default=0)

    for ascii_only in (True, False):
        body = json.dumps(value, ensure_ascii=ascii_only).encode()
        if (deep := depth(value)) > 0:
            check_json(body, deep)
        if deep > 1:
            with pytest.raises(Problem, match="nested deeper"):
                check_json(body, deep - 1)


@pytest.mark.parametrize("unit", [b'"', b'\\"', b'"\\', b"[", b'["', b'"\\"', b"{\\", b'\\ud800"'])
def test_checking_is_linear_in_the_body(unit: bytes) -> None:
    """A megabyte of what makes naive scanners go back and forth: each is done within a second, also on a busy machine."""
    body = unit * ((1 << 20) // len(unit))
    start = time.process_time()
    with suppress(Problem):  # most of them are refused; how long it takes is what is asked here
        check_json(body, 32)
    assert time.process_time() - start < 1


# -- paths, heads and hosts


@pytest.mark.parametrize("user", ["ada", "Ä", "名前", "a b", "a.b", "...", ".a", "a@b.example", "%F0%9F%98%80", "x" * 256, "%25"])
def test_ids_that_can_be(user: str) -> None:
    check_path(f"/v1/users/{user}".encode())


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("a%2Fb", 400, "bad_path"),
        ("a%2fb", 400, "bad_path"),
        ("%2e%2e", 400, "bad_path"),
        ("%ff", 400, "bad_path"),
        ("%c3%28", 400, "bad_path"),
        ("%ed%a0%80", 400, "bad_path"),  # a surrogate in UTF-8
        ("a%00", 400, "bad_path"),
        ("%0d%0aSet-Cookie:%20a=b", 400, "bad_path"),
        ("%c2%85", 400, "bad_path"),
        ("a" * 257, 422, "invalid"),
        ("a" * 10_000, 414, "too_long"),
        ("%F0%9F%98%80" * 300, 414, "too_long"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_hostile_ids(service: Service, path: str, status: int, code: str) -> None:
    sent = service.build_request(
        "POST", "/v1/users/x/say", content=b'{"text": "a"}', headers={"content-type": "application/json"}
    )
    sent.url = sent.url.copy_with(raw_path=f"/v1/users/{path}/say".encode())
    found = service.send(sent)
    assert (found.status_code, found.json()["code"]) == (status, code), found.text


ids: TypeAdapter[str] = TypeAdapter(UserId)


@given(st.text(min_size=1, max_size=5) | st.text("./\x00\x85\n ab", min_size=1, max_size=4))
def test_an_id_is_good_in_a_body_where_it_is_good_in_a_path(user: str) -> None:
    def good(check: Any) -> bool:
        try:
            check()
        except (Problem, ValidationError):
            return False
        return True

    in_path = good(lambda: check_path(b"/v1/users/" + quote(user, safe="").encode()))
    assert good(lambda: ids.validate_python(user)) == in_path
    assert (re.fullmatch(r"\.{1,2}|.*[/\x00-\x1f\x7f-\x9f].*", user, re.DOTALL) is None) == in_path


def test_heads(service: Service) -> None:
    assert say(service, b'{"text": "a"}', extra="a" * 4000).status_code == 431
    for query in ("a=%ff", "a=%00"):
        found = service.get(f"/wait?{query}")
        assert (found.status_code, found.json()["code"]) == (400, "bad_query")
    nothing, wrong = service.get("/nothing"), service.delete("/wait")
    assert (nothing.status_code, nothing.json()["detail"]) == (404, "there is no such route; /openapi.json lists them")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, PUT")  # of both routes


def test_only_loopback_names_where_there_are_no_keys() -> None:
    local = Service(local_only=True)
    for host in ("127.0.0.1:8000", "localhost", "[::1]:80"):
        assert local.get("/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost:80@evil.example", ""):
        assert local.get("/health", headers={"host": host}).json()["code"] == "host"
    two = [("host", "localhost"), ("host", "evil.example")]
    assert local.get("/health", headers=two).json()["code"] == "host"


def test_headers_for_browsers() -> None:
    for tls in (False, True):
        for path, csp in (("/health", "default-src 'none'; frame-ancestors 'none'"), ("/docs", "https://cdn.jsdelivr.net")):
            found = Service(tls=tls).get(path)
            assert (found.headers["x-content-type-options"], found.headers["cache-control"]) == ("nosniff", "no-store")
            assert csp in found.headers["content-security-policy"]
            assert ("strict-transport-security" in found.headers) == tls
            assert "server" not in found.headers


# -- time and number


def test_too_slow_is_said(service: Service) -> None:
    assert service.get("/wait?seconds=0").json() == "done"
    found = service.get("/wait?seconds=5")
    assert (found.status_code, found.json()["detail"]) == (504, "no answer within 0.3 s; whether it was done is not known")


def test_a_body_that_does_not_come_and_a_caller_that_leaves() -> None:
    async def received(messages: list[dict[str, Any]]) -> list[Any]:
        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await asyncio.sleep(9)
            raise AssertionError

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def app(*_: Any) -> None:
            raise AssertionError("called without a body")

        scope = {"type": "http", "path": "/a", "raw_path": b"/a", "query_string": b"", "headers": []}
        await Bodies(app, SMALL)(scope, receive, send)
        return sent

    part = {"type": "http.request", "body": b"{", "more_body": True}
    slow = asyncio.run(received([part]))
    assert slow[0]["status"] == 408
    assert b"1 bytes of the body came within 0.2 s" in slow[1]["body"]
    assert asyncio.run(received([part, {"type": "http.disconnect"}])) == []


def test_no_more_at_once_than_the_limit() -> None:
    service = Service()

    async def together() -> list[int]:
        import httpx

        transport = httpx.ASGITransport(service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            waits = [client.get("/wait?seconds=0.1") for _ in range(5)]
            return [answer.status_code for answer in await asyncio.gather(*waits, client.get("/health"))]

    statuses = asyncio.run(together())
    assert (sorted(statuses[:5]), statuses[5]) == ([200, 200, 503, 503, 503], 200)
    assert service.get("/wait?seconds=0").status_code == 200  # and afterwards there is room again


def test_a_bucket_gives_its_rate_and_no_more() -> None:
    now = 0.0
    bucket = Bucket(2.0, 3.0, clock=lambda: now)
    assert [bucket.take() for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    taken = 0
    for step in range(1000):  # 100 seconds, asked every tenth of one
        now = step / 10
        taken += bucket.take() == 0.0
    assert taken == pytest.approx(200, abs=1)
    now += 1.5
    assert bucket.full
    with pytest.raises(DataError, match="burst is 0; expected a positive number"):
        Limits(burst=0)


# -- problems, logs and metrics


@pytest.mark.parametrize(
    ("how", "status"), [("unknown", 404), ("mismatch", 409), ("data", 422), ("busy", 503), ("store", 503), ("bug", 500)]
)
def test_every_error_is_a_problem(service: Service, how: str, status: int) -> None:
    found = service.get(f"/fail/{how}")
    assert found.status_code == status
    problem = problems.ProblemBody.model_validate_json(found.content, strict=True)
    assert ("retry-after" in found.headers) == (status == 503)
    assert (str(ERRORS[how]) == problem.detail) == (how not in ("store", "bug"))
    line = service.log()[-1]
    assert (line["status"], line["request_id"]) == (status, problem.request_id)
    if status >= 500:
        assert line["error"].rpartition(".")[2] == type(ERRORS[how]).__name__
        assert line["where"][-1].endswith(" fail")
    assert "sesame" not in found.text + service.lines.getvalue() + service.metrics.render()[0].decode()


def test_all_answers_are_in_the_openapi_document(service: Service) -> None:
    document = service.get("/openapi.json").json()
    answers = document["paths"]["/v1/users/{user_id}/say"]["post"]["responses"]
    assert set(answers) == {"200", *map(str, problems.ANYWHERE)}
    (media, content), *others = answers["422"]["content"].items()
    assert (media, content["schema"], others) == ("application/problem+json", {"$ref": "#/components/schemas/ProblemBody"}, [])
    assert {"ProblemBody", "Fault"} <= set(document["components"]["schemas"])


def test_neither_log_nor_metrics_hold_texts_or_ids(caplog: pytest.LogCaptureFixture) -> None:
    service = Service()
    planted = ["user-4711-nobody", "my secret taste", "prompt-8812", "Bearer palate_8812"]
    with caplog.at_level(logging.DEBUG):
        for body in (b'{"text": "my secret taste"}', b'{"text": 5, "prompt-8812": "my secret taste"}', b"my secret taste"):
            for id in ("prompt-8812", 'a"}\n{"event": "forged'):
                service.post(
                    "/v1/users/user-4711-nobody/say?q=prompt-8812",
                    content=body,
                    headers={"content-type": "application/json", "authorization": "Bearer palate_8812", "x-request-id": id[:11]},
                )
        service.get("/nothing/user-4711-nobody")
    ours = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpx"))
    seen = service.lines.getvalue() + service.metrics.render()[0].decode() + ours
    asked_id = "prompt-8812"
    assert seen.count(asked_id) == 3  # as the request id that the caller chose
    for secret in (planted[0], planted[1], planted[3]):
        assert secret not in seen
    log = service.log()
    assert len(log) == 7
    users = {line["user"] for line in log if "user" in line}
    assert len(users) == 1
    assert re.fullmatch("[0-9a-f]{16}", users.pop())
    assert log[-1]["route"] == "none"
    assert all(re.fullmatch(r"[0-9a-f]{32}|prompt-8812", line["request_id"]) for line in log)


def test_hashes_of_users_are_by_tenant_and_key() -> None:
    one, other = Log(io.StringIO(), key=b"a" * 32), Log(io.StringIO(), key=b"b" * 32)
    assert one.name("t", "ada") == one.name("t", "ada")
    assert len({one.name("t", "ada"), one.name("u", "ada"), one.name("t", "bob"), other.name("t", "ada")}) == 4
    assert Log(io.StringIO()).name("t", "ada") != Log(io.StringIO()).name("t", "ada")


def test_metrics_count_what_happened() -> None:
    service = Service()
    for _ in range(3):
        say(service, b'{"text": "a"}')
    service.request("BREW", "/health")
    service.get("/fail/bug")
    service.metrics.watch("encoder", lambda: 7)
    kept = service.metrics.registry.get_sample_value
    assert kept("palate_requests_total", {"method": "POST", "route": "/v1/users/{user_id}/say", "status": "200"}) == 3
    assert kept("palate_requests_total", {"method": "OTHER", "route": "/health", "status": "405"}) == 1
    assert kept("palate_request_seconds_count", {"route": "/v1/users/{user_id}/say"}) == 3
    assert kept("palate_failures_total", {"kind": "builtins.RuntimeError"}) == 1
    assert kept("palate_queue_waiting", {"queue": "encoder"}) == 7
    assert kept("palate_requests_in_progress") == 0
    assert (
        Metrics().registry.get_sample_value("palate_failures_total", {"kind": "builtins.RuntimeError"}) is None
    )  # each service its own


def test_lines_of_other_loggers_hold_no_words_of_errors() -> None:
    try:
        raise ValueError("sesame")
    except ValueError as error:
        record = logging.LogRecord("uvicorn.error", 40, __file__, 1, "Exception in %s", ("sesame",), (type(error), error, None))
    line = JsonLine().format(record)
    assert "sesame" not in line
    assert json.loads(line)["error"] == "builtins.ValueError"


def test_what_asyncio_and_the_database_say_is_a_line_without_words_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    """Their loggers would print a task's error, with what it quotes, to standard error as it is."""

    async def lost() -> None:
        raise ValueError("sesame")

    async def nobody_waits() -> None:
        task = asyncio.create_task(lost())
        await asyncio.sleep(0)
        del task
        gc.collect()

    kept = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate) for name in OTHERS}
    try:
        logging.config.dictConfig(uvicorn_logging())
        asyncio.run(nobody_waits())
        logging.getLogger("sqlalchemy.pool").error("Exception during reset or similar: %s", "sesame")
    finally:
        for name, (handlers, propagate) in kept.items():
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate
    said = capsys.readouterr().err
    assert "sesame" not in said
    task, pool = map(json.loads, said.splitlines())
    assert (task["event"], task["error"]) == ("Task exception was never retrieved", "builtins.ValueError")
    assert (pool["event"], pool["logger"]) == ("Exception during reset or similar", "sqlalchemy.pool")
