"""Choices with a planted truth: real sentences, users whose taste is known exactly, and every number needed to check a result.

Used by the demonstration, the documentation and the tests. Because the weights and the style of every text are known, a result
has an oracle: nobody can predict the choices better than the true margins do.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palate.data.pairs import PairSet, Text
from palate.data.phrases import AXES, LEVELS, compose, questions
from palate.errors import DataError

FIRST_DAY = 1_735_689_600.0  # 2025-01-01 00:00 UTC
HISTORY_DAYS = 90.0
CHOICES_PER_CONVERSATION = 2


@dataclass(frozen=True)
class Population:
    """How the users differ, in units of the length of the crowd's weights (which is 1).

    Args:
        groups: number of groups; 1 is a crowd without groups. Group centres add up to zero.
        separation: distance of a group's centre from the crowd's weights.
        spread: root mean square distance of a user from the centre of their group.
        contrarians: share of the users for whom the crowd's part of the weights has the opposite sign.
        drift: share of the users who move, linearly over their history, to the centre of another group.

    Raises:
        DataError: a number outside its range, or drift without a second group.
    """

    groups: int = 3
    separation: float = 1.0
    spread: float = 0.5
    contrarians: float = 0.0
    drift: float = 0.0

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise DataError(f"groups is {self.groups}; expected at least 1 (1 means that there are no groups)")
        for name in ("separation", "spread"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise DataError(f"{name} is {getattr(self, name)}; expected a finite number of at least 0")
        for name in ("contrarians", "drift"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} is {getattr(self, name)}; expected a share of the users, between 0 and 1")
        if self.drift > 0 and self.groups < 2:
            raise DataError(f"drift is {self.drift} with 1 group; expected at least 2 groups, because drift leads to another one")


@dataclass(frozen=True, eq=False)
class SyntheticData:
    """Choices and the truth behind them. Weights are in natural log-odds per standard deviation of an axis.

    Attributes:
        pairs: P choices by U users over N texts, with timestamps and conversation ids.
        axes: names of the A style axes.
        text_axes: (N, A) style of `pairs.texts`, mean 0 and variance 1 per axis in expectation.
        crowd: (A,) weights of the crowd.
        weights: (U, A) weights of every user at the start of the history.
        weights_end: (U, A) the same at its end; different for the users who drift.
        groups: (U,) group of every user (at the start).
        contrarian: (U,) users with the crowd's part negated.
        margin: (P,) true log-odds of the chosen over the rejected text at the time of the choice.
        flipped: (P,) choices that were turned round by `noise`.
    """

    pairs: PairSet
    axes: tuple[str, ...]
    text_axes: NDArray[np.float64]
    crowd: NDArray[np.float64]
    weights: NDArray[np.float64]
    weights_end: NDArray[np.float64]
    groups: NDArray[np.int64]
    contrarian: NDArray[np.bool_]
    margin: NDArray[np.float64]
    flipped: NDArray[np.bool_]

    def margins(self, weights: NDArray[Any]) -> NDArray[np.float64]:
        """(P,) margins under other weights, (A,) for everybody or (U, A): w_u . (a(chosen) - a(rejected)). O(P A)."""
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape not in ((len(self.axes),), self.weights.shape):
            raise DataError(f"weights have shape {weights.shape}; expected ({len(self.axes)},) or {self.weights.shape}")
        difference = self.text_axes[self.pairs.chosen] - self.text_axes[self.pairs.rejected]
        mine = weights if weights.ndim == 1 else weights[self.pairs.user_index]
        return np.asarray((difference * mine).sum(axis=1))

    def oracle_accuracy(self, rows: "NDArray[Any] | slice | None" = None) -> float:
        """Share of the choices (at `rows`) that the true margins predict, a zero counting half: the best that a model can do."""
        return accuracy(self.margin if rows is None else self.margin[rows])

    def crowd_accuracy(self, rows: "NDArray[Any] | slice | None" = None) -> float:
        """The same for the crowd's true weights: what a model without users can reach on average over centred groups."""
        margin = self.margins(self.crowd)
        return accuracy(margin if rows is None else margin[rows])


def accuracy(margin: NDArray[np.float64]) -> float:
    """Share of positive margins, zero counting half. Raises `DataError` for no margins, because a failure is never a number."""
    if not len(margin):
        raise DataError("0 choices have no accuracy; expected at least one")
    return float(((margin > 0) + 0.5 * (margin == 0)).mean())


