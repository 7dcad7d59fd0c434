"""The client against a whole service on 127.0.0.1, and against a network that fails in every way that a script can say."""

import asyncio
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import palate
from palate import calling, client
from palate.client import AsyncClient, Client, DeniedError, Patience, ServiceError
from palate.data.pairs import Message
from palate.errors import DataError, MismatchError, UnknownUserError
from palate.living.consent import ConsentError
from palate.living.events import Choice
from palate.scoring import Scorer

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

PROMPT = "How do I start?"
SHORT, LONG = (
    "Just start.",
    "First, one might consider writing a plan; perhaps with four steps, each of them explained at length.",
)
CHOICES = [{"kind": "choice", "prompt": f"{PROMPT} {i}", "chosen": LONG, "rejected": SHORT} for i in range(6)]


@pytest.fixture(scope="module")
def small(root: Path) -> Iterator[Any]:
    """benchmarks.fuzz_server, which has a small service."""
    sys.path.insert(0, str(root))
    try:
        from benchmarks import fuzz_server

        yield fuzz_server
    finally:
        sys.path.remove(str(root))


@pytest.fixture(scope="module")
def lane(small: Any) -> Any:
    return small.small_lane()


@pytest.fixture(scope="module")
def service(small: Any, lane: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with small.served(lane, tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def asked(service: Any) -> Iterator[Client]:
    with Client(service.url, service.key) as out:
        yield out


# -- the whole way


def test_from_consent_to_deletion(asked: Client, lane: Any) -> None:
    """Rewards are those of `adapt` on the same choices, computed beside the service."""
    assert asked.consent("Änne b.", "personalise", "2026-01").version > 0
    crowd = asked.rank("Änne b.", PROMPT, [SHORT, LONG])
    assert crowd.personal is False
    kept = asked.feedback("Änne b.", *CHOICES)
    assert len(set(kept.event_ids)) == 6
    ranking = asked.rank("Änne b.", PROMPT, [SHORT, LONG], top_n=1)
    assert (ranking.personal, ranking.results[0].index, len(ranking.results)) == (True, 1, 1)
    scores = asked.score("Änne b.", PROMPT, [SHORT, LONG, "Another."])
    encoder, model = lane.scorer.encoder, lane.scorer.model
    said = palate.PairSet.from_choices([palate.Choice("Änne b.", c["prompt"], c["chosen"], c["rejected"]) for c in CHOICES])
    profile = palate.adapt(model, encoder.embed(said))["Änne b."]
    expected = Scorer(encoder, model).score(PROMPT, [SHORT, LONG, "Another."], profile)
    assert scores.rewards == pytest.approx(expected.tolist(), abs=1e-4)
    assert asked.score("Änne b.", (Message("user", PROMPT),), [SHORT]).rewards[0] == pytest.approx(
        float(lane.scorer.score((Message("user", PROMPT),), [SHORT], profile)[0]), abs=1e-4
    )
    found = asked.question("Änne b.", [(PROMPT, [SHORT, LONG]), ("Lunch?", ["Soup.", "A sandwich, perhaps.", "Toast."])], n=2)
    assert 1 <= len(found.questions) <= 2
    assert all(question.first != question.second for question in found.questions)
    assert asked.explain("Änne b.")
    before = asked.score("Änne b.", PROMPT, [LONG]).rewards
    assert asked.undo("Änne b.", kept.event_ids[0]).version > kept.version
    assert asked.score("Änne b.", PROMPT, [LONG]).rewards != before
    group = asked.rank_household(["Änne b.", "ada"], PROMPT, [SHORT, LONG], rule="worst-off")
    assert sorted(result["index"] for result in group.results) == [0, 1]
    everything = str(asked.export("Änne b."))
    assert LONG in everything
    assert "Änne b." in [line.user_id for line in asked.every_user(page=1)]
    assert asked.user("Änne b.")["n_events"] == 7
    assert asked.delete("Änne b.").events == 7
    with pytest.raises(UnknownUserError):
        asked.export("Änne b.")
    assert asked.models()["data"][0]["id"] == "small"
    assert asked.ready()["status"] == "ready"


def test_the_awaited_client_says_the_same(service: Any, asked: Client) -> None:
    async def answers() -> list[Any]:
        async with AsyncClient(service.url, service.key) as palate_:
            scored = await asyncio.gather(*(palate_.score("ada", PROMPT, [SHORT, LONG]) for _ in range(5)))
            lines = [line async for line in palate_.every_user(page=1)]
            with pytest.raises(UnknownUserError):
                await palate_.export("nobody")
            return [*scored, lines, await palate_.rank("ada", PROMPT, [SHORT, LONG])]

    *scored, lines, ranking = asyncio.run(answers())
    assert {answer.rewards for answer in scored} == {asked.score("ada", PROMPT, [SHORT, LONG]).rewards}
    assert (lines, ranking) == (list(asked.every_user()), asked.rank("ada", PROMPT, [SHORT, LONG]))


def test_refusals_are_the_errors_of_the_library(service: Any, asked: Client) -> None:
    with pytest.raises(ConsentError, match="consent"):
        asked.feedback("stranger", CHOICES[0])
    asked.consent("withdrawn", "personalise", "2026-01", granted=False)
    with pytest.raises(ConsentError):
        asked.feedback("withdrawn", CHOICES[0])
    with pytest.raises(UnknownUserError, match="no such user"):
        asked.explain("nobody")
    with pytest.raises(DataError, match="kind"):
        asked.feedback("ada", {"kind": "shrug"})
    with pytest.raises(DataError, match="candidates"):
        asked.rank("ada", PROMPT, [])
    with (
        Client(service.url) as nobody,
        pytest.raises(DeniedError, match=r"answered 401: no key; .* \(request [0-9a-f]{32}\)") as no,
    ):
        nobody.rank("ada", PROMPT, [SHORT])
    assert (no.value.status, no.value.code) == (401, "unauthorized")
    assert service.key not in repr(asked) + str(no.value)


def test_feedback_is_kept_once_however_often_its_answer_is_lost(service: Any, asked: Client) -> None:
    """Each answer of the service is thrown away twice after the service has done what it was asked."""
    real, lost = httpx.HTTPTransport(), []

    def lossy(request: httpx.Request) -> httpx.Response:
        answer = real.handle_request(request)
        answer.read()
        if lost.count(request.method) < 2:
            lost.append(request.method)
            raise httpx.ReadError("lost")
        lost.clear()
        return answer

    asked.consent("bea", "personalise", "2026-01")
    with Client(service.url, service.key, transport=httpx.MockTransport(lossy)) as unlucky:
        kept = [unlucky.feedback("bea", choice) for choice in CHOICES]
    real.close()
    log = asked.export("bea")
    assert len({one.event_ids for one in kept}) == 6
    assert asked.user("bea")["n_events"] == 6
    assert all(str(log).count(one.event_ids[0]) >= 1 for one in kept)
    assert asked.feedback("bea", CHOICES[0], idempotency_key="k") == asked.feedback("bea", CHOICES[0], idempotency_key="k")
    with pytest.raises(MismatchError, match="key"):
        asked.feedback("bea", CHOICES[1], idempotency_key="k")


# -- a network that fails


Script = list[int | tuple[int, dict[str, str]] | Exception]


class Network:
    """Answers in the order of a script, and remembers the requests and the pauses between them."""

    def __init__(self, script: Script, monkeypatch: pytest.MonkeyPatch):
        self.script, self.requests, self.pauses, self.now = list(script), list[httpx.Request](), list[float](), 0.0
        monkeypatch.setattr(time, "sleep", self._sleep)
        monkeypatch.setattr(client.time, "monotonic", lambda: self.now)
        self.client = Client("http://127.0.0.1:9", transport=httpx.MockTransport(self._answer), patience=Patience(retries=3))

    def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        status, headers = step if isinstance(step, tuple) else (step, {})
        good = {"user_id": "ada", "version": 1, "event_ids": ["e"], "events": 1, "scrubbed": True, "rewards": [1.5], "model": "m"}
        problem = {"detail": "busy now", "code": "busy", "request_id": "r"}
        return httpx.Response(status, json=good | {"personal": True, "new": 1} if status < 300 else problem, headers=headers)


@pytest.mark.parametrize(
    ("script", "requests"),
    [
        ([200], 1),
        ([503, 429, 504, 200], 4),
        ([httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("cut"), 200], 4),
        ([408, 502, 200], 3),
    ],
)
def test_what_passes_is_tried_again(script: Script, requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(script, monkeypatch)
    assert network.client.feedback("ada", CHOICES[0]) == calling.Kept("ada", 1, ("e",))
    assert len(network.requests) == requests
    assert len({request.headers["idempotency-key"] for request in network.requests}) == 1
    assert len({request.content for request in network.requests}) == 1
    for i, pause in enumerate(network.pauses):
        assert 0.5 * 0.25 * 2**i <= pause <= 0.25 * 2**i
    again = Network([200], monkeypatch)
    again.client.feedback("ada", CHOICES[0])
    assert again.requests[0].headers["idempotency-key"] != network.requests[0].headers["idempotency-key"]


def test_what_does_not_pass_and_what_passes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (400, 401, 403, 404, 409, 413, 422, 500, 501):
        network = Network([status, 200], monkeypatch)
        with pytest.raises((ServiceError, DataError, MismatchError)):
            network.client.score("ada", PROMPT, [SHORT])
        assert len(network.requests) == 1, status
    network = Network([503] * 9, monkeypatch)
    with pytest.raises(ServiceError, match=r"answered 503: busy now \(request r\)") as late:
        network.client.score("ada", PROMPT, [SHORT])
    assert (len(network.requests), late.value.status, late.value.code) == (4, 503, "busy")
    network = Network([httpx.ConnectError("refused")] * 9, monkeypatch)
    with pytest.raises(ServiceError, match="no answer from the service: ConnectError refused") as away:
        network.client.score("ada", PROMPT, [SHORT])
    assert away.value.status is None


def test_the_service_says_how_long_to_wait_and_the_caller_how_long_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network([(429, {"retry-after": "7"}), 200], monkeypatch)
    assert network.client.score("ada", PROMPT, [SHORT]).rewards == (1.5,)
    assert network.pauses == [7.0]
    network = Network([(429, {"retry-after": "61"}), 200], monkeypatch)
    with pytest.raises(ServiceError, match="429"):
        network.client.score("ada", PROMPT, [SHORT])
    assert (network.pauses, len(network.requests)) == ([], 1)


def test_a_deletion_is_repeated_only_where_it_was_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network([503, httpx.ConnectError("refused"), 429, 200], monkeypatch)
    assert network.client.delete("ada") == calling.Removed("ada", 1, True)
    for step in (httpx.ReadTimeout("slow"), 504, 502):
        network = Network([step, 200], monkeypatch)
        with pytest.raises(ServiceError):
            network.client.delete("ada")
        assert len(network.requests) == 1


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"[1]", b'{"user_id": "ada"}', b"[" * 100_000, b"\xff"], ids=lambda content: repr(content[:9])
)
def test_answers_of_something_else(content: bytes) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=content))
    with (
        Client("http://127.0.0.1:9", transport=transport) as other,
        pytest.raises(ServiceError, match="is there a service of Palate, of this version, at this address"),
    ):
        other.score("ada", PROMPT, [SHORT])
    proxy = httpx.MockTransport(lambda request: httpx.Response(418, content=content))
    with Client("http://127.0.0.1:9", transport=proxy) as other, pytest.raises(ServiceError, match="answered 418: the answer is"):
        other.score("ada", PROMPT, [SHORT])


