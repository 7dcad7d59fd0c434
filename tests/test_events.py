"""Feedback: every kind against its likelihood written out another way, what is refused, and what an event does to a profile."""

import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from scipy.special import expit, log_softmax

import palate
from palate import likelihood
from palate.data.pairs import EmbeddedPairs, Message, Prompt
from palate.errors import DataError, MismatchError, ModelFileError
from palate.living import events
from palate.living.consent import Consent, ConsentError, require_consent
from palate.living.events import (
    Choice,
    Copied,
    Correction,
    Edited,
    Picked,
    Ranked,
    Rated,
    Regenerated,
    Thumbed,
    Undo,
    Unsure,
    apply,
    check_time,
    parse_feedback,
)
from palate.living.evidence import Event, Said
from palate.living.exposure import Exposure
from palate.living.population import Population
from palate.living.reading import Level, Reading, Trust
from palate.living.terms import Floats, Rewards, Terms
from palate.living.weighing import learn_trust

KINDS = (Choice, Picked, Ranked, Rated, Thumbed, Edited, Regenerated, Copied, Unsure, Undo, Correction)
FULL = Trust(**dict.fromkeys(Trust.model_fields, 1.0))
LEVEL = Level(offset=0.3, slopes=(0.1, -0.4, 0.2), crowd=(0.5, 0.0, -1.0), model="m", n_texts=9)
W = np.array([0.7, -1.1, 0.4])


def rewards_for(event: Event, seed: int = 0) -> Rewards:
    rng, m = np.random.default_rng(seed), len(event.responses())
    return Rewards(rng.standard_normal(m), rng.standard_normal((m, 3)))


def terms_of(event: Said, exposure: Exposure | None = None, level: Level = LEVEL, **more: Any) -> tuple[Terms, Floats, float]:
    """The terms, and at W the rewards of the responses and of the level."""
    rewards = rewards_for(event)
    terms = event.terms(rewards, exposure=exposure or Exposure(), level=level, trust=FULL, **more)
    terms.check(3)
    return terms, rewards.offset + rewards.slopes @ W, level.offset + float(np.dot(level.slopes, W))


def loss(terms: Terms, w: Floats = W) -> float:
    """As `Terms` has it, term by term."""
    total, u = 0.0, terms.offset + terms.slopes @ w
    for first, last, weight in zip(terms.start, [*terms.start[1:], len(u)], terms.weight, strict=True):
        total -= weight * float(terms.target[first:last] @ log_softmax(u[first:last]))
    return total


# -- likelihoods


@pytest.mark.parametrize("tie", [False, True])
def test_a_choice_is_bradley_terry(tie: bool) -> None:
    terms, (a, b), _ = terms_of(Choice(prompt="", chosen="a", rejected="b", tie=tie, weight=2.5))
    assert loss(terms) == pytest.approx(2.5 * float(likelihood.nll(torch.tensor(a - b), torch.tensor(tie))), rel=1e-6)
    biased, _, _ = terms_of(Choice(prompt="", chosen="a", rejected="b", first="rejected"), Exposure(log_odds=(0.0, -0.8)))
    assert loss(biased) == pytest.approx(float(likelihood.nll(torch.tensor(a - b - 0.8))), rel=1e-6)


def test_a_pick_is_a_logit_over_what_was_looked_at() -> None:
    exposure = Exposure(log_odds=(0.0, -0.5, -0.7), reach=(1.0, 0.6, 0.3))
    event = Picked(prompt="", shown=("a", "b", "c", "d"), picked=1, examined=3)
    terms, u, _ = terms_of(event, exposure)
    assert loss(terms) == pytest.approx(-log_softmax(u[:3] + np.array([0.0, -0.5, -0.7]))[1])
    everything, _, _ = terms_of(event.model_copy(update={"examined": None}))
    assert loss(everything) == pytest.approx(-log_softmax(u)[1])


