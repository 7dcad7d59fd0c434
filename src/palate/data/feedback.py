"""Ratings, votes, thumbs and rankings as choices: what a person said about single responses, turned into pairs of responses.

Only responses to one prompt are compared, by one person. Whoever answers twice about the same response has changed their mind:
the last answer counts. With `per_event` the pairs that came of one event (one ranking; one person's answers to one prompt)
share a weight of 1, so that ordering n items does not count as n (n - 1) / 2 independent choices.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from palate.data.pairs import Choice, Prompt
from palate.errors import DataError


class Rating(NamedTuple):
    """One number that a person gave to one response; higher is better, on any scale of their own."""

    user_id: str
    prompt: Prompt
    response: str
    value: float
    timestamp: float | None = None
    conversation_id: str | None = None


class Vote(NamedTuple):
    """1 agree, 0 pass, -1 disagree; without a prompt ("") all of a user's votes are compared with each other."""

    user_id: str
    prompt: Prompt
    response: str
    vote: int
    timestamp: float | None = None
    conversation_id: str | None = None


class Thumb(NamedTuple):
    """Thumbs up or down."""

    user_id: str
    prompt: Prompt
    response: str
    up: bool
    timestamp: float | None = None
    conversation_id: str | None = None


class Ranking(NamedTuple):
    """Responses from best to worst; each place holds one response, or several that are tied."""

    user_id: str
    prompt: Prompt
    places: Sequence[str | Sequence[str]]
    timestamp: float | None = None
    conversation_id: str | None = None


def _later(first: float | None, second: float | None) -> float | None:
    """A comparison is known once both answers are."""
    known = [time for time in (first, second) if time is not None]
    return max(known) if known else None


def _grouped(events: Iterable[Rating], by_conversation: bool) -> list[list[Rating]]:
    groups: dict[tuple[object, ...], dict[str, Rating]] = {}
    for event in events:
        key = (event.user_id, event.prompt, event.conversation_id if by_conversation else None)
        groups.setdefault(key, {})[event.response] = event
    return [list(group.values()) for group in groups.values()]


def _checked(event: object, i: int, user_id: str, responses: Sequence[str]) -> None:
    if not isinstance(user_id, str) or not user_id.strip():
        raise DataError(f"event {i} has user_id {user_id!r}; expected who gave it: {event!r:.100}")
    for response in responses:
        if not isinstance(response, str) or not response.strip():
            raise DataError(f"event {i} is about {response!r}; expected a response with text in it")


def _weighted(choices: list[Choice], per_event: bool) -> list[Choice]:
    return [choice._replace(weight=1 / len(choices)) for choice in choices] if per_event else choices


def _compared(group: list[Rating], *, margins: bool, ties: bool) -> list[Choice]:
    choices = []
    for i, one in enumerate(group):
        for other in group[i + 1 :]:
            if one.value == other.value and not ties:
                continue
            better, worse = (one, other) if one.value >= other.value else (other, one)
            same = one.conversation_id if one.conversation_id == other.conversation_id else None
            choices.append(
                Choice(
                    user_id=one.user_id,
                    prompt=one.prompt,
                    chosen=better.response,
                    rejected=worse.response,
                    tie=one.value == other.value,
                    margin=better.value - worse.value if margins else None,
                    timestamp=_later(one.timestamp, other.timestamp),
                    conversation_id=same,
                )
            )
    return choices