# -- what is never sent


@pytest.mark.parametrize("user_id", ["", ".", "..", "a/b", "a\x00", "a\n", "\x85", "x" * 257, "\ud800", 5])
def test_ids_that_no_route_can_carry(user_id: Any) -> None:
    for build in (calling.export, calling.delete):
        with pytest.raises(DataError, match="the id"):
            build(user_id)


def test_texts_and_addresses_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network([], monkeypatch)
    for call in (calling.score("a", "\ud800", [SHORT]), calling.feedback("a", {"kind": "choice", "weight": float("nan")})):
        with pytest.raises(DataError, match="cannot be written as JSON"):
            network.client.send(call)
    with pytest.raises(DataError, match="0 events"):
        calling.feedback("a")
    for url in ("", "127.0.0.1:8000", "ftp://host", "http://", "http://me:pw@host", "http://host/?key=1"):
        with pytest.raises(DataError, match="no address of a service"):
            Client(url)
    with pytest.raises(DataError, match=r"the key would go to host.example without TLS"):
        Client("http://host.example", "palate_x")
    monkeypatch.setenv("PALATE_KEY", "palate_x")
    with pytest.raises(DataError, match="without TLS"):
        AsyncClient("http://host.example")
    for url, plain in (("https://host.example", False), ("http://host.example", True), ("http://[::1]:8000", False)):
        Client(url, plain_http=plain).close()
    with pytest.raises(DataError, match="holds characters"):
        Client("https://host.example", "palate_x\r\nX-Evil: 1")
    with pytest.raises(DataError, match="expected positive seconds"):
        Patience(timeout=0)