def test_an_unknown_depth_is_a_mixture_seen_from_near() -> None:
    """Where depths are judged, the terms have the gradient of -log sum_d P(d) P(pick | d); elsewhere they lie above it."""
    exposure = Exposure(log_odds=(0.0, -0.5, -0.7), reach=(1.0, 0.6, 0.3))
    event = Picked(prompt="", shown=("a", "b", "c", "d"), picked=1)
    rewards = rewards_for(event)

    def mixture(w: Floats) -> float:
        u = rewards.offset + rewards.slopes @ w + [0.0, -0.5, -0.7, -0.7]
        depth = {1: 0.4, 2: 0.3, 3: 0.0, 4: 0.3}  # beyond the third position nobody who got there stops
        seen = [share * np.exp(log_softmax(u[:d])[1]) for d, share in depth.items() if d > 1]
        return -float(np.log(sum(seen)))

    terms, _, _ = terms_of(event, exposure, near=W)
    assert terms.weight.sum() == pytest.approx(1)
    np.testing.assert_allclose(approx_fprime(W, lambda w: loss(terms, w)), approx_fprime(W, mixture), atol=1e-5)
    for other in np.random.default_rng(0).normal(size=(20, 3)):
        assert loss(terms, other) - loss(terms, W) >= mixture(other) - mixture(W) - 1e-9
    by_the_crowd, _, _ = terms_of(event, exposure)
    assert loss(by_the_crowd) == pytest.approx(loss(terms_of(event, exposure, near=np.array(LEVEL.crowd))[0]))


@pytest.mark.parametrize(
    ("places", "rest"),
    [(("a", "b", "c", "d"), ()), (("a", ("b", "c"), "d"), ()), ((("a", "b", "c"), "d"), ("e",)), (("a", ("b", "c")), ("d", "e"))],
)
def test_a_ranking_is_plackett_luce_averaged_over_the_orders_of_ties(places: tuple[Any, ...], rest: tuple[str, ...]) -> None:
    event = Ranked(prompt="", places=places, rest=rest)
    terms, u, _ = terms_of(event)
    at = {text: float(value) for text, value in zip(event.responses(), u, strict=True)}
    every = []
    for parts in itertools.product(*(itertools.permutations((place,) if isinstance(place, str) else place) for place in places)):
        order, log = [text for part in parts for text in part], 0.0
        for i in range(len(order)):
            log += log_softmax([at[text] for text in (*order[i:], *rest)])[0]
        every.append(log)
    assert loss(terms) == pytest.approx(-np.mean(every))


def test_a_rating_is_a_continuation_ratio() -> None:
    """Its probabilities over the scale sum to one; an ordinary response has each rating as often as any, or as was seen."""
    seen = [0, 1, 1, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4]
    calibrated = LEVEL.rated(seen * 100, 4)
    for level, expected in ((LEVEL, np.full(5, 0.2)), (calibrated, np.bincount(seen) / len(seen))):
        log = [-loss(terms_of(Rated(prompt="", response="a", value=v, low=1, high=5), level=level)[0]) for v in range(1, 6)]
        assert np.exp(log).sum() == pytest.approx(1)
        event = Rated(prompt="", response="a", value=3, low=1, high=5)
        same = Rewards(np.array([level.offset]), np.array([level.slopes]))
        ordinary = [
            -loss(event.model_copy(update={"value": float(v)}).terms(same, exposure=Exposure(), level=level, trust=FULL))
            for v in range(1, 6)
        ]
        np.testing.assert_allclose(np.exp(ordinary), expected, atol=1e-3)
        _, (u,), base = terms_of(event, level=level)
        passes = expit(u - base + level.passing(4))
        by_hand = [np.log(passes[:v]).sum() + (np.log(1 - passes[v]) if v < 4 else 0) for v in range(5)]
        np.testing.assert_allclose(log, by_hand)
    half = terms_of(Rated(prompt="", response="a", value=3.25, low=1, high=5))[0]
    at = [loss(terms_of(Rated(prompt="", response="a", value=v, low=1, high=5))[0]) for v in (3, 4)]
    assert loss(half) == pytest.approx(0.75 * at[0] + 0.25 * at[1])
    assert Rated(prompt="", response="a", value=37, low=0, high=100).steps() == (3.7, 10)
    with pytest.raises(DataError, match="1 of them outside"):
        LEVEL.rated([5], 4)