def from_ratings(
    ratings: Iterable[Rating], *, ties: bool = False, by_conversation: bool = False, per_event: bool = False
) -> list[Choice]:
    """The higher rated over the lower rated response to the same prompt, with the difference as the margin.

    Args:
        ratings: in order of time; of two ratings of one response by one person the later counts.
        ties: equal ratings become ties instead of nothing.
        by_conversation: compare only ratings of the same conversation, as scales drift between sittings.
        per_event: the pairs of one person and prompt share a weight of 1.

    Raises `DataError` for a value that is not a finite number, an empty response or an empty user id.
    """
    checked = []
    for i, rating in enumerate(ratings):
        _checked(rating, i, rating.user_id, [rating.response])
        if isinstance(rating.value, bool) or not isinstance(rating.value, (int, float)) or not math.isfinite(rating.value):
            raise DataError(f"rating {i} is {rating.value!r}; expected a finite number")
        checked.append(rating)
    groups = _grouped(checked, by_conversation)
    return [choice for group in groups for choice in _weighted(_compared(group, margins=True, ties=ties), per_event)]


def from_votes(votes: Iterable[Vote], *, per_event: bool = False) -> list[Choice]:
    """Every response agreed with over every one disagreed with, by the same person on the same prompt; passes say nothing.

    Raises `DataError` for a vote that is not 1, 0 or -1, an empty response or an empty user id.
    """
    answers = []
    for i, vote in enumerate(votes):
        _checked(vote, i, vote.user_id, [vote.response])
        if isinstance(vote.vote, bool) or vote.vote not in (1, 0, -1):
            raise DataError(f"vote {i} is {vote.vote!r}; expected 1 (agree), 0 (pass) or -1 (disagree)")
        answers.append(Rating(vote.user_id, vote.prompt, vote.response, vote.vote, vote.timestamp, vote.conversation_id))
    groups = ([answer for answer in group if answer.value] for group in _grouped(answers, by_conversation=False))
    return [choice for group in groups for choice in _weighted(_compared(group, margins=False, ties=False), per_event)]


def from_thumbs(thumbs: Iterable[Thumb], *, per_event: bool = False) -> list[Choice]:
    """Every response with a thumb up over every one with a thumb down, by the same person on the same prompt.

    Raises `DataError` for a thumb that is neither True nor False, an empty response or an empty user id.
    """
    votes = []
    for i, thumb in enumerate(thumbs):
        if not isinstance(thumb.up, bool):
            raise DataError(f"thumb {i} is {thumb.up!r}; expected True (up) or False (down)")
        vote = 1 if thumb.up else -1
        votes.append(Vote(thumb.user_id, thumb.prompt, thumb.response, vote, thumb.timestamp, thumb.conversation_id))
    return from_votes(votes, per_event=per_event)


def from_rankings(
    rankings: Iterable[Ranking], *, adjacent: bool = False, ties: bool = False, per_event: bool = False
) -> list[Choice]:
    """Every response over every one in a lower place.

    Args:
        rankings: from best to worst.
        adjacent: only over those in the next place: about n pairs of n items instead of n (n - 1) / 2.
        ties: responses in the same place become ties instead of nothing.
        per_event: the pairs of one ranking share a weight of 1.

    Raises `DataError` for fewer than two responses, the same response twice, an empty response or an empty user id.
    """
    choices: list[Choice] = []
    for i, ranking in enumerate(rankings):
        places = [[place] if isinstance(place, str) else list(place) for place in ranking.places]
        listed = [response for place in places for response in place]
        _checked(ranking, i, ranking.user_id, listed)
        if len(listed) < 2:
            raise DataError(f"ranking {i} has {len(listed)} responses; expected at least 2")
        twice = sorted({response for response in listed if listed.count(response) > 1})
        if twice:
            raise DataError(f"ranking {i} has {twice[0][:60]!r} more than once; expected every response in one place")
        places = [place for place in places if place]
        found = [
            (a, b, False)
            for k, place in enumerate(places)
            for a in place
            for low in places[k + 1 :][: 1 if adjacent else None]
            for b in low
        ]
        if ties:
            found += [(a, b, True) for place in places for k, a in enumerate(place) for b in place[k + 1 :]]
        rest = (1.0, None, ranking.timestamp, ranking.conversation_id)
        choices += _weighted([Choice(ranking.user_id, ranking.prompt, a, b, tie, *rest) for a, b, tie in found], per_event)
    return choices
