"""The service: what it answers is what the library computes, what it acknowledges is kept, and what cannot be is refused."""

import asyncio
import dataclasses
import http.client
import io
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

import palate
from letters import Letters, model_of
from palate import serve_cli
from palate.data.pairs import Choice, PairSet, Text
from palate.errors import DataError, StoreBusyError, StoreFullError
from palate.living.consent import Consent
from palate.living.events import parse_feedback
from palate.living.explain import HARD
from palate.living.floor import Floor
from palate.living.population import Population
from palate.living.reading import Level, Reading
from palate.server import deleting, parsing, running
from palate.server.access import KeyRing
from palate.server.app import create_app
from palate.server.batching import Batcher, OverloadedError, Rows
from palate.server.bodies import RankRequest
from palate.server.direct import Direct
from palate.server.keys import mint
from palate.server.lanes import Lane, Room, Shelf, keys_of
from palate.server.loading import lane_of as make_lane
from palate.server.observing import Log, Metrics
from palate.server.people import People
from palate.server.runtime import RefusedError, Runtime
from palate.server.shapes import GetRewardRequest
from palate.store import Write, open_store
from palate.store import records as store_records
from palate.store.database import ProfileStore

PROMPT = "How do I start?"
TEXTS = [
    f"Answer number {i}, in {words} words." for i, words in enumerate(("few", "some", "many", "plain", "long", "kind", "odd"))
]
ADA = ("default", "ada")


def lane_of(name: str = "m", seed: int = 0, *, level: bool = True, room: Room | None = None) -> Lane:
    scorer = palate.Scorer(Letters(), model_of(seed))
    reading = None
    if level:
        reading = Reading(level=Level.of(scorer.model, Letters().encode([Text(PROMPT, text) for text in TEXTS])))
    return Lane(name, scorer, Population.of(scorer.model), reading=reading, room=room or Room(max_wait=0.0))


def lane_of_sample(data: PairSet) -> Lane:
    scorer = palate.Scorer(Letters(), model_of())
    return make_lane("m", scorer, Population.of(scorer.model), sample=data, room=Room(max_wait=0.0))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "profiles.db")


@pytest.fixture
def client(url: str) -> Iterator[TestClient]:
    with open_store(url) as store, served(Runtime([lane_of()], store)) as client:
        yield client


def served(runtime: Runtime, **options: Any) -> TestClient:
    return TestClient(create_app(runtime, **options), base_url="http://127.0.0.1")


def agree(client: TestClient, user_id: str = "ada", granted: bool = True) -> None:
    record = {"purpose": "personalise", "text_version": "1", "granted": granted, "at": 1.7e9}
    assert client.put(f"/v1/users/{user_id}/consent", json=record).status_code == 200


def chosen(better: str, worse: str, **more: Any) -> dict[str, Any]:
    return {"kind": "choice", "prompt": PROMPT, "chosen": better, "rejected": worse} | more