def test_what_has_no_rival_is_read_against_the_level() -> None:
    def nll(event: Said) -> tuple[float, Floats, float]:
        terms, u, base = terms_of(event)
        return loss(terms), u, base

    found, (u,), base = nll(Thumbed(prompt="", response="a", up=True))
    assert found == pytest.approx(np.log1p(np.exp(base - u)))
    assert nll(Thumbed(prompt="", response="a", up=False))[0] == pytest.approx(
        nll(Rated(prompt="", response="a", value=0, low=0, high=1))[0]
    )
    assert nll(Copied(prompt="", response="a"))[0] == pytest.approx(found)
    assert nll(Regenerated(prompt="", rejected="a"))[0] == pytest.approx(np.log1p(np.exp(u - base)))
    found, (first, then), base = nll(Regenerated(prompt="", rejected="a", shown_next="b"))
    assert found == pytest.approx(np.log1p(np.exp(first - base)))
    assert nll(Regenerated(prompt="", rejected="a", shown_next="b", kept=True))[0] == pytest.approx(
        np.log1p(np.exp(first - then))
    )
    found, (edited, before), _ = nll(Edited(prompt="", response="a", edited="b"))
    assert found == pytest.approx(np.log1p(np.exp(before - edited)))
    assert Edited(prompt="", response="a", edited="b").responses() == ("b", "a")
    found, u, _ = nll(Copied(prompt="", response="a", others=("b", "c")))
    assert found == pytest.approx(-log_softmax(u)[0])


def test_the_trust_of_a_kind_is_its_weight_and_none_is_no_evidence() -> None:
    for event in (kind.model_validate_json(json.dumps(kind.examples[0])) for kind in KINDS[:8]):
        assert isinstance(event, Said)
        assert event.trusted_as is not None
        rewards, full = rewards_for(event), terms_of(event)[0]
        part = event.terms(rewards, exposure=Exposure(), level=LEVEL, trust=FULL.model_copy(update={event.trusted_as: 0.125}))
        np.testing.assert_allclose(part.weight, full.weight / 8)
        none = event.terms(rewards, exposure=Exposure(), level=LEVEL, trust=FULL.model_copy(update={event.trusted_as: 0.0}))
        assert none.n_terms == 0
        with pytest.raises(DataError, match=r"a row for each of event\.responses"):
            event.terms(Rewards(rewards.offset[1:], rewards.slopes[1:]), exposure=Exposure(), level=LEVEL)


# -- in and out


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_examples_are_read_from_json_and_back(kind: type[Event]) -> None:
    for example in kind.examples:
        event = parse_feedback(json.dumps(example))
        assert type(event) is kind
        assert parse_feedback(example) == parse_feedback(event.model_dump_json()) == event
    schema = kind.model_json_schema()
    own = schema if "properties" in schema else schema["$defs"][kind.__name__]
    assert own["required"][0] == "kind"
    assert own["examples"] == list(kind.examples)
    assert own["additionalProperties"] is False


def test_the_schema_says_what_is_refused_of_lists_and_roles() -> None:
    places = Ranked.model_json_schema()["properties"]["places"]
    assert (places["minItems"], places["maxItems"]) == (1, 32)
    tied = places["items"]["anyOf"][1]
    assert (tied["minItems"], tied["maxItems"]) == (1, 4)
    role = Choice.model_json_schema()["$defs"]["Turn"]["properties"]["role"]
    assert re.search(role["pattern"], "a\x00") is None


def pair(**more: Any) -> dict[str, Any]:
    return {"kind": "choice", "prompt": "Tea?", "chosen": "Secretly yes.", "rejected": "Secretly no."} | more


