"""What people said about single responses, as pairs: by hand, and as properties."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.data.feedback import Ranking, Rating, Thumb, Vote, from_rankings, from_ratings, from_thumbs, from_votes
from palate.data.pairs import Choice, PairSet
from palate.errors import DataError


def short(choices: list[Choice]) -> list[tuple[str, str]]:
    return [(choice.chosen, "~" + choice.rejected if choice.tie else choice.rejected) for choice in choices]


RATINGS = [
    Rating("ana", "P", "a", 1, timestamp=4.0, conversation_id="k"),
    Rating("ana", "P", "b", 4, timestamp=3.0, conversation_id="k"),
    Rating("ana", "P", "c", 4, conversation_id="m"),
    Rating("ana", "Q", "a", 5),
    Rating("ben", "P", "a", 2),
    Rating("ben", "P", "b", 1),
]


def test_ratings() -> None:
    choices = from_ratings(RATINGS)
    assert short(choices) == [("b", "a"), ("c", "a"), ("a", "b")]
    assert [choice.margin for choice in choices] == [3, 3, 1]
    assert [choice.user_id for choice in choices] == ["ana", "ana", "ben"]
    assert choices[0].timestamp == 4.0
    assert [choice.conversation_id for choice in choices] == ["k", None, None]
    assert short(from_ratings(RATINGS, ties=True)) == [("b", "a"), ("c", "a"), ("b", "~c"), ("a", "b")]
    assert short(from_ratings(RATINGS, by_conversation=True)) == [("b", "a"), ("a", "b")]
    assert [choice.weight for choice in from_ratings(RATINGS, per_event=True)] == [0.5, 0.5, 1]
    assert short(from_ratings([*RATINGS, Rating("ana", "P", "a", 9)])) == [("a", "b"), ("a", "c"), ("a", "b")]  # a changed mind


def test_votes_and_thumbs() -> None:
    votes = [Vote("ana", "", text, vote) for text, vote in zip("abcde", (1, -1, 0, -1, 1), strict=True)]
    assert short(from_votes(votes)) == [("a", "b"), ("a", "d"), ("e", "b"), ("e", "d")]
    assert all(choice.margin is None and choice.weight == 1 for choice in from_votes(votes))
    assert [choice.weight for choice in from_votes(votes, per_event=True)] == [0.25] * 4
    thumbs = [
        Thumb("ana", "P", "a", False),
        Thumb("ana", "P", "b", True),
        Thumb("ana", "Q", "c", False),
        Thumb("ben", "P", "d", True),
    ]
    assert short(from_thumbs(thumbs)) == [("b", "a")]
    assert from_thumbs([thumbs[0], Thumb("ana", "P", "a", True), thumbs[1]]) == []


def test_rankings() -> None:
    ranking = Ranking("ana", "P", ["a", ["b", "c"], "d"], timestamp=2.0, conversation_id="k")
    assert short(from_rankings([ranking])) == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]
    assert short(from_rankings([ranking], adjacent=True)) == [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]
    with_ties = from_rankings([ranking], ties=True, per_event=True)
    assert short(with_ties)[-1] == ("b", "~c")
    assert [choice.weight for choice in with_ties] == [pytest.approx(1 / 6)] * 6
    assert with_ties[0][7:9] == (2.0, "k")


@given(
    st.lists(st.tuples(st.sampled_from("uv"), st.sampled_from("pq"), st.sampled_from("abcde"), st.integers(-3, 3)), max_size=25)
)
def test_ratings_never_contradict_each_other(events: list[tuple[str, str, str, int]]) -> None:
    ratings = [Rating(*event) for event in events]
    choices = from_ratings(ratings, ties=True)
    last: dict[tuple[str, object, str], int] = {(u, p, r): value for u, p, r, value in events}
    for choice in choices:
        difference = last[choice.user_id, choice.prompt, choice.chosen] - last[choice.user_id, choice.prompt, choice.rejected]
        assert choice.margin == difference >= 0
        assert choice.tie == (difference == 0)
    items = [len([key for key in last if key[:2] == (u, p)]) for u, p in itertools.product("uv", "pq")]
    assert len(choices) == sum(n * (n - 1) // 2 for n in items)
    weights = [choice.weight for choice in from_ratings(ratings, ties=True, per_event=True)]
    assert sum(weights) == pytest.approx(sum(n > 1 for n in items))
    assert len(PairSet.from_choices(choices)) == len(choices)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_ratings([Rating("a", "p", "x", float("nan"))]), "rating 0 is nan"),
        (lambda: from_ratings([Rating("a", "p", "x", True)]), "rating 0 is True"),
        (lambda: from_ratings([Rating("", "p", "x", 1)]), "event 0 has user_id ''"),
        (lambda: from_votes([Vote("a", "p", "x", 1), Vote("a", "p", "y", 2)]), "vote 1 is 2"),
        (lambda: from_votes([Vote("a", "p", " ", 1)]), "event 0 is about ' '"),
        (lambda: from_thumbs([Thumb("a", "p", "x", 1)]), "thumb 0 is 1"),  # type: ignore[arg-type]
        (lambda: from_rankings([Ranking("a", "p", ["x"])]), "ranking 0 has 1 responses"),
        (lambda: from_rankings([Ranking("a", "p", ["x", ["y", "x"]])]), "ranking 0 has 'x' more than once"),
    ],
)
def test_feedback_that_says_nothing_is_refused(call: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()  # type: ignore[operator]