def give(client: TestClient, *events: dict[str, Any], user_id: str = "ada", key: str | None = None) -> dict[str, Any]:
    headers = {} if key is None else {"Idempotency-Key": key}
    body = events[0] if len(events) == 1 else {"events": events}
    answer = client.post(f"/v1/users/{user_id}/feedback", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def rewards(client: TestClient, user_id: str = "ada", **more: Any) -> list[float]:
    answer = client.post(f"/v1/users/{user_id}/score", json={"prompt": PROMPT, "candidates": TEXTS} | more)
    assert answer.status_code == 200, answer.text
    found: list[float] = answer.json()["rewards"]
    return found


def oracle(choices: Sequence[tuple[str, str]], seed: int = 0) -> torch.Tensor:
    """The rewards of `TEXTS` for somebody who made these choices, as the library has them: adapt, then score."""
    scorer = palate.Scorer(Letters(), model_of(seed))
    if not choices:
        return scorer.score(PROMPT, TEXTS)
    pairs = PairSet.from_choices([Choice("ada", PROMPT, better, worse) for better, worse in choices])
    return scorer.score(PROMPT, TEXTS, palate.adapt(scorer.model, scorer.encoder.embed(pairs))["ada"])


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


# -- the same numbers as the library


def test_rewards_and_ranks_are_those_of_adapt_and_scorer_whatever_was_taken_back_meanwhile(client: TestClient) -> None:
    np.testing.assert_allclose(rewards(client), oracle([]), atol=1e-9)
    agree(client)
    give(client, chosen(TEXTS[0], TEXTS[1]))
    give(client, chosen(TEXTS[2], TEXTS[3], event_id="x"), chosen(TEXTS[4], TEXTS[0], event_id="y"))
    give(client, {"kind": "undo", "of": "x"})
    give(client, {"kind": "correct", "of": "y", "event": chosen(TEXTS[0], TEXTS[4])})
    expected = oracle([(TEXTS[0], TEXTS[1]), (TEXTS[0], TEXTS[4])])
    np.testing.assert_allclose(rewards(client), expected, atol=1e-6)
    body = {"prompt": PROMPT, "candidates": TEXTS, "top_n": 3, "return_candidates": True}
    ranked = client.post("/v1/users/ada/rank", json=body).json()
    order = expected.argsort(descending=True).tolist()[:3]
    assert [one["index"] for one in ranked["results"]] == order
    assert [one["candidate"] for one in ranked["results"]] == [TEXTS[i] for i in order]
    assert (ranked["personal"], ranked["model"], ranked["version"]) == (True, "m", 5)
    assert client.post("/v1/users/ben/rank", json=body).json()["personal"] is False


def test_other_stacks_get_the_same_numbers_in_their_shapes(client: TestClient) -> None:
    agree(client)
    give(client, chosen(TEXTS[0], TEXTS[1]))
    own = rewards(client)
    raw = {"use_activation": False, "model": "some/other-name", "user": "ada"}
    order = sorted(range(len(TEXTS)), key=lambda i: -own[i])
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        mixed = [TEXTS[0], *({"text": text} for text in TEXTS[1:])]
        found = client.post(path, json={"query": PROMPT, "documents": mixed, "top_n": 2} | raw).json()["results"]
        assert [one["index"] for one in found] == order[:2]
        assert [one["document"]["text"] for one in found] == [TEXTS[i] for i in order[:2]]
        assert found[0]["relevance_score"] == pytest.approx(own[order[0]])
    for first, second in (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"), ("text_1", "items")):
        found = client.post("/score", json={first: PROMPT, second: TEXTS} | raw).json()
        assert [one["score"] for one in found["data"]] == pytest.approx(own)
    several = client.post("/v1/score", json={"text_1": [PROMPT] * 2, "text_2": TEXTS[:2], "user_id": "ada"}).json()
    assert [one["score"] for one in several["data"]] == pytest.approx([1 / (1 + math.exp(-x)) for x in own[:2]])
    verl = client.post("/classify", json={"model": "m", "input": TEXTS[3], "prompt": PROMPT, "activation": False, "user": "ada"})
    assert verl.json()["data"][-1]["probs"][-1] == pytest.approx(own[3])
    pooled = client.post("/pooling", json={"input": TEXTS[3], "prompt": PROMPT}, headers={"X-Palate-User": "ada"})
    assert pooled.json()["data"][0]["data"] == pytest.approx([own[3]])
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": TEXTS[3], "refusal": None}]
    alone = palate.Scorer(Letters(), model_of()).score((palate.Message("user", PROMPT),), [TEXTS[3]])
    pooled = client.post("/pooling", json={"messages": turns})
    assert pooled.json()["data"][0]["data"] == pytest.approx(alone.tolist())
    assert client.post("/pooling", json={"messages": turns, "input": "x"}).status_code == 422
    assert client.post("/score", json={"text_1": ["a", "b"], "text_2": TEXTS}).status_code == 422
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["m"]


def test_openrlhf_samples_are_taken_apart(client: TestClient) -> None:
    agree(client)
    give(client, chosen(TEXTS[0], TEXTS[1]))
    own, crowd = rewards(client), rewards(client, "nobody")
    templated = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    body = {
        "query": [f"{PROMPT}{TEXTS[3]}</s>", f"{templated}{TEXTS[3]}<|im_end|>", f"{PROMPT}{TEXTS[3]}"],
        "prompts": [PROMPT, templated, PROMPT],
        "labels": ['{"user_id": "ada"}', json.dumps({"user_id": "ada", "prompt": PROMPT}), "42"],
    }
    found = client.post("/get_reward", json=body).json()
    assert found["rewards"] == pytest.approx([own[3], own[3], crowd[3]])
    assert found["extra_logs"] == {"personal": [1.0, 1.0, 0.0]}
    assert client.post("/get_reward", json=body | {"labels": ["x"]}).status_code == 422
    assert client.post("/get_reward", json=body | {"labels": ['{"user_id": 7}'] * 3}).status_code == 422
    cut = GetRewardRequest(query=["<s>Hi</s>"]).samples()
    assert cut == [(None, "", "Hi")]


def test_batches_and_households(client: TestClient) -> None:
    agree(client)
    asked = [{"user_id": who, "events": [chosen(TEXTS[0], TEXTS[1])]} for who in ("ada", "ben")]
    found = client.post("/v1/feedback", json={"requests": asked}).json()["results"]
    assert [one["status"] for one in found] == [200, 403]
    ranks = [{"user_id": who, "prompt": PROMPT, "candidates": TEXTS} for who in ("ada", "ben")]
    both = client.post("/v1/rank", json={"requests": ranks}).json()["results"]
    assert [one["personal"] for one in both] == [True, False]
    assert both[0]["results"] == client.post("/v1/users/ada/rank", json={"prompt": PROMPT, "candidates": TEXTS}).json()["results"]
    home = {"members": ["ada", "ben", "ada"], "rule": "worst-off", "prompt": PROMPT, "candidates": TEXTS}
    group = client.post("/v1/households/rank", json=home).json()
    assert (group["members"], group["known"]) == (["ada", "ben"], [True, False])
    least = [min(one["of_members"]) for one in group["results"]]
    assert least == sorted(least, reverse=True)
    assert [one["reward"] for one in group["results"]] == pytest.approx(least)


def test_what_a_batch_has_of_one_user_is_done_in_its_order(client: TestClient) -> None:
    agree(client)
    asked = [{"user_id": "ada", "events": [chosen(TEXTS[0], TEXTS[1], event_id=f"e{n}")]} for n in range(0, 12, 2)]
    undone = [{"user_id": "ada", "events": [{"kind": "undo", "of": f"e{n}"}]} for n in range(0, 12, 2)]
    mixed = [one for both in zip(asked, undone, strict=True) for one in both]
    found = client.post("/v1/feedback", json={"requests": [*mixed, {"user_id": "ben", "events": asked[0]["events"]}]}).json()
    assert [(one["user_id"], one["status"], one["version"]) for one in found["results"]] == [
        *(("ada", 200, version) for version in range(2, 14)),
        ("ben", 403, None),
    ]


def test_a_question_is_worth_asking_and_one_with_a_known_answer_is_not(client: TestClient) -> None:
    pool = [{"prompt": PROMPT, "candidates": TEXTS[:2]}, {"prompt": PROMPT, "candidates": TEXTS[:5]}]
    for rule in ("targeted", "information", "thompson", "d-optimal", "random"):
        found = client.post("/v1/users/ada/question", json={"pool": pool, "rule": rule, "n": 3}).json()
        pairs = {(one["entry"], one["first"], one["second"]) for one in found["questions"]}
        assert len(pairs) == 3
        assert all(first < second < len(pool[entry]["candidates"]) for entry, first, second in pairs)
        assert found["enough"] is False
    agree(client)
    give(client, *[chosen(TEXTS[0], TEXTS[1], weight=10.0)] * 50)
    assert client.post("/v1/users/ada/question", json={"pool": pool[:1]}).json()["enough"] is True


def test_the_document_says_that_a_query_holds_no_nul(client: TestClient) -> None:
    texts = [
        shape
        for path in client.get("/openapi.json").json()["paths"].values()
        for operation in path.values()
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "query"
        for shape in (parameter["schema"], *parameter["schema"].get("anyOf", ()))
        if shape.get("type") == "string"
    ]
    assert len(texts) >= 4
    assert all(re.search(shape["pattern"], "a\x00b") is None and re.search(shape["pattern"], "") for shape in texts)
    assert client.get("/v1/users?after=a%00b").json()["code"] == "bad_query"


def test_a_refusal_repeats_nothing_of_what_was_sent(client: TestClient) -> None:
    agree(client)
    for kind in ("sesame", ["sesame"], "sesame" * 50_000):
        for body in ({"kind": kind}, {"events": [{"kind": kind}]}):
            answer = client.post("/v1/users/ada/feedback", json=body)
            assert (answer.status_code, "kind" in answer.json()["errors"][0]["why"]) == (422, True)
            assert "'choice', 'pick'" in answer.text
            assert "sesame" not in answer.text


def test_nobody_is_asked_to_choose_between_a_text_and_itself(client: TestClient) -> None:
    pool = [{"prompt": PROMPT, "candidates": [TEXTS[0], TEXTS[0]]}, {"prompt": PROMPT, "candidates": [TEXTS[1], *TEXTS[:2]]}]
    for rule in ("targeted", "information", "thompson", "d-optimal", "random"):
        found = client.post("/v1/users/ada/question", json={"pool": pool, "rule": rule, "n": 9}).json()
        assert {(one["entry"], one["first"], one["second"]) for one in found["questions"]} <= {(1, 0, 1), (1, 1, 2)}
        assert found["questions"]
    assert client.post("/v1/users/ada/question", json={"pool": pool[:1]}).json()["questions"] == []


# -- what is acknowledged


def test_feedback_needs_a_consent_in_force(client: TestClient) -> None:
    event = chosen(TEXTS[0], TEXTS[1])
    refused = client.post("/v1/users/ada/feedback", json=event)
    assert (refused.status_code, refused.json()["code"]) == (403, "refused_consent")
    assert client.get("/v1/users/ada").status_code == 404
    agree(client)
    give(client, event)
    agree(client, granted=False)
    assert client.post("/v1/users/ada/feedback", json=event).status_code == 403
    assert client.get("/v1/users/ada").json()["n_events"] == 1


def test_who_repeats_a_request_after_consent_was_withdrawn_is_told_what_came_of_it(client: TestClient) -> None:
    agree(client)
    event = chosen(TEXTS[0], TEXTS[1])
    first = give(client, event, key="k")
    agree(client, granted=False)
    again = client.post("/v1/users/ada/feedback", json=event, headers={"Idempotency-Key": "k"})
    assert (again.status_code, again.json(), again.headers["Idempotent-Replayed"]) == (200, first, "true")
    other = client.post("/v1/users/ada/feedback", json=chosen(TEXTS[1], TEXTS[0]), headers={"Idempotency-Key": "k"})
    assert (other.status_code, other.json()["code"]) == (409, "refused_key")
    new = client.post("/v1/users/ada/feedback", json=event, headers={"Idempotency-Key": "new"})
    assert (new.status_code, new.json()["code"]) == (403, "refused_consent")
    found = client.get("/v1/users/ada").json()
    assert (found["n_events"], found["version"]) == (1, 3)


def test_a_request_under_a_key_is_done_once(client: TestClient) -> None:
    agree(client)
    event = chosen(TEXTS[0], TEXTS[1])
    first = give(client, event, chosen(TEXTS[2], TEXTS[3], event_id="own"), key="k")
    again = client.post(
        "/v1/users/ada/feedback",
        json={"events": [event, chosen(TEXTS[2], TEXTS[3], event_id="own")]},
        headers={"Idempotency-Key": "k"},
    )
    assert (again.json(), again.headers["Idempotent-Replayed"]) == (first, "true")
    assert client.get("/v1/users/ada").json()["n_events"] == 2
    other = client.post("/v1/users/ada/feedback", json=event, headers={"Idempotency-Key": "k"})
    assert (other.status_code, other.json()["code"]) == (409, "refused_key")
    taken = client.post("/v1/users/ada/feedback", json=chosen(TEXTS[0], TEXTS[2], event_id="own"))
    assert (taken.status_code, taken.json()["code"]) == (409, "refused_event")
    undo = {"kind": "undo", "of": "own"}
    done = give(client, undo, key="u")
    assert give(client, undo, key="u") == done  # although there is nothing left to undo
    assert client.post("/v1/users/ada/feedback", json=undo, headers={"Idempotency-Key": "v"}).status_code == 422
    agree(client, "ben")
    assert give(client, event, user_id="ben", key="k")["version"] == 2  # another user's key is another key


def test_what_cannot_be_learned_from_is_refused_and_leaves_nothing(client: TestClient, url: str) -> None:
    agree(client)
    for event in (
        {"kind": "undo", "of": "nothing"},
        chosen(TEXTS[0], TEXTS[0]),
        chosen(TEXTS[0], TEXTS[1], at=time.time() + 1e6),
        {"kind": "pick", "prompt": PROMPT, "shown": TEXTS[:2], "picked": 2},
    ):
        assert client.post("/v1/users/ada/feedback", json=event).status_code == 422
        both = {"events": [chosen(TEXTS[0], TEXTS[1]), event]}
        assert client.post("/v1/users/ada/feedback", json=both).status_code == 422
    assert client.get("/v1/users/ada").json()["n_events"] == 0


def test_a_thumb_needs_an_ordinary_response_to_be_read_against(url: str) -> None:
    thumb = {"kind": "thumb", "prompt": PROMPT, "response": TEXTS[0], "up": True}
    with open_store(url) as store, served(Runtime([lane_of(level=False)], store)) as client:
        agree(client)
        refused = client.post("/v1/users/ada/feedback", json=thumb)
        assert (refused.status_code, "--sample" in refused.json()["detail"]) == (422, True)
        give(client, chosen(TEXTS[0], TEXTS[1]))
        assert client.get("/v1/users/ada/explain").status_code == 422
    with open_store(url) as store, served(Runtime([lane_of()], store)) as client:
        give(client, thumb)


def test_two_servers_over_one_store_lose_nothing(url: str) -> None:
    """Each believes its cache until the store says that the other was faster."""

    async def work() -> None:
        with open_store(url) as store:
            lanes = [lane_of(), lane_of()]
            servers = [Runtime([lane], store, people=People([lane], store, fresh=1e9)) for lane in lanes]
            again = [0, 0]
            for place, server in enumerate(servers):
                server.on_conflict = lambda place=place: again.__setitem__(place, again[place] + 1)
            await servers[0].agreed(ADA, Consent(purpose="personalise", text_version="1", granted=True, at=1.7e9))
            told = [
                [parse_feedback(chosen(TEXTS[i], TEXTS[(i + step) % 7], event_id=f"{step}-{i}")) for i in range(7)]
                for step in (1, 2)
            ]

            async def all_of(server: Runtime, events: Sequence[Any]) -> None:
                for event in events:
                    await server.feedback(ADA, [event])

            await asyncio.gather(*(all_of(server, events) for server, events in zip(servers, told, strict=True)))
            assert sum(again) > 0
            choices = [(TEXTS[i], TEXTS[(i + step) % 7]) for step in (1, 2) for i in range(7)]
            stale = [(await server.scored(ADA, PROMPT, TEXTS))[1] for server in servers]
            assert min(float(np.abs(found - oracle(choices).numpy()).max()) for found in stale) < 1e-6
            for server in servers:
                server.people.fresh = 0.0
                person, found = await server.scored(ADA, PROMPT, TEXTS)
                np.testing.assert_allclose(found, oracle(choices), atol=1e-6)
                assert person.version == 15
                await server.close()

    run(work())


def test_whoever_gives_up_leaves_no_old_profile_behind(url: str) -> None:
    async def work() -> None:
        with open_store(url) as store:
            server = Runtime([lane_of()], store)
            await server.agreed(ADA, Consent(purpose="personalise", text_version="1", granted=True, at=1.7e9))
            agreed = store_records.Consent("personalise", "1", 1.7e9)
            await server.scored(ADA, PROMPT, TEXTS)
            task = asyncio.create_task(server.feedback(ADA, [parse_feedback(chosen(TEXTS[0], TEXTS[1]))]))
            while server.people.known(ADA) is not None and not len(server.committer):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wrap_future(
                server.committer.submit(Write("default", "ben", 0, consent=agreed))
            )  # behind it in the queue
            person, found = await server.scored(ADA, PROMPT, TEXTS)
            assert person.version == (1 if not len(store.events(*ADA)) else 2)
            np.testing.assert_allclose(found, oracle([(TEXTS[0], TEXTS[1])] if person.version == 2 else []), atol=1e-6)
            await server.close()

    run(work())


def test_a_store_that_is_always_ahead_is_said(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        with open_store(url) as store:
            server = Runtime([lane_of()], store)
            await server.agreed(ADA, Consent(purpose="personalise", text_version="1", granted=True, at=1.7e9))
            held = await server.people.held(ADA)

            async def old(*_: object, **__: object) -> Any:
                return held._replace(version=held.version + 5)

            monkeypatch.setattr(server.people, "held", old)
            with pytest.raises(StoreBusyError, match="8 times somebody else wrote first"):
                await server.feedback(ADA, [parse_feedback(chosen(TEXTS[0], TEXTS[1]))])
            await server.close()

    run(work())


# -- users


def test_users_are_listed_exported_and_forgotten(client: TestClient, url: str) -> None:
    names = [f"user {i:02d}" for i in range(7)]
    for name in names:
        agree(client, name)
    found, after = [], ""
    while after is not None:
        page = client.get("/v1/users", params={"limit": 3, "after": after}).json()
        found += [one["user_id"] for one in page["users"]]
        after = page["next"]
    assert found == names
    give(client, chosen(TEXTS[0], "A phrase that nobody else has."), user_id=names[0])
    assert "A phrase that nobody else has." in client.get(f"/v1/users/{names[0]}/export").text
    personal = rewards(client, names[0])
    assert personal != rewards(client, names[1])
    assert client.delete(f"/v1/users/{names[0]}").json() == {"user_id": names[0], "events": 1, "scrubbed": True}
    assert rewards(client, names[0]) == rewards(client, names[1])
    for method, path in (("GET", ""), ("GET", "/export"), ("DELETE", "")):
        assert client.request(method, f"/v1/users/{names[0]}{path}").status_code == 404
    assert not any(b"A phrase that nobody" in path.read_bytes() for path in Path(url).parent.iterdir())
    agree(client, names[0])
    assert client.get(f"/v1/users/{names[0]}").json()["n_events"] == 0


def test_somebody_deleted_elsewhere_is_not_remembered(url: str) -> None:
    async def work() -> None:
        with open_store(url) as store:
            server = Runtime([lane_of()], store)
            await server.agreed(ADA, Consent(purpose="personalise", text_version="1", granted=True, at=1.7e9))
            await server.feedback(ADA, [parse_feedback(chosen(TEXTS[0], TEXTS[1]))])
            store.delete(*ADA)
            server.people.fresh = 0.0
            person, found = await server.scored(ADA, PROMPT, TEXTS)
            np.testing.assert_allclose(found, oracle([]), atol=1e-9)
            assert (person.version, person.personal) == (0, False)
            with pytest.raises(RefusedError, match="no consent"):
                await server.feedback(ADA, [parse_feedback(chosen(TEXTS[0], TEXTS[1]))])
            await server.close()

    run(work())


def test_a_slow_disk_holds_up_the_loop_once_in_five_seconds_at_most(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now, disk, readers = [0.0], [0.001], []

    def read(tenant: str, user_id: str) -> None:
        now[0] += disk[0]
        readers.append(threading.current_thread() is threading.main_thread())

    async def work(people: People) -> None:
        for number, took in enumerate((0.001, 0.5, 0.5, 0.001)):
            disk[0] = took
            await people.person((ADA[0], f"user {number}"))
        now[0] += 5
        await people.person((ADA[0], "somebody"))

    with open_store(url) as store:
        monkeypatch.setattr(store, "read", read)
        people = People([lane_of()], store, clock=lambda: now[0])
        run(work(people))
        people.close()
    assert readers == [True, True, False, False, True]


def test_of_somebody_deleted_elsewhere_nothing_is_held_whoever_asks(url: str) -> None:
    async def work() -> None:
        with open_store(url) as store:
            server = Runtime([lane_of()], store)
            for user in ("ada", "ben"):
                await server.agreed((ADA[0], user), Consent(purpose="personalise", text_version="1", granted=True, at=1.7e9))
            await server.people.recall()
            await server.deleted((ADA[0], "ben"))  # by this process: no reason to forget the others
            await server.people.recall()
            assert len(server.people._persons) == len(server.people._helds) == 1
            store.delete(*ADA)
            await server.people.recall()
            assert len(server.people._persons) == len(server.people._helds) == 0
            await server.close()

    run(work())


def test_deletions_that_come_together_share_a_rewrite_of_the_files(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"marked-{number:02d}" for number in range(30)]
    going, may_end, scrub = threading.Event(), threading.Event(), ProfileStore.scrub

    def slow(store: ProfileStore) -> None:
        going.set()
        assert may_end.wait(10)
        scrub(store)

    async def work() -> None:
        with open_store(url) as store:
            server = Runtime([lane_of()], store)
            for name in (*names, "ben"):
                await server.agreed((ADA[0], name), Consent(purpose="personalise", text_version="1", granted=True, at=1.7e9))
                await server.feedback((ADA[0], name), [parse_feedback(chosen(TEXTS[0], f"A phrase of {name}."))])
            done = await asyncio.gather(*(server.deleted((ADA[0], name)) for name in names[:20]))
            assert [one[1:] for one in done] == [(1, True)] * 20
            assert server.deleter.rewrites <= 2
            assert not left(*names[:20])
            assert left(names[20]) == {"profiles.db"}
            before = server.deleter.rewrites
            monkeypatch.setattr(ProfileStore, "scrub", slow)
            first = asyncio.create_task(server.deleted((ADA[0], names[20])))
            await asyncio.to_thread(going.wait, 10)
            others = [asyncio.create_task(server.deleted((ADA[0], name))) for name in names[21:]]
            await asyncio.sleep(0.05)
            others[-1].cancel()  # whoever leaves does not end it
            assert store.read(ADA[0], names[21]) is not None  # or the rewrite under way would be taken for its own
            await asyncio.wait_for(server.people.held((ADA[0], "ben"), reread=True), 10)  # no thread waits for it
            may_end.set()
            assert (await first).scrubbed
            assert all([(await other).scrubbed for other in others[:-1]])
            await server.close()
            assert server.deleter.rewrites == before + 2
            assert not left(*names)
            assert store.unscrubbed() == 0

    def left(*words: str) -> set[str]:
        return {path.name for path in Path(url).parent.iterdir() for word in words if word.encode() in path.read_bytes()}

    run(work())


def test_a_rewrite_that_a_process_left_behind_is_done_by_the_next(url: str) -> None:
    with open_store(url) as store:
        store.write([Write("default", "marked", 0, consent=store_records.Consent("personalise", "1", 1.7e9))])
        store.delete("default", "marked", scrub=False)
        assert store.unscrubbed() == 1
        with served(Runtime([lane_of()], store)):
            pass
        assert store.unscrubbed() == 0


def test_a_rewrite_that_fails_is_tried_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scrub, full = ProfileStore.scrub, [True, True, False]

    def sometimes(store: ProfileStore) -> None:
        if full.pop(0):
            raise StoreFullError("no room")
        scrub(store)

    async def work() -> None:
        with open_store(url) as store:
            server = Runtime([lane_of()], store)
            await server.agreed(ADA, Consent(purpose="personalise", text_version="1", granted=True, at=1.7e9))
            assert (await server.deleted(ADA)).scrubbed is False
            assert store.unscrubbed() == 1
            async with asyncio.timeout(10):
                while store.unscrubbed():
                    await asyncio.sleep(0.01)
            await server.close()

    monkeypatch.setattr(ProfileStore, "scrub", sometimes)
    monkeypatch.setattr(deleting, "RETRY", 0.01)
    run(work())
    assert full == []


def test_the_log_says_once_that_deletions_by_others_cannot_be_seen(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, answers, asleep = io.StringIO(), [0, StoreBusyError("ada"), StoreBusyError("ada"), 0, 0], asyncio.sleep

    def deletions(store: ProfileStore) -> int:
        found = answers.pop(0) if answers else 0
        if isinstance(found, StoreBusyError):
            raise found
        return found

    monkeypatch.setattr(ProfileStore, "deletions", deletions)
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: asleep(0))
    with open_store(url) as store, served(Runtime([lane_of()], store), log=Log(lines)):
        until = time.monotonic() + 10
        while answers and time.monotonic() < until:
            time.sleep(0.005)
    said = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [(line["event"], line["level"]) for line in said] == [
        ("deletions by others cannot be seen", "error"),
        ("deletions by others are seen again", "info"),
    ]
    assert said[0]["error"].startswith("palate.errors.StoreBusyError")
    assert "ada" not in lines.getvalue()


def test_an_explanation_and_an_axis_turned_by_hand(url: str) -> None:
    data = palate.synthetic(12, 8, seed=0).pairs
    lane = lane_of_sample(data)
    assert lane.explainer is not None
    texts = [text.response for text in data.texts if text.prompt == data.texts[0].prompt]
    with open_store(url) as store, served(Runtime([lane], store)) as client:
        assert client.get("/v1/users/ada/explain").status_code == 404
        agree(client)
        give(client, {"kind": "choice", "prompt": data.texts[0].prompt_text, "chosen": texts[0], "rejected": texts[1]})
        told = client.get("/v1/users/ada/explain").json()
        made = Letters().embed(PairSet.from_choices([Choice("ada", data.texts[0].prompt, texts[0], texts[1])]))
        live = lane.population.start("ada").update(made)
        assert told["label"] == lane.explainer.explain(live).label
        worth = {one["axis"]: one["worth"] for one in told["likings"]}
        axis = max(worth, key=lambda name: abs(worth[name]))
        before = rewards(client)
        for _ in range(2):  # under one key, so that it is done once, and not twice as far
            done = client.patch(f"/v1/users/ada/axes/{axis}", json={"by": -1.0}, headers={"Idempotency-Key": "down"})
            assert done.json()["event_ids"] == [f"axis:{axis.replace(' ', '-')}"], done.text
        assert done.headers["Idempotent-Replayed"] == "true"
        assert client.get("/v1/users/ada").json()["n_events"] == 2
        after = {one["axis"]: one for one in client.get("/v1/users/ada/explain").json()["likings"]}[axis]
        assert after["worth"] == pytest.approx(worth[axis] - after["people_std"], abs=0.1 * after["people_std"])
        give(client, {"kind": "undo", "of": done.json()["event_ids"][0]})
        assert rewards(client) == pytest.approx(before, abs=1e-6)
        assert client.patch("/v1/users/ada/axes/sorcery", json={"to": 0.0}).json()["code"] == "unknown_axis"
        for wrong in ({}, {"to": 0.0, "softness": 1e-9}):
            assert client.patch(f"/v1/users/ada/axes/{axis}", json=wrong).status_code == 422
        hard = [client.patch(f"/v1/users/ada/axes/{name}", json={"to": 100.0, "softness": HARD}) for name in worth]
        assert {one.status_code for one in hard} == {200}  # all of them at once, although they cannot all be
        assert np.isfinite(rewards(client)).all()
        personal = client.post("/v1/users/ada/score", json={"prompt": PROMPT, "candidates": TEXTS, "at_least": 0.5})
        assert personal.status_code == 422  # no floor was given
    floored = dataclasses.replace(Floor.fit(lane.scorer.model, Letters().embed(data)), share=np.eye(6)[0])
    for kind, believed in ((floored, False), (floored.with_share(np.eye(6)[4]), True)):
        other = Lane("m", lane.scorer, lane.population, reading=lane.reading, floor=kind, room=Room(max_wait=0.0))
        with open_store(url) as store, served(Runtime([other], store)) as client:
            body = {"prompt": PROMPT, "candidates": TEXTS, "at_least": 0.5}
            found = client.post("/v1/users/ada/score", json=body).json()
            assert found["personal"] is believed
            assert (found["rewards"] == pytest.approx(oracle([]).tolist())) is not believed


def test_two_steps_along_an_axis_at_once_are_two(url: str) -> None:
    lane = lane_of_sample(palate.synthetic(12, 8, seed=0).pairs)
    axis = lane.explains().axes[0]

    async def work() -> None:
        with open_store(url) as store:
            server = Runtime([lane], store)
            await server.agreed(ADA, Consent(purpose="personalise", text_version="1", granted=True, at=1.7e9))
            over = httpx.ASGITransport(create_app(server))
            async with httpx.AsyncClient(transport=over, base_url="http://127.0.0.1") as client:
                step = {"json": {"by": -1.0, "softness": 0.001}}
                both = await asyncio.gather(*(client.patch(f"/v1/users/ada/axes/{axis}", **step) for _ in range(2)))
            assert sorted(one.json()["version"] for one in both) == [2, 3]
            _, _, life = await server.life(ADA)
            start = lane.population.start("ada")
            first = lane.explains().edited(start, lane.explains().edit(axis, start, by=-1.0, softness=0.001))
            second = lane.explains().edited(first, lane.explains().edit(axis, first, by=-1.0, softness=0.001))
            np.testing.assert_allclose(life.mean, second.mean, atol=1e-6)
            await server.close()

    run(work())


# -- a new model


def test_a_new_model_takes_over_user_by_user_and_can_be_stopped(url: str) -> None:
    choices = [(TEXTS[i], TEXTS[i + 1]) for i in range(4)]
    names = [f"user-{i}" for i in range(5)]
    with open_store(url) as store, served(Runtime([lane_of("old")], store)) as client:
        for name in names:
            agree(client, name)
            give(client, *(chosen(*choice) for choice in choices), user_id=name)
    with open_store(url) as store:
        runtime = Runtime([lane_of("new", 1), lane_of("old")], store)
        with served(runtime) as client:
            body = {"prompt": PROMPT, "candidates": TEXTS}
            assert client.post("/v1/users/user-0/rank", json=body).json()["model"] == "old"
            np.testing.assert_allclose(rewards(client, "user-0"), oracle(choices), atol=1e-6)
            assert client.get("/v1/users/user-0").json()["models"] == ["old"]
            np.testing.assert_allclose(
                rewards(client, "user-1", model="new"), oracle(choices, 1), atol=1e-6
            )  # when it is asked for
            assert client.post("/v1/users/user-1/rank", json=body).json()["model"] == "new"
            give(client, chosen(TEXTS[4], TEXTS[5]), user_id="user-1")  # learned under both
            assert client.get("/v1/users/user-1").json()["models"] == ["new", "old"]
            assert client.get("/v1/readapt").status_code == 404
            assert client.post("/v1/readapt", json={}).json()["model"] == "new"
            while client.get("/v1/readapt").json()["running"]:
                time.sleep(0.01)
            assert client.get("/v1/readapt").json() | {"reason": None} == {
                "model": "new",
                "running": False,
                "done": 4,
                "failed": 0,
                "reason": None,
            }
            for name in names:
                more = [(TEXTS[4], TEXTS[5])] if name == "user-1" else []
                np.testing.assert_allclose(rewards(client, name), oracle(choices + more, 1), atol=1e-6)
            assert client.post("/v1/users/user-0/rank", json=body | {"model": "older"}).json()["code"] == "unknown_model"
    with open_store(url) as store, served(Runtime([lane_of("third", 2)], store), readapt=True) as client:
        np.testing.assert_allclose(rewards(client, "user-0"), oracle(choices, 2), atol=1e-6)  # alone: learned while asked


def test_what_retention_has_cut_off_is_not_missed(url: str) -> None:
    """The choices before a moment go; an undo of one of them means nothing any more, and a correction speaks for itself."""
    with open_store(url) as store, served(Runtime([lane_of()], store)) as client:
        agree(client)
        give(client, chosen(TEXTS[0], TEXTS[1], event_id="a", at=1e9), chosen(TEXTS[2], TEXTS[3], event_id="b", at=1e9))
        give(client, {"kind": "undo", "of": "a", "at": 1.6e9})
        give(client, {"kind": "correct", "of": "b", "at": 1.6e9, "event": chosen(TEXTS[3], TEXTS[2])})
        give(client, chosen(TEXTS[4], TEXTS[5], at=1.6e9))
        assert store.prune(1.5e9).events == 2
    with open_store(url) as store, served(Runtime([lane_of()], store)) as client:
        np.testing.assert_allclose(rewards(client), oracle([(TEXTS[3], TEXTS[2]), (TEXTS[4], TEXTS[5])]), atol=1e-6)
        give(client, chosen(TEXTS[5], TEXTS[6], at=1.6e9))
        store.prune(1.7e9)
    with open_store(url) as store, served(Runtime([lane_of()], store)) as client:
        np.testing.assert_allclose(rewards(client), oracle([]), atol=1e-9)
        give(client, chosen(TEXTS[0], TEXTS[1]))
        np.testing.assert_allclose(rewards(client), oracle([(TEXTS[0], TEXTS[1])]), atol=1e-6)


def test_a_log_that_a_model_cannot_learn_from_is_not_taken_for_silence(url: str) -> None:
    with open_store(url) as store, served(Runtime([lane_of()], store)) as client:
        agree(client)
        give(client, {"kind": "thumb", "prompt": PROMPT, "response": TEXTS[0], "up": True})
    with open_store(url) as store, served(Runtime([lane_of("new", 1, level=False)], store)) as client:
        answer = client.post("/v1/users/ada/rank", json={"prompt": PROMPT, "candidates": TEXTS})
        assert (answer.status_code, answer.json()["code"]) == (503, "not_learned")
        client.post("/v1/readapt", json={})
        while (progress := client.get("/v1/readapt").json())["running"]:
            time.sleep(0.01)
        assert (progress["done"], progress["failed"]) == (0, 1)
        assert "ordinary response" in progress["reason"]


# -- many at once


def batcher(compute: Callable[[list[Text]], Rows], **options: Any) -> tuple[Batcher, list[list[Text]]]:
    calls: list[list[Text]] = []

    def counted(texts: list[Text]) -> Rows:
        calls.append(texts)
        return compute(texts)

    return Batcher(counted, **options), calls


def lengths(texts: list[Text]) -> Rows:
    if any(text.response == "poison" for text in texts):
        raise DataError("a text that no encoder takes")
    return np.array([[len(text.response)] for text in texts], dtype=float).reshape(len(texts), 1)


def test_texts_of_many_requests_are_encoded_together_and_once() -> None:
    async def work() -> None:
        made, calls = batcher(lengths, max_batch=8, max_wait=0.01)
        texts = [Text("p", "x" * i) for i in range(10)]
        asked = [[texts[i], texts[(i + 3) % 10], texts[i]] for i in range(10)]
        found = await asyncio.gather(*(made.rows(one) for one in asked))
        for one, rows in zip(asked, found, strict=True):
            assert rows[:, 0].tolist() == [len(text.response) for text in one]
        assert sorted(text for call in calls for text in call) == sorted(texts)
        assert [len(call) for call in calls] == [8, 2]
        await made.close()

    run(work())


def test_one_bad_text_harms_only_whoever_sent_it() -> None:
    async def work() -> None:
        made, _ = batcher(lengths, max_wait=0.01)
        good = made.rows([Text("p", "fine")])
        bad = made.rows([Text("p", "good"), Text("p", "poison")])
        found = await asyncio.gather(good, bad, return_exceptions=True)
        assert found[0].tolist() == [[4.0]]
        assert isinstance(found[1], DataError)
        assert len(made) == 0
        await made.close()

    run(work())


def test_what_the_queue_has_no_room_for_is_refused_at_once() -> None:
    async def work() -> None:
        gate = threading.Event()

        def slow(texts: list[Text]) -> Rows:
            gate.wait(10)
            return lengths(texts)

        made, _ = batcher(slow, max_queue=3, max_wait=0.0)
        waiting = asyncio.create_task(made.rows([Text("p", "a"), Text("p", "b"), Text("p", "c")]))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="3 texts wait for the encoder and 1 more"):
            await made.rows([Text("p", "d")])
        same = asyncio.create_task(made.rows([Text("p", "b")]))  # waits for what is on its way already
        await asyncio.sleep(0)
        waiting.cancel()
        gate.set()
        assert (await same).tolist() == [[1.0]]
        await made.close()

    run(work())


def test_a_busy_server_says_so_and_when_to_come_back(url: str) -> None:
    with open_store(url) as store, served(Runtime([lane_of(room=Room(max_queue=3))], store)) as client:
        answer = client.post("/v1/users/ada/rank", json={"prompt": PROMPT, "candidates": TEXTS})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.headers["content-type"] == "application/problem+json"


def test_known_texts_need_no_encoder_and_the_shelf_stays_small(url: str) -> None:
    async def work() -> None:
        lane = lane_of(room=Room(cached_texts=5, max_wait=0.0))
        encoder = lane.scorer.encoder
        assert isinstance(encoder, Letters)
        whole = await lane.rewards(PROMPT, TEXTS)  # more than it holds
        assert len(lane.shelf) == 5
        asked = len(encoder.calls)
        again = await lane.rewards(PROMPT, TEXTS[2:] + TEXTS[2:4])
        assert len(encoder.calls) == asked
        np.testing.assert_array_equal(again.offset, whole.offset[[2, 3, 4, 5, 6, 2, 3]])
        np.testing.assert_array_equal(again.slopes, whole.slopes[[2, 3, 4, 5, 6, 2, 3]])
        await lane.rewards(PROMPT + "?", TEXTS[2:3])
        assert len(encoder.calls) == asked + 1
        await lane.batcher.close()

    run(work())
    shelf = Shelf(2, 3000)
    for i in range(5000):
        shelf.put(i.to_bytes(16, "little"), np.array([i, -i], dtype=float))
    kept = [i.to_bytes(16, "little") for i in range(2000, 5000)]
    found = shelf.find(kept)
    assert found is not None
    assert found[:, 0].tolist() == list(range(2000, 5000))
    assert shelf.find([(1999).to_bytes(16, "little")]) is None
    apart = keys_of("ab", ["c"]) + keys_of("a", ["bc"]) + keys_of((palate.Message("user", "ab"),), ["c"]) + keys_of("", ["abc"])
    assert len(set(apart)) == 4


# -- the schema and the process


def test_every_route_is_described_and_every_example_is_taken(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    ids = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            ids.append(route["operationId"])
            assert route["summary"], path
            assert {"200", "400", "401", "403", "404", "422", "429", "500", "503"} <= set(route["responses"]), (path, method)
            body = route.get("requestBody")
            if body is not None:
                named = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                assert named in schema["components"]["schemas"]
    assert len(set(ids)) == len(ids) >= 28
    tried = 0
    for name, adapter in parsing._bodies.items():
        for example in schema["components"]["schemas"][name].get("examples", ()):
            adapter.validate_json(json.dumps(example))
            tried += 1
    assert tried >= 10
    text = json.dumps(schema)
    named = {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert named <= set(schema["components"]["schemas"])


def test_hostile_bodies_and_ids_are_refused_with_a_reason(client: TestClient) -> None:
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": 1, "candidates": []}',
        b'{"prompt": "a", "candidates": ["b"], "more": 1}',
    ):
        answer = client.post("/v1/users/ada/rank", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422)
        assert answer.json()["detail"]
    half = client.post(
        "/v1/users/ada/rank", content=rb'{"prompt": "\ud800", "candidates": ["b"]}', headers={"content-type": "application/json"}
    )
    assert half.status_code == 400
    for user_id in ("a%00b", "%2e%2e", "a%2Fb", "x" * 257, "%ff"):
        assert client.post(f"/v1/users/{user_id}/rank", json={"prompt": "a", "candidates": ["b"]}).status_code in (400, 422), (
            user_id
        )
    assert client.post("/pooling", json={"input": "a"}, headers={"X-Palate-User": b"\xc3\xa9"}).status_code == 422
    ok = client.post("/v1/users/zo%C3%AB ☃/rank", json={"prompt": "", "candidates": [""]})
    assert ok.json()["user_id"] == "zoë ☃"


def test_the_short_way_answers_as_the_framework_does(tmp_path: Path) -> None:
    """Every request in order to a service with `Direct` routes and to one without: status, body, headers and numbers agree."""
    body = {"prompt": PROMPT, "candidates": TEXTS}
    first, again = chosen(*TEXTS[:2], event_id="a"), chosen(*TEXTS[1:3], event_id="b")
    keyed = {"Idempotency-Key": "click-1"}
    (may, one), (may_not, other) = mint(), mint()
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "ada/feedback", {"json": first}),  # no consent
        ("PUT", "ada/consent", {"json": {"purpose": "personalise", "text_version": "1", "granted": True, "at": 1.7e9}}),
        *[("POST", "ada/feedback", {"json": given, "headers": keyed}) for given in (first, first, again)],
        ("POST", "ada/feedback", {"json": again}),
        ("POST", "ada/feedback", {"json": again}),  # its id is taken
        (
            "POST",
            "ada/feedback",
            {"json": {"events": [chosen(*TEXTS[2:4], event_id="c"), {"kind": "undo", "of": "a", "event_id": "d"}]}},
        ),
        ("POST", "ada/feedback", {"json": {"kind": "undo", "of": "nothing"}}),
        ("POST", "ada/feedback", {"json": {"kind": "shout"}}),
        *[("POST", "ada/feedback", {"json": again, "headers": {"Idempotency-Key": key}}) for key in ("", "two words", "k" * 257)],
        *[("POST", f"{who}/rank", {"json": body}) for who in ("ada", "nobody", "a" * 257, "%0a", "a%2Fb", "%F0%9F%A6%8A", "")],
        *[("POST", "ada/rank", {"json": body | more}) for more in ({"top_n": 2}, {"return_candidates": True}, {"top_n": 0})],
        *[("POST", "ada/rank", {"json": body | more}) for more in ({"model": "m"}, {"model": "x"}, {"at_least": 0.9}, {"x": 1})],
        *[("POST", "ada/rank?model=x", {"content": text}) for text in (b"", b"{", b"[]", b'{"prompt": "a", "candidates": []}')],
        ("POST", "ada/rank", {"json": body, "headers": {"Content-Type": "text/plain"}}),
        ("POST", "ada/rank", {"json": body | {"candidates": [*TEXTS, "x" * 90_000, "y" * 90_000, "z" * 90_000]}}),
        ("POST", "ada/rank/", {"json": body}),
        *[(method, "ada/rank", {}) for method in ("GET", "HEAD", "OPTIONS", "PUT")],
        *[("POST", f"ada/{route}", {"json": body, "headers": {"Authorization": "no"}}) for route in ("rank", "feedback")],
        ("POST", "ada/rank", {"json": body, "headers": {"Authorization": f"Bearer {may_not}"}}),
    ]
    seen: list[list[Any]] = []
    for short in (True, False):
        with open_store(str(tmp_path / f"{short}.db")) as store:
            metrics = Metrics()
            store.keys.add(one, "acme", ("rank", "feedback", "users"), "all")
            store.keys.add(other, "acme", ("users",), "some")
            app = create_app(Runtime([lane_of()], store), metrics=metrics, keys=KeyRing(store.keys))
            if not short:
                app.router.routes[:] = [route for route in app.router.routes if not isinstance(route, Direct)]
            with TestClient(app, base_url="http://127.0.0.1", follow_redirects=False) as client:
                answers = []
                for method, path, given in asked:
                    sent = {"Content-Type": "application/json", "X-Request-ID": "r", "Authorization": f"Bearer {may}"}
                    sent |= given.get("headers", {})
                    answer = client.request(method, f"/v1/users/{path}", **given | {"headers": sent})
                    answers.append((method, path, answer.status_code, sorted(answer.headers.items()), answer.content))
            counted = [line for line in metrics.render()[0].decode().splitlines() if line.startswith("palate_requests_total")]
            seen.append([*answers, *sorted(counted)])
    assert len(seen[0]) == len(seen[1]) > len(asked)
    for one, other in zip(*seen, strict=True):
        assert one == other
    assert {200, 400, 401, 403, 404, 405, 409, 415, 422} <= {answer[2] for answer in seen[0][: len(asked)]}


def test_models_that_cannot_be_served_are_refused(url: str) -> None:
    with open_store(url) as store:
        with pytest.raises(DataError, match="0 models with 0 names"):
            Runtime([], store)
        with pytest.raises(DataError, match="2 models with 1 names"):
            Runtime([lane_of("a"), lane_of("a", 1)], store)
    scorer = palate.Scorer(Letters(), model_of())
    scorer.model.reads_prompts = True
    with pytest.raises(DataError, match="no living profiles"):
        Lane("m", scorer, Population.of(model_of()))


def test_where_a_server_may_listen(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        running.check_address(host, keys=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(DataError, match="no API key"):
            running.check_address(host, keys=False)
        running.check_address(host, keys=True)
    with pytest.raises(DataError, match="belong together"):
        running.check_tls(tmp_path, None)
    with pytest.raises(DataError, match="which is no file"):
        running.check_tls(tmp_path, tmp_path)
    garbled = tmp_path / "garbled.pem"
    garbled.write_text("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    with pytest.raises(DataError, match="no certificate and its key"):
        running.check_tls(garbled, garbled)


def test_the_command_refuses_what_cannot_be(palate_command: Callable[..., Any], tmp_path: Path) -> None:
    assert "expected a MODEL, or --demo" in palate_command("serve").err
    assert palate_command("serve", "m", "--demo").code == 2
    done = palate_command("serve", tmp_path, "--host", "0.0.0.0", "--store", tmp_path / "p.db")
    assert (done.code, "no API key" in done.err) == (2, True)


def test_revoking_the_last_key_opens_nothing(
    palate_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    with open_store(url) as store:
        store.keys.revoke(store.keys.add(b"k" * 32, "acme", ("users",), "the only one").id)
    seen: list[int] = []

    def ask(app: Any, **_: object) -> None:
        with TestClient(app, base_url="http://127.0.0.1") as client:
            seen.extend(client.get(path).status_code for path in ("/v1/users", "/health"))

    monkeypatch.setattr(running, "run", ask)
    monkeypatch.setattr(running, "leave_on_term", lambda: None)
    monkeypatch.setattr(serve_cli, "_demo", lambda _: [lane_of()])
    done = palate_command("serve", "--demo", "--store", url)
    assert (done.code, seen) == (0, [401, 200]), done.err
    assert "no API keys" not in done.err


@pytest.mark.slow
def test_the_demo_prints_a_line_that_works(palate_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of `palate serve --demo` but the socket: what it prints is asked of the application that it would serve."""
    told: dict[str, Any] = {}

    def ask(app: Any, *, host: str, port: int, **_: object) -> None:
        with TestClient(app, base_url=f"http://{host}:{port}") as client:
            told["models"] = [one["id"] for one in client.get("/v1/models").json()["data"]]
            agree(client)
            body = {"prompt": "How?", "candidates": TEXTS, "at_least": 0.5}
            told["found"] = client.post("/v1/users/ada/rank", json=body).json()
            give(client, {"kind": "thumb", "prompt": "How?", "response": TEXTS[0], "up": True})
            told["axes"] = len(client.get("/v1/users/ada/explain").json()["likings"])

    monkeypatch.setattr(running, "run", ask)
    monkeypatch.setattr(running, "leave_on_term", lambda: None)
    done = palate_command("serve", "--demo")
    assert done.code == 0, done.err
    words = shlex.split(done.out)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/users/ada/rank"]
    assert words[2:4] == ["-H", "content-type: application/json"]
    RankRequest.model_validate_json(words[5])
    assert (told["models"], len(told["found"]["results"])) == (["demo"], len(TEXTS))
    assert told["axes"] > 5
    assert "no API keys" in done.err


@pytest.mark.slow
@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_terminated_server_answers_what_it_began_and_loses_nothing(tmp_path: Path) -> None:
    """SIGTERM in the middle of feedback by six clients: the process ends well, and what was acknowledged is there once."""
    data = palate.synthetic(12, 8, seed=0)
    encoder = palate.load_encoder("style")
    model = palate.fit(encoder.embed(data.pairs), palate.Hierarchical(n_bases=2, bend=0, types=(), kappa=1.0))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "encoder.json").write_text(json.dumps(encoder.state()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "palate", "serve", "model", "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    acknowledged: list[tuple[str, str]] = []

    def asked(connection: http.client.HTTPConnection, method: str, path: str, body: Any) -> int:
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status

    def client(user_id: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        record = {"purpose": "personalise", "text_version": "1", "granted": True, "at": 1e9}
        try:
            assert asked(connection, "PUT", f"/v1/users/{user_id}/consent", record) == 200
            for turn in range(10**6):
                event = chosen(TEXTS[turn % 6], TEXTS[turn % 6 + 1], event_id=f"e{turn}")
                if asked(connection, "POST", f"/v1/users/{user_id}/feedback", event) == 200:
                    acknowledged.append((user_id, f"e{turn}"))
        except (OSError, http.client.HTTPException):
            return
        finally:
            connection.close()

    try:
        until = time.monotonic() + 60
        while True:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        threads = [threading.Thread(target=client, args=(f"user-{i}",)) for i in range(6)]
        for thread in threads:
            thread.start()
        while len(acknowledged) < 30 and time.monotonic() < until:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        for thread in threads:
            thread.join(30)
    finally:
        server.kill()
        server.wait()
    assert len(acknowledged) >= 30
    with open_store(str(tmp_path / "profiles.db")) as store:
        logs = {f"user-{i}": [event.event_id for event in store.events("default", f"user-{i}")] for i in range(6)}
        assert all(logs[user_id].count(event_id) == 1 for user_id, event_id in acknowledged)
        for user_id, log in logs.items():
            user = store.read("default", user_id)
            assert user is not None
            state = user.states[model.fingerprint()]
            assert (state.through, Population.of(model).from_bytes(state.blob).event_ids) == (user.last, tuple(log))


def test_weights_age_where_the_population_forgets(url: str) -> None:
    async def work() -> None:
        model = model_of()
        scorer = palate.Scorer(Letters(), model)
        with open_store(url) as store:
            far: list[float] = []
            for half_life in (None, 3600.0):
                lane = Lane("m", scorer, Population.of(model, half_life=half_life), room=Room(max_wait=0.0))
                server = Runtime([lane], store)
                who = ("default", f"{half_life}")
                await server.agreed(who, Consent(purpose="personalise", text_version="1", granted=True, at=1.7e9))
                day_ago = time.time() - 86400
                events = [parse_feedback(chosen(TEXTS[i], TEXTS[i + 1], at=day_ago)) for i in range(6)]
                await server.feedback(who, events)
                person = await server.person(who)
                assert model.prior is not None
                far.append(float(np.abs(person.weights - model.prior.mean.numpy()).max()))
                await server.close()
            assert far[1] < 1e-4 < 0.1 < far[0]  # 24 half-lives

    run(work())


@pytest.mark.slow
@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_killed_server_loses_nothing_it_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times kill -9 in the middle of it; fifty by hand (`python -m benchmarks.kill_server`)."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    from benchmarks import kill_server

    url, rng = str(tmp_path / "profiles.db"), np.random.default_rng(0)
    place = kill_server.world()
    writers = [kill_server.Writer(n, np.random.default_rng([0, n])) for n in range(4)]
    told = [kill_server.trial(place, url, writers, rng) for _ in range(3)]
    assert kill_server.faults(place, url, writers) == []
    assert sum(told) > 0
