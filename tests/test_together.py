"""Rewards of groups: by hand on three responses, against a flat loop, and the properties that a stated rule has."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from palate.errors import DataError
from palate.living.terms import Rewards
from palate.living.together import Rule, Together, borda, mean, nash, together, worst_off

Floats = NDArray[np.float64]
RULES = [mean, worst_off, nash, borda]
tables = st.integers(1, 4).flatmap(
    lambda m: st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(-5, 5), min_size=n, max_size=n), min_size=m, max_size=m)
    )
)


def of(table: object, rule: Rule) -> Together:
    """The members' rewards (M, n) are given as they are: with a slope for each response, weights are rewards."""
    rewards = np.asarray(table, dtype=np.float64)
    n = rewards.shape[1]
    return together(Rewards(np.zeros(n), np.eye(n)), {f"m{i}": row for i, row in enumerate(rewards)}, np.zeros(n), rule=rule)


def test_three_responses_by_hand() -> None:
    """Values: ada 1, .75, 0; ben 0, .5, 1. The second is nobody's best and the best for both."""
    rewards = [[4, 3, 0], [-1, 0, 1]]
    found = {rule.__name__: of(rewards, rule) for rule in RULES}
    np.testing.assert_allclose(found["mean"].values, [[1, 0.75, 0], [0, 0.5, 1]])
    np.testing.assert_allclose(found["mean"].rewards, [0.5, 0.625, 0.5])
    np.testing.assert_allclose(found["worst_off"].rewards, [0, 0.5, 0])
    np.testing.assert_allclose(found["nash"].rewards, [0, 0.375**0.5, 0])
    np.testing.assert_allclose(found["borda"].rewards, [0.5, 0.5, 0.5])
    assert {name: one.order.tolist() for name, one in found.items()} == {
        "mean": [1, 0, 2],
        "worst_off": [1, 0, 2],
        "nash": [1, 0, 2],
        "borda": [0, 1, 2],
    }
    assert found["mean"].worst_off == ("m1", "m1", "m0")
    assert found["mean"].to_dict()["ranked"][0] == {
        "corpus_id": 1,
        "score": 0.625,
        "values": {"m0": 0.75, "m1": 0.5},
        "worst_off": "m1",
    }


@given(tables)
def test_the_worst_off_rule_is_a_flat_comparison_of_sorted_values(table: list[list[int]]) -> None:
    def value(row: list[int], j: int) -> Fraction:
        return Fraction(1) if max(row) == min(row) else Fraction(row[j] - min(row), max(row) - min(row))

    keys = [sorted(value(row, j) for row in table) for j in range(len(table[0]))]
    assert of(table, worst_off).order.tolist() == sorted(range(len(keys)), key=lambda j: ([-x for x in keys[j]], j))


@pytest.mark.parametrize("rule", RULES)
@given(table=tables)
def test_what_everybody_likes_more_stands_higher(rule: Rule, table: list[list[int]]) -> None:
    place = of(table, rule).order.argsort()
    for a, b in itertools.permutations(range(len(table[0])), 2):
        if all(row[a] >= row[b] for row in table) and any(row[a] > row[b] for row in table):
            assert place[a] < place[b]


@pytest.mark.parametrize("rule", RULES)
@given(table=tables, scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_members_are_alike_and_nobody_gains_by_larger_numbers(
    rule: Rule, table: list[list[int]], scale: float, shift: float
) -> None:
    plain, turned = of(table, rule), of(table[::-1], rule)
    louder = of([[scale * x + shift for x in table[0]], *table[1:]], rule)
    for other in (turned, louder):
        np.testing.assert_allclose(other.rewards, plain.rewards, atol=1e-7)
    assert turned.order.tolist() == plain.order.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_a_group_of_one_is_that_person_and_who_does_not_care_has_no_say(rule: Rule) -> None:
    row = np.random.default_rng(0).standard_normal(9)
    alone, beside = of([row], rule), of([row, np.full(9, 0.3)], rule)
    assert alone.order.tolist() == beside.order.tolist() == np.argsort(-row).tolist()


def test_somebody_unknown_is_the_crowd() -> None:
    rng = np.random.default_rng(1)
    candidates, ada, crowd = Rewards(rng.standard_normal(5), rng.standard_normal((5, 3))), rng.standard_normal(3), np.ones(3)
    found = together(candidates, {"ada": ada, "new": None}, crowd, rule=worst_off)
    same = together(candidates, {"ada": ada, "new": crowd}, crowd, rule=worst_off)
    np.testing.assert_array_equal(found.rewards, same.rewards)
    assert found.order.tolist() == same.order.tolist()
    reward = candidates.offset + candidates.slopes @ crowd
    np.testing.assert_allclose(found.values[1], (reward - reward.min()) / np.ptp(reward), atol=1e-9)


def test_what_cannot_be_is_refused() -> None:
    candidates = Rewards(np.zeros(2), np.ones((2, 3)))
    with pytest.raises(DataError, match="0 members and 2 responses"):
        together(candidates, {}, np.zeros(3))
    with pytest.raises(DataError, match=r"member 'ada' has weights of shape \(2,\); expected \(3,\)"):
        together(candidates, {"ada": np.zeros(2)}, np.zeros(3))
    with pytest.raises(DataError, match="reward of member 'ben' is not finite"):
        together(candidates, {"ada": None, "ben": np.array([0, np.nan, 0])}, np.zeros(3))