def test_a_key_for_this_machine_goes_through_no_proxy(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # which would never answer, and read the key
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        with Client(service.url, service.key, patience=Patience(timeout=5, retries=0)) as client:
            assert client.ready()["status"] == "ready"

        async def awaited() -> Any:
            async with AsyncClient(service.url, service.key, patience=Patience(timeout=5, retries=0)) as client:
                return await client.ready()

        assert asyncio.run(awaited())["status"] == "ready"


def test_events_of_the_library_are_sent_as_their_json() -> None:
    event = Choice(prompt=PROMPT, chosen=LONG, rejected=SHORT)
    sent = calling.feedback("ada", event).body
    assert sent is not None
    assert sent["events"][0].items() >= {"kind": "choice", "prompt": PROMPT, "chosen": LONG, "rejected": SHORT}.items()
    assert "event_id" not in sent["events"][0]


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert methods(Client) == methods(AsyncClient)
    builders = {
        name for name, value in vars(calling).items() if callable(value) and getattr(value, "__module__", "") == calling.__name__
    }
    assert {name for name in builders if name.islower() and not name.startswith("_")} - {"check_name"} <= methods(Client)
    for name in ("rank", "feedback"):
        assert getattr(Client, name).__doc__ == getattr(AsyncClient, name).__doc__ == getattr(calling, name).__doc__
    with pytest.raises(TypeError, match="called on the class"):
        Client.rank("ada", PROMPT, [SHORT])


def test_a_missing_httpx_is_said_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(palate.MissingExtraError, match=r"pip install 'palate\[client\]'"):
        Client("http://127.0.0.1:8000")
