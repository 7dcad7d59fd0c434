"""`Scorer`: texts in, one person's rewards out, and nothing mixed up."""

import math

import pytest
import torch

import palate
from palate.adaptation import Profile, adapt, margin_moments, no_pairs
from palate.data.pairs import Message, PairSet
from palate.data.synthetic import Population, synthetic
from palate.encoders import Items
from palate.errors import DataError, MismatchError
from palate.models import pal_fixed
from palate.models.base import RewardModel
from palate.models.factored import BradleyTerry, LoRe
from palate.scoring import Scorer

pytest.importorskip("regex")


@pytest.fixture(scope="module")
def pairs() -> PairSet:
    return synthetic(20, 10, population=Population(groups=2), seed=3).pairs


@pytest.fixture(scope="module")
def style() -> palate.Encoder:
    return palate.load_encoder("style")


@pytest.fixture(scope="module")
def model(pairs: PairSet, style: palate.Encoder) -> RewardModel:
    return palate.fit(style.embed(pairs), palate.Hierarchical(bend=False))


@pytest.fixture(scope="module")
def scorer(style: palate.Encoder, model: RewardModel) -> Scorer:
    return Scorer(style, model)


@pytest.fixture(scope="module")
def profile(pairs: PairSet, style: palate.Encoder, model: RewardModel) -> Profile:
    return adapt(model, style.embed(pairs))["user07"]


def test_equal_responses_are_equal_to_the_last_bit(style: palate.Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pal_fixed, "SURE", -1e9)  # prototypes, whatever held-out users say
    data = style.embed(synthetic(24, 12, population=Population(groups=2), seed=3).pairs)
    own = Scorer(style, palate.fit(data, palate.PAL(2, width=4), seed=1))
    for n in range(1, 9):  # a row at the end of a matrix may be summed in another order
        texts = ["In a paper bag.", *["1. Freeze it.\n2. Toast it!", "Perhaps in a box"] * n, "In a paper bag."]
        rewards = own.score(PROMPT, texts)
        assert float(rewards[0]) == float(rewards[-1])
        place = [row["corpus_id"] for row in own.rank(PROMPT, texts)]
        assert place.index(0) < place.index(len(texts) - 1)


PROMPT = "How do I keep bread fresh?"
TEXTS = ["In a paper bag.", "1. Freeze it.\n2. Toast it!", "Perhaps in a box, perhaps not; who knows?", "In a paper bag."]


def test_differences_of_rewards_are_the_margins_of_adapt(pairs: PairSet, style: palate.Encoder, scorer: Scorer) -> None:
    data = style.embed(pairs)
    profiles = adapt(scorer.model, data)
    for given in (profiles, None):
        expected, _ = margin_moments(scorer.model, data, given)
        for row in (0, 57, 133):
            a, b = pairs.texts[pairs.chosen[row]], pairs.texts[pairs.rejected[row]]
            mine = None if given is None else given[pairs.users[row]]
            reward = scorer.score(a.prompt, [a.response, b.response], mine)
            assert reward.shape == (2,)
            assert float(reward[0] - reward[1]) == pytest.approx(float(expected[row]), abs=1e-4)


def test_std_is_that_of_the_weights(scorer: Scorer, profile: Profile) -> None:
    reward, std = scorer.score_with_std(PROMPT, TEXTS, profile)
    assert reward.tolist() == scorer.score(PROMPT, TEXTS, profile).tolist()
    assert profile.covariance is not None
    generator = torch.Generator().manual_seed(0)
    factor = torch.linalg.cholesky(profile.covariance.double())
    draws = profile.mean + torch.randn(40_000, len(factor), generator=generator, dtype=torch.float64) @ factor.T
    features, place = scorer._features(PROMPT, TEXTS)
    slopes = scorer.model.design(features)[1][place]
    assert std.numpy() == pytest.approx((draws @ slopes.T.double()).std(0).numpy(), rel=0.03)
    crowd, unknown = scorer.score_with_std(PROMPT, TEXTS)
    assert crowd.tolist() == scorer.score(PROMPT, TEXTS).tolist()
    nobody = no_pairs(scorer.model, ["x"])["x"]
    assert unknown.tolist() == pytest.approx(scorer.score_with_std(PROMPT, TEXTS, nobody)[1].tolist(), rel=1e-5)
    assert (unknown > std).all()  # choices have taught something