HOSTILE: list[tuple[Any, str]] = [
    (pair(chosen="Secretly \ud800"), "unicode"),
    (json.dumps(pair(chosen="Secretly \ud800")), "Invalid JSON"),
    ("\ud800", "unicode"),
    (pair(chosen="Secretly\x00"), "NUL"),
    (pair(prompt="Secretly\x00"), "NUL"),
    (pair(chosen=" \n"), "empty or blank"),
    (pair(chosen="Secretly no."), "the same text"),
    (pair(chosen="Secretly" * 5000), "at most 32768"),
    (pair(chosen=["Secretly"]), "valid string"),
    (pair(weight=float("nan")), "finite"),
    (json.dumps(pair(weight=float("inf"))), "finite"),
    (pair(weight=0), "greater than 0"),
    (pair(weight="1"), "valid number"),
    (pair(weight=1e9), "less than or equal to 10"),
    (pair(at=1767225600000), "less than or equal to 4102444800"),
    (pair(at=-1.0), "greater than or equal to 0"),
    (pair(event_id="../x"), "pattern"),
    (pair(tie="yes"), "valid boolean"),
    (pair(user="ada"), "not permitted"),
    (pair(kind="Secretly"), "kind is none of choice, pick"),
    (pair(picked=10**400), "not permitted"),
    (pair(prompt=[{"role": "user"}]), "Field required"),
    ({"prompt": "Tea?"}, "discriminator|kind"),
    ("[]", "object"),
    ("[" * 100_000, "recursion"),
    ("{" + " " * 2**22 + "}", "4194306 bytes"),
    ({"kind": "pick", "prompt": "", "shown": ["a", "b"], "picked": 2}, "picked is 2 of 2 shown"),
    ({"kind": "pick", "prompt": "", "shown": ["a", "b"], "picked": True}, "valid integer"),
    ({"kind": "pick", "prompt": "", "shown": ["a", "b"], "picked": 1, "examined": 1}, "what was picked was looked at"),
    ({"kind": "pick", "prompt": "", "shown": ["a", "b", "a"], "picked": 1}, "responses 0 and 2 are the same text"),
    ({"kind": "pick", "prompt": "", "shown": ["a"], "picked": 0}, "at least 2"),
    ({"kind": "pick", "prompt": "", "shown": [str(i) for i in range(65)], "picked": 0}, "at most 64"),
    ({"kind": "ranking", "prompt": "", "places": ["a"]}, "1 responses are ranked"),
    ({"kind": "ranking", "prompt": "", "places": ["a", ["b", "a"]]}, "the same text"),
    ({"kind": "ranking", "prompt": "", "places": [["a", "b", "c", "d", "e"]]}, "at most 4"),
    ({"kind": "rating", "prompt": "", "response": "a", "value": 6, "low": 1, "high": 5}, "value is 6"),
    ({"kind": "rating", "prompt": "", "response": "a", "value": 1, "low": 1, "high": 1}, "expected low below high"),
    ({"kind": "regenerate", "prompt": "", "rejected": "a", "kept": True}, "without a shown_next"),
    ({"kind": "correct", "of": "a", "event": {"kind": "undo", "of": "a"}}, "kind is none of"),
]