def synthetic(
    n_users: int = 200,
    n_choices: int = 40,
    *,
    n_prompts: int | None = None,
    n_responses: int = 12,
    population: Population | None = None,
    scale: float = 2.0,
    noise: float = 0.0,
    seed: int = 0,
) -> SyntheticData:
    """Choices of `n_users` users between composed answers, drawn from Bradley-Terry on planted weights.

    P(a preferred over b by u) = sigma(w_u . (a - b)), w_u = scale (+-crowd + centre of the group + own part), |crowd| = 1, and
    then a share `noise` of the choices is turned round. Nobody sees the same pair twice; two choices on one prompt make a
    conversation.

    Args:
        n_users, n_choices: users, and choices of each.
        n_prompts: how many of the prompts are used (all by default).
        n_responses: answers per prompt.
        population: groups, spread, contrarians and drift; `Population()` by default.
        scale: length of the crowd's weights in log-odds; larger means surer choices.
        noise: probability that a choice is turned round, in [0, 0.5].
        seed: the same seed gives the same bits.

    Raises:
        DataError: a number outside its range, or more choices than there are distinct pairs to show.

    Costs about 0.2 s for 200 users x 40 choices; O(users x prompts x responses) memory.
    """
    population = Population() if population is None else population
    book = questions()
    n_prompts = len(book) if n_prompts is None else n_prompts
    _check(n_users, n_choices, n_prompts, n_responses, scale, noise)
    texts_rng, users_rng, pairs_rng, choice_rng = np.random.default_rng(seed).spawn(4)

    texts, text_axes = _texts(n_prompts, n_responses, texts_rng)
    crowd, groups, contrarian, start, end = _users(n_users, population, users_rng)
    left, right, conversation = _shown(n_users, n_choices, n_prompts, n_responses, pairs_rng)

    moment = np.sort(choice_rng.random((n_users, n_choices)), axis=1)
    now = moment[:, :, None]
    weights = scale * ((1 - now) * start[:, None] + now * end[:, None])  # (U, C, A)
    margin = ((text_axes[left] - text_axes[right]) * weights).sum(axis=2)
    prefers_left = choice_rng.random(margin.shape) < 1 / (1 + np.exp(-margin))
    flipped = choice_rng.random(margin.shape) < noise
    takes_left = prefers_left ^ flipped
    chosen, rejected = np.where(takes_left, left, right).ravel(), np.where(takes_left, right, left).ravel()

    width = len(str(n_users - 1))
    user_ids = tuple(f"user{u:0{width}d}" for u in range(n_users))
    n_pairs = n_users * n_choices
    ids = [f"{user}-{c}" for user, row in zip(user_ids, conversation.tolist(), strict=True) for c in row]
    pairs = PairSet(
        texts=texts,
        chosen=chosen,
        rejected=rejected,
        user_ids=user_ids,
        user_index=np.repeat(np.arange(n_users, dtype=np.int64), n_choices),
        tie=np.zeros(n_pairs, dtype=np.bool_),
        weight=np.ones(n_pairs),
        margin=np.full(n_pairs, np.nan),
        timestamp=np.round(FIRST_DAY + moment.ravel() * HISTORY_DAYS * 86_400, 3),
        conversation=np.asarray(ids, dtype=np.object_),
        split=np.full(n_pairs, None, dtype=np.object_),
    )
    return SyntheticData(
        pairs,
        AXES,
        text_axes,
        scale * crowd,
        scale * start,
        scale * end,
        groups,
        contrarian,
        np.where(takes_left, margin, -margin).ravel(),
        flipped.ravel(),
    )