def test_a_preference_is_what_the_model_states_of_the_margin(pairs: PairSet, style: palate.Encoder, scorer: Scorer) -> None:
    data, profiles = style.embed(pairs), adapt(scorer.model, style.embed(pairs))
    options = scorer.model.options()
    surer = Scorer(style, scorer.model.like(dict(scorer.model.state_dict()), **options, calibration=2.5))
    again = adapt(surer.model, data)
    mean, variance = margin_moments(scorer.model, data, profiles)
    for row in (0, 57, 133):
        a, b = pairs.texts[pairs.chosen[row]], pairs.texts[pairs.rejected[row]]
        damped = float(mean[row]) / math.sqrt(1 + math.pi / 8 * float(variance[row]))
        for scale, use, known in ((1, scorer, profiles), (2.5, surer, again)):
            given = a.prompt, a.response, b.response
            found = use.preference(*given, known[pairs.users[row]])
            assert found == pytest.approx(1 / (1 + math.exp(-scale * damped)), abs=1e-4)
            assert use.preference(a.prompt, b.response, a.response, known[pairs.users[row]]) == pytest.approx(1 - found)
            assert use.preference(*given) == pytest.approx(use.preference(*given, no_pairs(use.model, ["x"])["x"]))
    assert scorer.preference(PROMPT, "The same.", "The same.", profiles["user07"]) == 0.5


def test_rank_is_sorted_stable_and_in_the_shape_of_a_cross_encoder(scorer: Scorer, profile: Profile) -> None:
    rewards = scorer.score(PROMPT, TEXTS, profile).tolist()
    ranked = scorer.rank(PROMPT, TEXTS, profile)
    assert [list(hit) for hit in ranked] == [["corpus_id", "score", "text"]] * 4
    assert [hit["score"] for hit in ranked] == sorted(rewards, reverse=True)
    assert all(hit["text"] == TEXTS[hit["corpus_id"]] and hit["score"] == rewards[hit["corpus_id"]] for hit in ranked)
    places = [hit["corpus_id"] for hit in ranked]
    assert places.index(0) + 1 == places.index(3)  # the same text twice: in the order in which it came
    assert scorer.rank(PROMPT, TEXTS, profile, top_k=2, return_documents=False) == [
        {"corpus_id": hit["corpus_id"], "score": hit["score"]} for hit in ranked[:2]
    ]
    assert len(scorer.rank(PROMPT, TEXTS, top_k=9)) == 4
    assert [hit["corpus_id"] for hit in scorer.rank(PROMPT, ["The same."] * 300)] == list(range(300))


def test_conversations_and_texts_never_seen_are_fine(scorer: Scorer) -> None:
    turns = (Message("user", "Hello"), Message("assistant", "Hi!"), Message("user", "And now?"))
    assert torch.isfinite(scorer.score(turns, ["", "\ud800", "\N{SNOWMAN}" * 5000])).all()


def test_models_without_weights_or_without_uncertainty(pairs: PairSet, style: palate.Encoder) -> None:
    data = style.embed(pairs)
    crowd = Scorer(style, palate.fit(data, BradleyTerry(0.01)))
    reward, std = crowd.score_with_std(PROMPT, TEXTS)
    assert std.tolist() == [0.0] * 4
    assert reward.tolist() == crowd.score(PROMPT, TEXTS).tolist()
    assert crowd.preference(PROMPT, *TEXTS[:2]) == pytest.approx(float(torch.sigmoid(reward[0] - reward[1])))
    simplex = palate.fit(data, LoRe(2))
    mine = adapt(simplex, data)["user07"]
    with pytest.raises(DataError, match="LoRe has no uncertainty"):
        Scorer(style, simplex).score_with_std(PROMPT, TEXTS, mine)


def test_what_does_not_belong_together_is_refused(
    pairs: PairSet, style: palate.Encoder, scorer: Scorer, profile: Profile
) -> None:
    other = palate.fit(style.embed(pairs), LoRe(2))
    for use in (Scorer(style, other).score, Scorer(style, other).rank, Scorer(style, other).score_with_std):
        with pytest.raises(MismatchError, match="adapt again"):
            use(PROMPT, TEXTS, profile)
    items = Items()
    items.embed(pairs)
    with pytest.raises(MismatchError, match="encoder 'items' has fingerprint"):
        Scorer(items, scorer.model)
    with pytest.raises(DataError, match="not fitted"):
        Scorer(style, BradleyTerry())


def test_wrong_arguments_are_named(scorer: Scorer) -> None:
    with pytest.raises(DataError, match=r"one text, 'In a paper bag\.'"):
        scorer.score(PROMPT, TEXTS[0])
    with pytest.raises(DataError, match="response 1 is a NoneType"):
        scorer.score(PROMPT, ["a", None])  # type: ignore[list-item]
    with pytest.raises(DataError, match="0 responses"):
        scorer.rank(PROMPT, [])
    with pytest.raises(DataError, match="prompt is a list"):
        scorer.score([Message("user", "Hi")], TEXTS)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="top_k is 0"):
        scorer.rank(PROMPT, TEXTS, top_k=0)
    assert "Scorer('style'" in repr(scorer)