@pytest.mark.parametrize(("data", "reason"), HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])
def test_what_is_hostile_is_refused_with_a_reason_and_without_the_text(data: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as refused:
        parse_feedback(data)
    assert "Secretly" not in str(refused.value)
    assert refused.value.__cause__ is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({name for kind in KINDS for name in kind.model_fields} - {"kind"})


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_anything_else_is_an_event_or_a_data_error(kind: type[Event], change: dict[str, Any]) -> None:
    given = kind.examples[0] | change
    for data in (given, json.dumps(given)):
        try:
            event = parse_feedback(data)
        except DataError:
            continue
        assert parse_feedback(event.model_dump_json()) == event
        if isinstance(event, Said):
            event.terms(rewards_for(event), exposure=Exposure(), level=LEVEL).check(3)


def test_a_time_to_come_is_refused() -> None:
    event = Thumbed(prompt="", response="a", up=True, at=2000.0)
    check_time(event, now=1800.0)
    for said in (event, Correction(of="a", event=event)):
        with pytest.raises(DataError, match="dated 1000 s ahead of now"):
            check_time(said, now=1000.0)


def test_consent_is_asked_for_and_shown() -> None:
    given = Consent(purpose="personalise", text_version="2026-01", granted=True, at=1e9)
    assert require_consent(given, text_version="2026-01", now=1e9) is given
    assert Consent.model_validate_json(given.model_dump_json()) == given
    for record, word in (
        (None, "no consent is recorded"),
        (given.model_copy(update={"granted": False}), "withdrawn"),
        (given.model_copy(update={"purpose": "research"}), "for 'research'; expected one for 'personalise'"),
        (given.model_copy(update={"text_version": "2024"}), "version '2024'"),
        (given.model_copy(update={"at": 2e9}), "ahead of now"),
    ):
        with pytest.raises(ConsentError, match=word):
            require_consent(record, text_version="2026-01", now=1e9)


# -- what an event does to a profile


def planted(k: int = 3) -> palate.Hierarchical:
    """Rewards x . w of embeddings x, w ~ N(0, I)."""
    numbers = {"direction": torch.zeros(k), "bases": torch.eye(k), "share": torch.ones(1), "means": torch.zeros(1, k)}
    model = palate.Hierarchical().like(numbers | {"factors": torch.eye(k)[None]})
    assert isinstance(model, palate.Hierarchical)
    return model


TEXTS = ("a", "b", "c", "d")
TABLE = torch.from_numpy(np.random.default_rng(5).standard_normal((4, 3)))


def rewards_of(prompt: Prompt, texts: tuple[str, ...]) -> Rewards:
    assert prompt == (Message("user", "Hi"),)
    rows = TABLE[[TEXTS.index(text) for text in texts]].numpy()
    return Rewards(np.zeros(len(texts)), rows)


ASKED = {"prompt": [{"role": "user", "content": "Hi"}]}


def test_events_make_the_profile_of_adapt_and_can_be_taken_back() -> None:
    model = planted()
    reading = Reading(level=Level.of(model, TABLE.float()))
    live = Population.of(model).start("ada")
    log: list[dict[str, Any]] = [
        {"kind": "choice", **ASKED, "chosen": "a", "rejected": "b", "event_id": "1"},
        {"kind": "thumb", **ASKED, "response": "d", "up": False, "event_id": "2"},
        {"kind": "unsure", **ASKED, "first": "a", "second": "c", "event_id": "3"},
        {"kind": "choice", **ASKED, "chosen": "c", "rejected": "a", "event_id": "4"},
        {"kind": "undo", "of": "2"},
        {"kind": "correct", "of": "4", "event": {"kind": "choice", **ASKED, "chosen": "c", "rejected": "b", "tie": True}},
    ]
    means = [live.mean]
    for event in log:
        live = apply(live, parse_feedback(event), rewards_of, reading, at=1e9)
        means.append(live.mean)
    assert live.event_ids == ("1", "3", "4")
    assert np.abs(means[2] - means[1]).max() > 0.01  # the thumb
    np.testing.assert_allclose(means[3], means[2])  # I can't say
    pairs = EmbeddedPairs(TABLE, [0, 2], [1, 1], ["ada", "ada"], tie=[False, True])
    np.testing.assert_allclose(live.mean, palate.adapt(model.double(), pairs)["ada"].mean, atol=1e-6)
    with pytest.raises(DataError, match="2"):
        apply(live, parse_feedback({"kind": "undo", "of": "2"}), rewards_of, reading)
    other = reading.model_copy(update={"level": LEVEL})
    with pytest.raises(MismatchError, match="a reading for model m given to a profile"):
        apply(live, parse_feedback(log[0]), rewards_of, other)


def test_a_model_of_the_crowd_alone_takes_feedback_too() -> None:
    numbers = {"direction": torch.ones(3), "bases": torch.zeros(3, 0), "share": torch.ones(1), "means": torch.zeros(1, 0)}
    model = palate.Hierarchical().like(numbers | {"factors": torch.zeros(1, 0, 0)})
    reading = Reading(level=Level.of(model, TABLE.float()))
    live = apply(Population.of(model).start("ada"), Thumbed(**ASKED, response="a", up=True), no_slopes, reading)
    assert (live.mean.shape, live.n_events) == ((0,), 1)
    assert apply(live, Undo(of=live.event_ids[0]), no_slopes, reading).n_events == 0


def no_slopes(prompt: Prompt, texts: tuple[str, ...]) -> Rewards:
    return Rewards(np.zeros(len(texts)), np.zeros((len(texts), 0)))


def test_a_reading_is_kept_beside_its_model(tmp_path: Any) -> None:
    model = planted()
    level = Level.of(model, TABLE.float())
    np.testing.assert_allclose(level.slopes, TABLE.mean(0), atol=1e-6)
    reading = Reading(level=level.rated([0, 1, 1], 1), exposure=Exposure(log_odds=(0.0, -0.1)), trust=Trust(thumb=2))
    model.save_pretrained(tmp_path)
    reading.save(tmp_path)
    assert Reading.load(tmp_path, palate.load_model(tmp_path)) == reading
    with pytest.raises(MismatchError, match="belongs to model"):
        Reading.load(tmp_path, planted(2))
    (tmp_path / "reading.json").write_text('{"level": 3}')
    with pytest.raises(ModelFileError, match="no reading of feedback"):
        Reading.load(tmp_path)
    with pytest.raises(DataError, match="0 texts"):
        Level.of(model, TABLE[:0].float())


# -- how much the weak kinds are worth


def histories(thumbs_mean_it: bool) -> dict[str, list[tuple[Said, Rewards]]]:
    rng = np.random.default_rng(3)
    out: dict[str, list[tuple[Said, Rewards]]] = {}
    for u in range(30):
        w, said = rng.standard_normal(3) * 2, list[tuple[Said, Rewards]]()
        for _ in range(12):
            x = rng.standard_normal((1, 3))
            up = rng.random() < expit(float(x[0] @ w) if thumbs_mean_it else 0.0)
            said.append((Thumbed(prompt="", response="a", up=bool(up)), Rewards(np.zeros(1), x)))
        for _ in range(24):
            x = rng.standard_normal((2, 3))
            x = x if rng.random() < expit(float((x[0] - x[1]) @ w)) else x[::-1]
            said.append((Choice(prompt="", chosen="a", rejected="b"), Rewards(np.zeros(2), x)))
        out[str(u)] = said
    return out


def test_thumbs_are_worth_what_they_say_of_later_choices() -> None:
    model = planted()
    population, reading = Population.of(model), Reading(level=Level.of(model, torch.zeros(1, 3)))
    grid = (0.0, 0.5, 1.0, 2.0)
    honest = learn_trust(histories(True), population, reading, multipliers=grid)
    assert honest.trust.thumb in (1.0, 2.0)  # they were drawn with a weight of 1, which the default of 1/2 undercuts
    (noise,) = learn_trust(histories(False), population, reading, multipliers=grid).tried
    assert (noise.kind, noise.multiplier) == ("thumb", 0.0)
    assert noise.gain > 2 * noise.error > 0
    assert noise.n_users == 30
    assert honest.trust.model_copy(update={"thumb": 0.5}) == reading.trust  # nothing else was there, and nothing else moved
    with pytest.raises(DataError, match=r"rating 0, thumb 10.*at least 20"):
        learn_trust(dict(list(histories(True).items())[:10]), population, reading)
    with pytest.raises(DataError, match=r"kinds \['like'\]"):
        learn_trust({}, population, reading, kinds=["like"])


def test_every_kind_is_said_where_kinds_are_listed() -> None:
    assert tuple(kind.model_fields["kind"].default for kind in KINDS) == events._KINDS
    for kind in events._KINDS:
        assert kind in str(events.__doc__)


def test_the_schema_of_a_response_refuses_all_that_is_blank() -> None:
    """JSON Schema's `\\s` is ECMAScript's, which leaves out five of the characters that are blank to Python."""
    pattern = Choice.model_json_schema()["properties"]["chosen"]["pattern"]
    ecma = {*"\t\n\v\f\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff", *map(chr, range(0x2000, 0x200B))}
    left = {chr(i) for i in range(0x110000) if chr(i).isspace()} - ecma
    assert left == set("\x1c\x1d\x1e\x1f\x85")
    explicit = pattern.replace(r"\s", "".join(sorted(ecma)))
    assert not any(re.search(explicit, blank) for blank in left | ecma)
    assert re.search(explicit, " x ")