def _check(n_users: int, n_choices: int, n_prompts: int, n_responses: int, scale: float, noise: float) -> None:
    for name, value, least in (("n_users", n_users, 1), ("n_choices", n_choices, 1), ("n_responses", n_responses, 2)):
        if value < least:
            raise DataError(f"{name} is {value}; expected at least {least}")
    if not 1 <= n_prompts <= len(questions()):
        raise DataError(f"n_prompts is {n_prompts}; expected 1 to {len(questions())}, the number of prompts that were written")
    if n_responses > LEVELS ** len(AXES):
        raise DataError(f"n_responses is {n_responses}; expected at most {LEVELS ** len(AXES)}, the number of distinct styles")
    if not (math.isfinite(scale) and scale > 0):
        raise DataError(f"scale is {scale}; expected a finite number above 0")
    if not 0 <= noise <= 0.5:
        raise DataError(f"noise is {noise}; expected a probability between 0 and 0.5 (beyond it the choices mean their opposite)")
    most = n_prompts * (n_responses // 2)
    if n_choices > most:
        raise DataError(
            f"n_choices is {n_choices}; expected at most {most}: {n_prompts} prompts with {n_responses} responses give no more "
            "pairs without showing a text twice to one user. Raise n_prompts or n_responses"
        )


def _texts(n_prompts: int, n_responses: int, rng: np.random.Generator) -> tuple[tuple[Text, ...], NDArray[np.float64]]:
    book = questions()
    picked = np.sort(rng.permutation(len(book))[:n_prompts])
    texts: list[Text] = []
    styles: list[NDArray[np.int64]] = []
    for question in (book[i] for i in picked.tolist()):
        codes = rng.choice(LEVELS ** len(AXES), size=n_responses, replace=False)  # distinct styles, hence distinct texts
        levels = codes[:, None] // LEVELS ** np.arange(len(AXES)) % LEVELS
        for row in levels.tolist():
            texts.append(Text(question["prompt"], compose(question, dict(zip(AXES, row, strict=True)), rng)))
        styles.append(levels)
    spread = math.sqrt((LEVELS**2 - 1) / 12)  # of a uniform level
    return tuple(texts), np.asarray((np.concatenate(styles) - (LEVELS - 1) / 2) / spread, dtype=np.float64)


def _users(
    n_users: int, population: Population, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    a = len(AXES)
    crowd = rng.standard_normal(a)
    crowd /= np.linalg.norm(crowd)
    centres = np.zeros((population.groups, a))
    if population.groups > 1:
        centres = rng.standard_normal((population.groups, a))
        centres -= centres.mean(axis=0)
        # The root mean square length is the separation; scaling each one alone would move their mean away from zero.
        centres *= population.separation / np.sqrt(np.square(centres).sum(axis=1).mean())
    groups = rng.permutation(np.arange(n_users) % population.groups).astype(np.int64)
    own = rng.standard_normal((n_users, a)) * population.spread / math.sqrt(a)
    contrarian = rng.permutation(np.arange(n_users) < round(population.contrarians * n_users))
    drifts = rng.permutation(np.arange(n_users) < round(population.drift * n_users))
    step = rng.integers(1, max(2, population.groups), size=n_users)
    later = np.where(drifts, (groups + step) % population.groups, groups)
    base = np.where(contrarian, -1.0, 1.0)[:, None] * crowd + own
    return crowd, groups, contrarian, base + centres[groups], base + centres[later]


def _shown(
    n_users: int, n_choices: int, n_prompts: int, n_responses: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the two texts, and the conversation, of every choice: three (U, C) arrays."""
    per_prompt = n_responses // 2
    per_conversation = min(CHOICES_PER_CONVERSATION, per_prompt)
    rounds = per_prompt // per_conversation  # conversations that one prompt can carry for one user
    n_used = min(n_prompts, -(-n_choices // per_conversation))
    prompts = np.argsort(rng.random((n_users, n_prompts)), axis=1)[:, :n_used]
    order = np.argsort(rng.random((n_users, n_used, n_responses)), axis=2)

    choice = np.arange(n_choices)
    conversation, within = choice // per_conversation, choice % per_conversation
    place, turn = conversation % n_prompts, conversation // n_prompts
    late = choice >= n_prompts * rounds * per_conversation  # odd leftovers: one more choice on each prompt
    rest = choice - n_prompts * rounds * per_conversation
    place, turn, within = np.where(late, rest % n_prompts, place), np.where(late, rounds, turn), np.where(late, 0, within)
    conversation = np.where(late, n_prompts * rounds + rest, conversation)
    slot = 2 * (turn * per_conversation + within)
    first_row = prompts[:, place] * n_responses
    left, right = first_row + order[:, place, slot], first_row + order[:, place, slot + 1]
    return left, right, np.broadcast_to(conversation, left.shape)
