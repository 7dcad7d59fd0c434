"""Encoders that ask a server: a real one on this machine, which answers well, late, wrongly or with another model, as told."""

import base64
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import palate
from palate.data.pairs import Message, Text
from palate.encoders import endpoints, restore_encoder
from palate.encoders.answers import rows_of
from palate.encoders.asking import EndpointError, Limits, Server
from palate.encoders.cache import Cache
from palate.encoders.endpoints import OpenAIEmbeddings, VLLMPooling
from palate.errors import DataError, MismatchError, MissingExtraError

pytest.importorskip("openai")
pytest.importorskip("tenacity")

LOCAL = pytest.mark.allow_hosts(["127.0.0.1"])
WIDTH = 24
TEXTS = [Text(f"question {i // 3}?", f"answer {i}, and more of it: {'so ' * (i % 4)}") for i in range(23)]
Answer = dict[str, Any]


def vector(text: str, seed: int = 0, width: int = WIDTH) -> NDArray[np.float32]:
    """What the server's model number `seed` makes of a text: numbers from its hash, of unit length."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "little"))
    row = rng.standard_normal(width)
    return (row / np.linalg.norm(row)).astype(np.float32)


class Fake:
    """A server of embeddings with one fault at a time.

    Attributes:
        seen: every request: path, headers and body.
        status: (status, headers, body) for the requests to come, one after the other, before it answers well again.
        choose: the same by what is asked, None for a good answer.
        change: what is done to a good answer before it is sent.
        raw: what is done to its bytes.
        seed: which model answers.
        busy, busiest: requests at this moment, and the most there ever were.
        connections: opened so far.
    """

    def __init__(self, keeps: bool = False) -> None:
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.connections = 0
        self.began: list[float] = []
        self.status: list[tuple[int, dict[str, str], str]] = []
        self.choose: Callable[[dict[str, Any]], tuple[int, dict[str, str], str] | None] = lambda body: None
        self.change: Callable[[Answer], Answer] = lambda answer: answer
        self.raw: Callable[[bytes], bytes] = lambda body: body
        self.seed, self.delay, self.busy, self.busiest = 0, 0.0, 0, 0
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1" if keeps else "HTTP/1.0"  # whether a connection is for more than one request

            def setup(self) -> None:
                super().setup()
                with fake.lock:
                    fake.connections += 1

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                    fake.began.append(time.monotonic())
                    fake.busy += 1
                    fake.busiest = max(fake.busiest, fake.busy)
                    planned = fake.status.pop(0) if fake.status else fake.choose(body)
                time.sleep(fake.delay)
                if planned is None:
                    status, headers, text = 200, {}, fake.raw(json.dumps(fake.change(fake.good(self.path, body))).encode())
                else:
                    status, headers, text = planned[0], planned[1], planned[2].encode()
                with fake.lock:
                    fake.busy -= 1
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def good(self, path: str, body: dict[str, Any]) -> Answer:
        texts = ["|".join(f"{m['role']}:{m['content']}" for m in body["messages"])] if "messages" in body else body["input"]
        rows = [vector(text, self.seed, body.get("dimensions", WIDTH)) for text in texts]
        if path == "/pooling":
            if body.get("task") == "classify":
                rows = [row[:3] * (1 if body.get("use_activation") is False else 0.5) for row in rows]
            data: list[Any] = [{"index": i, "object": "pooling", "data": row.tolist()} for i, row in enumerate(rows)]
        else:
            assert path == "/v1/embeddings"
            packed = body["encoding_format"] == "base64"
            numbers = [base64.b64encode(row.astype("<f4").tobytes()).decode() if packed else row.tolist() for row in rows]
            data = [{"index": i, "object": "embedding", "embedding": row} for i, row in enumerate(numbers)]
        return {"object": "list", "model": f"served-{body['model']}", "data": data, "usage": {"total_tokens": 1}}


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[Fake]:
    server = Fake(*getattr(request, "param", ()))
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    return "sk-very-secret"


def embeddings(fake: Fake, **options: Any) -> OpenAIEmbeddings:
    limits = options.pop("limits", Limits(batch=5, concurrent=2, retries=2, timeout=5.0, total=20.0))
    return OpenAIEmbeddings(f"{fake.url}/v1", "tiny", limits=limits, **options)


def table(encoder: palate.Encoder, texts: list[Text] = TEXTS) -> torch.Tensor:
    return encoder.encode(texts).rows(torch.arange(len(texts)))


def expected(texts: list[Text] = TEXTS, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.stack([vector(f"{text.prompt_text}\n{text.response}", seed) for text in texts]))


# -- what is asked, and what comes back


@LOCAL
def test_every_text_gets_its_own_vector_once(fake: Fake, secret: str) -> None:
    encoder = embeddings(fake)
    assert encoder.width == WIDTH
    assert encoder.served == "served-tiny"
    assert len(fake.seen) == 1  # the probe
    assert torch.equal(table(encoder, TEXTS + TEXTS[:4]), expected(TEXTS + TEXTS[:4]))
    assert encoder.encoded == len(TEXTS)
    assert [len(body["input"]) for _, _, body in fake.seen[1:]].count(5) == 4  # 23 texts in requests of 5
    path, headers, body = fake.seen[0]
    assert (path, headers["authorization"], body["model"]) == ("/v1/embeddings", f"Bearer {secret}", "tiny")


@LOCAL
def test_base64_and_numbers_are_the_same_features(fake: Fake) -> None:
    plain, packed = embeddings(fake), embeddings(fake, base64=True)
    assert torch.equal(table(plain), table(packed))
    assert plain.fingerprint == packed.fingerprint
    assert fake.seen[-1][2]["encoding_format"] == "base64"


@LOCAL
def test_fewer_dimensions_and_the_response_alone_are_said_to_the_server_and_in_the_state(fake: Fake) -> None:
    whole, few, alone = embeddings(fake), embeddings(fake, dimensions=8), embeddings(fake, text="response")
    assert (few.width, fake.seen[1][2]["dimensions"]) == (8, 8)
    assert torch.equal(table(alone)[3], torch.from_numpy(vector(TEXTS[3].response)))
    assert len({encoder.fingerprint for encoder in (whole, few, alone)}) == 3
    fake.change = lambda answer: {**answer, "data": [{**row, "embedding": row["embedding"] * 2} for row in answer["data"]]}
    with pytest.raises(DataError, match="gave rows of 16 numbers; expected 8, as it was asked for"):
        embeddings(fake, dimensions=8)


@LOCAL
def test_rows_in_another_order_are_put_in_their_places(fake: Fake) -> None:
    fake.change = lambda answer: {**answer, "data": answer["data"][::-1]}
    assert torch.equal(table(embeddings(fake)), expected())


@LOCAL
def test_pooling_sends_the_conversation_and_asks_for_raw_rewards(fake: Fake) -> None:
    encoder = VLLMPooling(f"{fake.url}/v1/", "rm", task="classify", limits=Limits(concurrent=3))
    turns = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Tea?"))
    texts = [Text(turns, "Yes."), Text("Tea?", "No.")]
    rows = table(encoder, texts)
    assert encoder.width == 3
    said = ["user:Hi|assistant:Hello|user:Tea?|assistant:Yes.", "user:Tea?|assistant:No."]
    assert torch.equal(rows, torch.from_numpy(np.stack([vector(text)[:3] for text in said])))
    path, _, body = fake.seen[-1]
    assert path == "/pooling"
    assert {key: body[key] for key in ("task", "use_activation", "add_generation_prompt")} == {
        "task": "classify",
        "use_activation": False,
        "add_generation_prompt": False,
    }
    plain = VLLMPooling(fake.url, "rm", text="prompt and response", activation=None)
    assert torch.equal(table(plain), expected())
    assert "use_activation" not in fake.seen[-1][2]
    tokens = fake.change
    fake.change = lambda answer: {**answer, "data": [{**row, "data": [row["data"]]} for row in answer["data"]]}
    with pytest.raises(DataError, match=r"the data \[\[.*; expected a list of numbers, one row for a text"):
        table(plain)
    fake.change = tokens


@LOCAL
def test_a_model_is_fitted_over_a_server_and_scores_with_it(fake: Fake) -> None:
    pairs = palate.synthetic(n_users=12, n_choices=6, seed=0).pairs
    encoder = embeddings(fake, limits=Limits(batch=32))
    model = palate.fit(encoder.embed(pairs), palate.BradleyTerry())
    ranked = palate.Scorer(encoder, model).rank("Tea?", ["Yes, please.", "No."])
    assert len(ranked) == 2


# -- what passes


@LOCAL
def test_a_server_that_fails_twice_and_then_answers(fake: Fake) -> None:
    encoder = embeddings(fake)
    fake.status = [(500, {}, "oh"), (503, {}, "no")]
    assert torch.equal(table(encoder, TEXTS[:3]), expected(TEXTS[:3]))
    assert len(fake.seen) == 1 + 3
    assert 1.4 < fake.began[-1] - fake.began[1] < 4  # after half a second and one


@LOCAL
def test_the_server_says_how_long_to_wait(fake: Fake) -> None:
    encoder = embeddings(fake)
    fake.status = [(429, {"Retry-After": "2"}, "slow down")]
    assert torch.equal(table(encoder, TEXTS[:3]), expected(TEXTS[:3]))
    assert 1.9 < fake.began[2] - fake.began[1] < 4


@LOCAL
def test_a_wait_beyond_the_limit_is_not_begun(fake: Fake) -> None:
    encoder = embeddings(fake)
    began = time.monotonic()
    fake.status = [(429, {"Retry-After": "3600"}, "come back tomorrow")] * 9
    with pytest.raises(EndpointError, match=r"429: come back tomorrow; tried once in 0 s; it asks to wait 3600 s\. 0 of 3 texts"):
        table(encoder, TEXTS[:3])
    assert time.monotonic() - began < 2


@LOCAL
def test_a_date_to_wait_for_is_understood(fake: Fake) -> None:
    from email.utils import formatdate

    encoder = embeddings(fake)
    fake.status = [(429, {"Retry-After": formatdate(time.time() + 900, usegmt=True)}, "later")]
    with pytest.raises(EndpointError, match=r"asks to wait (899|900) s"):
        table(encoder, TEXTS[:3])


@LOCAL
def test_no_more_requests_in_a_second_than_allowed_nor_at_once(fake: Fake) -> None:
    encoder = embeddings(fake, limits=Limits(batch=1, concurrent=3, per_second=20.0))
    fake.delay = 0.2
    table(encoder, TEXTS[:9])
    gaps = np.diff(fake.began[1:10])
    assert len(gaps) == 8
    assert fake.began[9] - fake.began[1] > 8 / 20 - 0.02
    assert 1 < fake.busiest <= 3


# -- what does not


@LOCAL
def test_errors_that_stay_say_how_far_it_got_and_a_cache_keeps_that(fake: Fake, tmp_path: Path) -> None:
    encoder = embeddings(fake, limits=Limits(batch=5, concurrent=1, retries=1, total=20.0))
    encoder.cache = Cache(tmp_path)
    answered = 0

    def twice(answer: Answer) -> Answer:
        nonlocal answered
        answered += 1
        if answered == 2:
            fake.status = [(502, {}, "<html>bad gateway</html>")] * 2
        return answer

    fake.change = twice
    with pytest.raises(
        EndpointError, match=r"it answered 502: <html>bad gateway</html>; tried 2 times .* 10 of 23 texts are done"
    ):
        table(encoder)
    asked = len(fake.seen)
    torch.testing.assert_close(table(encoder), expected(), atol=1e-3, rtol=1e-3)
    assert encoder.encoded == 13
    assert sum(len(body["input"]) for _, _, body in fake.seen[asked:]) == 13
    table(encoder)
    assert encoder.encoded == 0


@LOCAL
@pytest.mark.parametrize("fake", [(True,)], indirect=True)
def test_connections_are_kept_until_another_key_or_timeout(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(f"{fake.url}/v1", "OPENAI_API_KEY", Limits(concurrent=1, timeout=5.0))
    body = {"model": "tiny", "input": ["a"], "encoding_format": "float"}
    for _ in range(3):
        list(server.ask("/embeddings", [body, body]))
    assert (len(fake.seen), fake.connections) == (6, 1)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    list(server.ask("/embeddings", [body]))
    server.limits = Limits(concurrent=1, timeout=6.0)
    list(server.ask("/embeddings", [body]))
    assert fake.connections == 3
    assert [headers["authorization"] for _, headers, _ in fake.seen[-3:]] == ["Bearer sk-very-secret", *["Bearer sk-another"] * 2]
    closed = server.client()
    del server
    assert closed.is_closed()


@LOCAL
def test_a_refusal_has_the_servers_words_and_never_the_key(fake: Fake, secret: str) -> None:
    encoder = embeddings(fake)
    fake.status = [(401, {}, json.dumps({"error": {"message": f"Incorrect API key provided: {secret}"}}))]
    with pytest.raises(EndpointError, match=r"refused the request with 401: .*Incorrect API key provided: \[key\]") as caught:
        table(encoder, TEXTS[:3])
    assert len(fake.seen) == 2  # not tried again
    for shown in (str(caught.value), repr(encoder), json.dumps(encoder.state()), encoder.spec, repr(caught.value.__dict__)):
        assert secret not in shown
    assert encoder.state()["where"]["key_env"] == "OPENAI_API_KEY"


@LOCAL
def test_a_server_that_is_slow_or_gone(fake: Fake) -> None:
    encoder = embeddings(fake, limits=Limits(retries=0, timeout=0.3))
    fake.delay = 1.0
    with pytest.raises(EndpointError, match=r"no answer within 0\.3 s; tried once"):
        table(encoder, TEXTS[:2])
    fake.delay = 0.0
    encoder.server.url = "http://127.0.0.1:9"
    with pytest.raises(EndpointError, match=r"no connection \(.*refused.*\); tried once"):
        table(encoder, TEXTS[:2])


@LOCAL
def test_one_failure_stops_the_requests_beside_it(fake: Fake) -> None:
    encoder = embeddings(fake, limits=Limits(batch=1, concurrent=2, retries=9, total=300.0))
    long = Text("", "a text that is too long")

    def choose(body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
        return (400, {}, "too long") if "too long" in body["input"][0] else (503, {"Retry-After": "60"}, "busy")

    began, fake.choose = time.monotonic(), choose
    with pytest.raises(EndpointError, match=r"refused the request with 400: too long\. 0 of 2 texts are done"):
        table(encoder, [TEXTS[0], long])
    assert time.monotonic() - began < 5


BROKEN: dict[str, tuple[Callable[[Answer], Answer], str]] = {
    "a row too few": (lambda a: {**a, "data": a["data"][:-1]}, r"gave 2 rows for 3 texts; expected one for each"),
    "an index twice": (lambda a: {**a, "data": [a["data"][0]] * 3}, r"the indexes \[0, 0, 0\]; expected each of 0 to 2 once"),
    "no index": (lambda a: {**a, "data": [{"embedding": r["embedding"]} for r in a["data"]]}, r"indexes \[None, None, None\]"),
    "another width": (
        lambda a: {**a, "data": [{**r, "embedding": r["embedding"][:7]} for r in a["data"]]},
        "gave rows of 7 numbers; expected 24, as before",
    ),
    "two widths": (
        lambda a: {**a, "data": [{**r, "embedding": r["embedding"][: 24 - r["index"]]} for r in a["data"]]},
        "rows of 22 and 23 and 24 numbers in one answer",
    ),
    "NaN": (
        lambda a: {**a, "data": [{**r, "embedding": [math.nan, *r["embedding"][1:]]} for r in a["data"]]},
        "answered with NaN; expected finite numbers",
    ),
    "too large": (
        lambda a: {**a, "data": [{**r, "embedding": [1e300, *r["embedding"][1:]]} for r in a["data"]]},
        "gave NaN or infinite numbers for text 0",
    ),
    "null": (
        lambda a: {**a, "data": [{**r, "embedding": [None, *r["embedding"][1:]]} for r in a["data"]]},
        r"gave text 0 the embedding \[null, .*; expected a list of numbers",
    ),
    "zeros": (lambda a: {**a, "data": [{**r, "embedding": [0.0] * 24} for r in a["data"]]}, "gave only zeros for text 0"),
    "no vector": (lambda a: {**a, "data": [{"index": r["index"]} for r in a["data"]]}, "gave text 0 the embedding null"),
    "bytes": (lambda a: {**a, "data": [{**r, "embedding": "AAAA"} for r in a["data"]]}, "text 0 as 3 bytes; expected float32"),
    "no base64": (lambda a: {**a, "data": [{**r, "embedding": "%"} for r in a["data"]]}, "which is no base64"),
    "something else": (lambda a: {"choices": []}, "which has no list 'data' of objects; is the address right"),
    "a model behind a router": (
        lambda a: {**a, "model": "served-other"},
        "answered as 'served-other' and before as 'served-tiny'",
    ),
}


@LOCAL
@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_that_is_wrong_is_an_error_and_no_vector(name: str, fake: Fake) -> None:
    encoder = embeddings(fake)
    fake.change, message = BROKEN[name]
    with pytest.raises((DataError, MismatchError), match=message):
        table(encoder, TEXTS[:3])
    fake.change = lambda answer: answer
    assert torch.equal(table(encoder, TEXTS[:3]), expected(TEXTS[:3]))  # and nothing of it stayed


@LOCAL
def test_half_a_body_is_an_error(fake: Fake) -> None:
    encoder = embeddings(fake)
    fake.raw = lambda body: body[: len(body) // 2]
    with pytest.raises(DataError, match=r"characters that are no JSON \(.*the body was cut off on its way"):
        table(encoder, TEXTS[:3])


def test_a_truncated_answer_at_every_length_is_never_taken_for_a_whole_one() -> None:
    whole = json.dumps({"data": [{"index": i, "embedding": [0.5, -i]} for i in range(3)], "model": "m"})
    rows, served = rows_of(whole, 3, "embedding", "it")
    np.testing.assert_array_equal(rows, [[0.5, 0], [0.5, -1], [0.5, -2]])
    assert served == "m"
    for length in range(len(whole)):
        with pytest.raises(DataError):
            rows_of(whole[:length], 3, "embedding", "it")


# -- one model, one fingerprint


@LOCAL
def test_another_model_behind_the_same_name_has_another_fingerprint(fake: Fake, tmp_path: Path) -> None:
    before, again = embeddings(fake), embeddings(fake)
    assert before.fingerprint == again.fingerprint
    before.cache = Cache(tmp_path)
    table(before)
    restored = OpenAIEmbeddings.restore(json.loads(json.dumps(before.state())))
    assert restored.state() == before.state()
    fake.seed = 1
    changed = embeddings(fake)
    assert changed.fingerprint != before.fingerprint
    changed.cache = Cache(tmp_path)
    torch.testing.assert_close(table(changed), expected(seed=1), atol=1e-3, rtol=1e-3)  # not what the cache has of the other
    with pytest.raises(MismatchError, match="gives other features than when this encoder was saved: another model stands behind"):
        table(restored)


@LOCAL
def test_a_restored_encoder_asks_nothing_until_it_must_and_then_gives_the_same(fake: Fake, tmp_path: Path) -> None:
    for encoder in (
        embeddings(fake, dimensions=9),
        embeddings(fake, text="response"),
        VLLMPooling(fake.url, "rm", task="classify", activation=True),
        VLLMPooling(fake.url, "rm", text="response", key_env="OTHER_KEY"),
    ):
        rows, asked = table(encoder), len(fake.seen)
        again = restore_encoder(json.loads(json.dumps(encoder.state())))
        assert isinstance(again, type(encoder))
        assert (again.fingerprint, again.width, again.spec) == (encoder.fingerprint, encoder.width, encoder.spec)
        assert len(fake.seen) == asked
        assert torch.equal(table(again), rows)
        assert len(fake.seen) > asked


@LOCAL
def test_a_spec_makes_the_same_encoder(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = (
        embeddings(fake),
        embeddings(fake, dimensions=9, text="response"),
        VLLMPooling(fake.url, "org/rm"),
        VLLMPooling(fake.url, "org/rm", task="classify", text="response", activation=None),
        VLLMPooling(fake.url, "org/rm", activation=True),
    )
    for encoder in encoders:
        again = palate.load_encoder(encoder.spec)
        assert (again.spec, again.fingerprint) == (encoder.spec, encoder.fingerprint)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{fake.url}/v1")
    assert OpenAIEmbeddings.from_spec("tiny", {}).fingerprint == embeddings(fake).fingerprint


def test_the_probe_tells_models_apart_and_bears_rounding() -> None:
    rng = np.random.default_rng(0)
    found = noisy = 0
    for _ in range(1000):
        rows = rng.standard_normal((3, 384)).astype(np.float32)
        away = rng.standard_normal((3, 384)).astype(np.float32)
        noisy += endpoints._sketch(rows) != endpoints._sketch(rows + 1e-6 * away)
        turned = 0.999 * rows + math.sqrt(1 - 0.999**2) * away
        found += endpoints._sketch(rows) != endpoints._sketch(turned)
    assert found >= 980
    assert noisy <= 3
    assert endpoints._sketch(rows) == endpoints._sketch(rows.copy())
    assert endpoints._sketch(rows) != endpoints._sketch(1.5 * rows)


# -- arguments


def test_addresses_and_options_that_make_no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, message in (
        ("ftp://host/v1", "url is 'ftp://host/v1'; expected"),
        ("localhost:8000", "url is 'localhost:8000'; expected"),
        ("https://me:hunter2@host/v1", "the url of host holds a user, a password or a query"),
        ("https://host/v1?api_key=hunter2", "the url of host holds a user, a password or a query"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            OpenAIEmbeddings(url, "m")
        assert "hunter2" not in str(caught.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    attempts: list[tuple[Callable[[], object], str]] = [
        (lambda: OpenAIEmbeddings(None, "m"), "the variable OPENAI_API_KEY is not set"),
        (lambda: OpenAIEmbeddings(None, ""), "the model has no name"),
        (lambda: OpenAIEmbeddings(None, "m", text="chat"), "text is 'chat'; expected 'prompt and response' or 'response'"),
        (lambda: OpenAIEmbeddings(None, "m", dimensions=0), "dimensions is 0"),
        (lambda: OpenAIEmbeddings.from_spec("m", {"dimensions": "x"}), "dimensions is 'x'; expected a whole number"),
        (lambda: OpenAIEmbeddings.from_spec("m", {"size": "3"}), "has the options size; expected some of url, dimensions, text"),
        (lambda: VLLMPooling("http://host", "m", text="all"), "text is 'all'; expected one of chat"),  # type: ignore[arg-type]
        (lambda: VLLMPooling.from_spec("m", {}), "'vllm:m' does not say where"),
        (lambda: VLLMPooling.from_spec("m", {"url": "http://h", "activation": "1"}), "activation is '1'"),
        (lambda: Limits(batch=0), "batch is 0; expected a positive number"),
        (lambda: Limits(per_second=0.0), r"per_second is 0\.0"),
        (lambda: Limits(retries=-1), "retries is -1"),
        (lambda: Server("http://", "KEY", Limits()), "url is 'http://'"),
    ]
    for attempt, message in attempts:
        with pytest.raises(DataError, match=message):
            attempt()


def test_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(MissingExtraError, match=r"need the packages openai and tenacity .* pip install 'palate\[endpoints\]'"):
        OpenAIEmbeddings("http://127.0.0.1:1/v1", "m")
