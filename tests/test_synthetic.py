"""The generator says the truth: its choices follow the planted weights, and its texts carry the planted style."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeCV

from palate.data.phrases import AXES, compose, questions
from palate.data.planted import Planted, one_crowd, simplex_types, two_groups
from palate.data.synthetic import HISTORY_DAYS, Population, SyntheticData, synthetic
from palate.encoders import Style
from palate.errors import DataError

EVERYBODY_ALIKE = Population(groups=1, spread=0)


def sigma(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-x)))


def differences(data: SyntheticData) -> NDArray[np.float64]:
    return np.asarray(data.text_axes[data.pairs.chosen] - data.text_axes[data.pairs.rejected])


def style_features(data: SyntheticData) -> NDArray[Any]:
    return np.asarray(Style().encode(data.pairs.texts).rows(torch.arange(len(data.pairs.texts))).numpy())


def test_prompts_are_many_and_each_has_what_an_answer_needs() -> None:
    book = questions()
    assert len({question["prompt"] for question in book}) == len(book) >= 60
    for question in book:
        assert len(question["points"]) == 4
        assert len(question["examples"]) == 2
        for act, reason in question["points"]:
            assert act[0].islower()
            assert act[-1] not in ".!?"
            assert reason.endswith(".")


@pytest.mark.parametrize(
    ("axis", "statistic"),
    [
        ("length", lambda text: len(text.split())),
        ("structure", lambda text: text.count("\n")),
        ("enthusiasm", lambda text: text.count("!")),
        ("curiosity", lambda text: text.count("?")),
        ("examples", lambda text: sum(text.count(cue) for cue in ("xample, ", "instance, ", "illustrate, "))),
    ],
)
def test_a_higher_level_has_more_of_it(axis: str, statistic: Any) -> None:
    neutral = dict.fromkeys(AXES, 0) | {"formality": 1}
    for question in questions()[::7]:
        texts = [compose(question, neutral | {axis: level}, np.random.default_rng(5)) for level in range(3)]
        assert statistic(texts[0]) < statistic(texts[1]) < statistic(texts[2]), texts


def test_formal_answers_have_no_contractions() -> None:
    for question in questions():
        text = compose(question, dict.fromkeys(AXES, 2), np.random.default_rng(0))
        assert "n't" not in text
        assert "'ll" not in text
        assert "{" not in text


def test_style_recovers_the_axes_from_the_words() -> None:
    data = synthetic(n_users=2, n_choices=2, seed=3)
    features, axes, train = style_features(data), data.text_axes, np.arange(768) < 48 * 12  # prompts 48 to 63 are held out
    scaled = (features - features[train].mean(axis=0)) / (features[train].std(axis=0) + 1e-9)
    model = RidgeCV(np.logspace(-1, 4, 12)).fit(scaled[train], axes[train])
    left = np.square(model.predict(scaled[~train]) - axes[~train]).mean(axis=0)
    r2 = 1 - left / axes[~train].var(axis=0)
    assert (r2 > 0.5).all(), dict(zip(AXES, r2.round(2), strict=True))


def test_shapes_ids_and_times() -> None:
    data = synthetic(n_users=11, n_choices=7, n_prompts=5, n_responses=6, seed=1)
    pairs = data.pairs
    assert len(pairs) == 77
    assert len(set(pairs.texts)) == len(pairs.texts) == 30
    assert pairs.user_ids == tuple(sorted(pairs.user_ids))
    assert data.text_axes.shape == (30, 10)
    assert data.weights.shape == (11, 10)
    prompts = pairs.prompt_index
    for user in range(11):
        mine = pairs.user_index == user
        assert mine.sum() == 7
        when = pairs.timestamp[mine]
        assert (np.diff(when) >= 0).all()
        assert when[-1] - when[0] <= HISTORY_DAYS * 86_400
        for conversation in set(pairs.conversation[mine].tolist()):
            assert len(set(prompts[mine & (pairs.conversation == conversation)])) == 1
    assert all(pairs.texts[c].prompt == pairs.texts[r].prompt for c, r in zip(pairs.chosen, pairs.rejected, strict=True))
    assert np.bincount(data.groups).tolist() == [4, 4, 3]


@settings(max_examples=15, deadline=None)
@given(
    n_users=st.integers(1, 4),
    n_prompts=st.integers(1, 5),
    n_responses=st.integers(2, 9),
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 1),
)
def test_nobody_sees_a_text_twice_and_the_most_choices_fit(
    n_users: int, n_prompts: int, n_responses: int, seed: int, share: float
) -> None:
    most = n_prompts * (n_responses // 2)
    n_choices = max(1, math.ceil(share * most))
    data = synthetic(n_users, n_choices, n_prompts=n_prompts, n_responses=n_responses, seed=seed)
    for user in range(n_users):
        mine = data.pairs.user_index == user
        shown = np.concatenate([data.pairs.chosen[mine], data.pairs.rejected[mine]])
        assert len(set(shown.tolist())) == 2 * n_choices
    assert np.isfinite(data.margin).all()


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_choices_follow_bradley_terry(noise: float) -> None:
    data = synthetic(500, 40, noise=noise, scale=1.3, seed=4)
    sure = sigma(np.abs(data.margin))
    expected = float(((1 - noise) * sure + noise * (1 - sure)).mean())
    assert data.oracle_accuracy() == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(20_000))
    assert data.flipped.mean() == pytest.approx(noise, abs=4 * math.sqrt(noise * (1 - noise) / 20_000))
    assert data.crowd_accuracy() < data.oracle_accuracy() - 0.05


def test_the_margin_is_the_weighted_difference_of_styles() -> None:
    data = synthetic(3, 5, n_prompts=4, seed=2)
    for p in range(len(data.pairs)):
        by_hand = sum(
            data.weights[data.pairs.user_index[p], a]
            * (data.text_axes[data.pairs.chosen[p], a] - data.text_axes[data.pairs.rejected[p], a])
            for a in range(10)
        )
        assert data.margin[p] == pytest.approx(by_hand, abs=1e-12)
    np.testing.assert_allclose(data.margins(data.weights), data.margin, atol=1e-12)
    with pytest.raises(DataError, match=r"shape \(10, 3\); expected \(10,\) or \(3, 10\)"):
        data.margins(data.weights.T)
    with pytest.raises(DataError, match="0 choices have no accuracy"):
        data.oracle_accuracy(slice(0, 0))


def test_logistic_regression_finds_the_planted_weights() -> None:
    data = synthetic(300, 60, population=EVERYBODY_ALIKE, seed=6)
    assert (data.weights == data.crowd).all()
    assert np.linalg.norm(data.crowd) == pytest.approx(2.0)
    z = differences(data)
    sign = np.where(np.arange(len(z)) % 2, 1.0, -1.0)
    fitted = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8).fit(z * sign[:, None], sign > 0).coef_[0]
    np.testing.assert_allclose(fitted, data.crowd, atol=0.12)


def test_groups_and_spread_have_the_lengths_that_were_asked_for() -> None:
    data = synthetic(3000, 1, n_prompts=2, population=Population(groups=4, separation=1.5, spread=0.3), scale=2.0, seed=0)
    offset = data.weights - data.crowd
    centres = np.stack([offset[data.groups == g].mean(axis=0) for g in range(4)])
    assert np.sqrt(np.square(centres).sum(axis=1).mean()) == pytest.approx(2 * 1.5, rel=0.02)
    assert np.linalg.norm(centres.mean(axis=0)) < 0.05
    own = offset - centres[data.groups]
    assert np.sqrt(np.square(own).sum(axis=1).mean()) == pytest.approx(2 * 0.3, rel=0.03)


def test_contrarians_want_the_opposite() -> None:
    data = synthetic(40, 30, population=Population(groups=1, spread=0, contrarians=0.25), seed=8)
    assert data.contrarian.sum() == 10
    np.testing.assert_array_equal(data.weights[data.contrarian], np.broadcast_to(-data.crowd, (10, 10)))
    theirs = data.contrarian[data.pairs.user_index]
    assert data.crowd_accuracy(theirs) < 0.35
    assert data.crowd_accuracy(~theirs) > 0.65


def test_drift_moves_to_another_centre() -> None:
    still = synthetic(60, 40, population=Population(groups=3, spread=0.2), seed=9)
    np.testing.assert_array_equal(still.weights, still.weights_end)
    data = synthetic(60, 40, population=Population(groups=2, separation=2, spread=0, drift=0.5), seed=9)
    moved = (data.weights != data.weights_end).any(axis=1)
    assert moved.sum() == 30
    for g in range(2):
        there = data.weights[data.groups == 1 - g][0]
        gone = data.weights_end[moved & (data.groups == g)]
        np.testing.assert_allclose(gone, np.broadcast_to(there, gone.shape), atol=1e-12)
    when = (data.pairs.timestamp - data.pairs.timestamp.min()) / (HISTORY_DAYS * 86_400)
    start, drifting = data.margins(data.weights) > 0, moved[data.pairs.user_index]
    assert start[drifting & (when < 0.25)].mean() > start[drifting & (when > 0.75)].mean() + 0.2
    u = int(data.pairs.user_index[np.flatnonzero(drifting)[0]])
    p = np.flatnonzero(data.pairs.user_index == u)[7]
    t = (data.pairs.timestamp[p] - 1_735_689_600) / (90 * 86_400)
    w = (1 - t) * data.weights[u] + t * data.weights_end[u]
    assert data.margin[p] == pytest.approx(float(w @ differences(data)[p]), abs=1e-6)


def test_same_seed_same_bits_whatever_the_hash_seed_and_the_global_state() -> None:
    code = "from palate.data.synthetic import synthetic; print(synthetic(5, 4, seed=12).pairs.fingerprint())"
    source = str(Path(__file__).parents[1] / "src")
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": source},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.strip() == synthetic(5, 4, seed=12).pairs.fingerprint() != synthetic(5, 4, seed=13).pairs.fingerprint()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_users": 0}, "n_users is 0; expected at least 1"),
        ({"n_choices": 0}, "n_choices is 0; expected at least 1"),
        ({"n_prompts": 0}, "n_prompts is 0; expected 1 to"),
        ({"n_prompts": 10_000}, "n_prompts is 10000; expected 1 to"),
        ({"n_responses": 1}, "n_responses is 1; expected at least 2"),
        ({"n_responses": 60_000}, "n_responses is 60000; expected at most 59049"),
        ({"scale": 0.0}, r"scale is 0\.0; expected a finite number above 0"),
        ({"scale": math.inf}, "scale is inf"),
        ({"noise": 0.6}, r"noise is 0\.6; expected a probability between 0 and 0\.5"),
        ({"n_choices": 9, "n_prompts": 2, "n_responses": 8}, "n_choices is 9; expected at most 8"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        synthetic(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 0}, "groups is 0; expected at least 1"),
        ({"separation": -1.0}, r"separation is -1\.0; expected a finite number"),
        ({"spread": math.nan}, "spread is nan; expected a finite number"),
        ({"contrarians": 1.5}, r"contrarians is 1\.5; expected a share"),
        ({"drift": -0.1}, r"drift is -0\.1; expected a share"),
        ({"groups": 1, "drift": 0.2}, r"drift is 0\.2 with 1 group; expected at least 2 groups"),
    ],
)
def test_impossible_populations(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Population(**arguments)


def reward_accuracy(data: Planted, rewards: torch.Tensor) -> float:
    """Accuracy on `test_unseen` of one reward (D,) or one of each user (U, D), from the formed differences."""
    test = data.test_unseen
    mine = rewards if rewards.ndim == 1 else rewards[test.user_index]
    z = test.differences().rows(torch.arange(len(test)))
    return float(((z * mine).sum(dim=1) > 0).float().mean())


def test_two_groups_has_the_known_figures() -> None:
    worlds = [two_groups(seed) for seed in range(3)]
    assert np.mean([world.oracle_unseen for world in worlds]) == pytest.approx(0.788, abs=0.008)
    assert np.mean([world.crowd_unseen for world in worlds]) == pytest.approx(0.681, abs=0.008)
    data = worlds[0]
    assert [len(part) for part in (data.train, data.test_seen, data.support, data.test_unseen)] == [6000, 10_000] * 2
    assert not set(data.train.user_ids) & set(data.support.user_ids)
    assert float(data.crowd @ data.directions[:, 0]) == pytest.approx(0, abs=1e-6)
    both = torch.cat([data.weights_seen, data.weights_unseen])
    assert int((both > 0).sum()) == 200
    rewards = data.crowd + data.weights_unseen @ data.directions.T
    assert reward_accuracy(data, rewards) == pytest.approx(data.oracle_unseen, abs=2e-4)
    rows = [set(torch.cat([part.chosen, part.rejected]).tolist()) for part in (data.train, data.test_seen, data.support)]
    assert sum(map(len, rows)) == len(set().union(*rows))


def test_one_crowd_has_nothing_to_personalise() -> None:
    data = one_crowd(5, n_users=30)
    assert data.directions.shape == (64, 0)
    assert data.oracle_unseen == data.crowd_unseen == pytest.approx(reward_accuracy(data, data.crowd), abs=1e-3)
    assert float(data.crowd.norm()) == pytest.approx(1.065 * math.sqrt(2), rel=1e-5)


def test_simplex_types_chooses_the_best_of_eight_over_the_worst() -> None:
    data = simplex_types(0.1, 3, n_users=7, n_prompts=60, n_test_prompts=40)
    assert [len(part) for part in (data.train, data.test_seen, data.support, data.test_unseen)] == [315, 280, 63, 280]
    np.testing.assert_allclose((data.directions.T @ data.directions).numpy(), np.full((10, 10), 0.5) + np.eye(10) / 2, atol=1e-6)
    np.testing.assert_allclose(data.weights_seen.sum(dim=1).numpy(), 1, atol=1e-6)
    assert (data.oracle_seen, data.oracle_unseen) == (1.0, 1.0)
    scores = data.support.embeddings.project(data.directions).double()
    for p in range(0, 63, 5):  # every choice by hand, from the eight answers of its prompt
        user, chosen, rejected = int(data.support.user_index[p]), int(data.support.chosen[p]), int(data.support.rejected[p])
        eight = slice(chosen // 8 * 8, chosen // 8 * 8 + 8)
        reward = scores[eight] @ data.weights_unseen[user].double()
        assert (int(reward.argmax()), int(reward.argmin())) == (chosen % 8, rejected % 8)
        assert chosen // 8 == rejected // 8 < 60
    assert int(data.test_seen.chosen.min()) >= 60 * 8


def test_simplex_types_crowd_is_as_strong_as_in_the_published_setting() -> None:
    concentrated = simplex_types(0.001, 0, n_users=100, n_prompts=200)
    mixed = simplex_types(0.1, 0, n_users=100, n_prompts=200)
    assert concentrated.crowd_unseen == pytest.approx(0.970, abs=0.01)
    assert mixed.crowd_unseen == pytest.approx(0.991, abs=0.006)
    assert float(concentrated.weights_seen.max(dim=1).values.mean()) > 0.98


def test_a_dirichlet_that_underflows_is_still_a_simplex() -> None:
    data = simplex_types(1e-6, 1, n_users=5, n_prompts=9, n_test_prompts=3, shots=(9, 2))
    np.testing.assert_allclose(data.weights_seen.sum(dim=1).numpy(), 1, atol=1e-6)


def test_planted_worlds_repeat() -> None:
    assert two_groups(4, n_users=3).train.fingerprint() == two_groups(4, n_users=3).train.fingerprint()
    assert two_groups(4, n_users=3).train.fingerprint() != two_groups(5, n_users=3).train.fingerprint()
    small = [simplex_types(1.0, seed, n_users=3, n_prompts=50, n_test_prompts=5).support.fingerprint() for seed in (4, 4, 5)]
    assert small[0] == small[1] != small[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: two_groups(n_users=0), "n_users is 0; expected at least 1"),
        (lambda: two_groups(dim=1), "dim is 1; expected at least 2"),
        (lambda: two_groups(separation=-1), "separation is -1; expected a finite number"),
        (lambda: one_crowd(n_test=0), "n_test is 0; expected at least 1"),
        (lambda: simplex_types(0), "alpha is 0; expected a finite number above 0"),
        (lambda: simplex_types(common=1), "common is 1; expected a correlation"),
        (lambda: simplex_types(dim=10), "dim is 10; expected at least 11"),
        (lambda: simplex_types(n_prompts=40), r"shots are \(45, 9\); expected two numbers between 1 and n_prompts = 40"),
        (lambda: simplex_types(n_test_prompts=0), "n_test_prompts is 0; expected at least 1"),
    ],
)
def test_impossible_worlds(call: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()
