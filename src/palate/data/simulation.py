"""Simulated users who mix scorers: PersonalLLM's experiment (LoRe, arXiv 2504.14439, section 5.1) on any table of scores.

A user weighs K scorers of texts, w ~ Dirichlet(alpha 1_K), and prefers of two answers to a prompt the one with the higher w . R.
The scorers may be the ten reward models that PersonalLLM publishes with its answers, or planted directions of the features
(`planted.simplex_types`). Everything is said by rows: a choice is the numbers of two rows of one shared table of embeddings, so
that memory is O(texts x D + choices). Neither users x prompts x D (77 GB in the published code) nor users x prompts x answers is
ever formed; rewards are computed for `BLOCK` users at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palate.data.embeddings import Embeddings, as_embeddings
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError

BLOCK = 50  # users whose rewards of all answers are held at a time

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Simulation:
    """Four disjoint sets of choices over one table, and the truth.

    Attributes:
        train, test_seen: choices of the seen users, for fitting and for testing.
        support, test_unseen: choices of the unseen users, for adapting and for testing. The unit of a choice is its prompt.
        weights_seen, weights_unseen: (U, K) w of the users, in the order of `user_ids` of their choices.
        standardised: whether the weights are on standardised or on raw scores; say it beside every figure.
    """

    train: EmbeddedPairs
    test_seen: EmbeddedPairs
    support: EmbeddedPairs
    test_unseen: EmbeddedPairs
    weights_seen: Floats
    weights_unseen: Floats
    standardised: bool


def simulate(
    embeddings: Tensor | NDArray[Any] | Embeddings,
    scores: NDArray[Any],
    alpha: float = 0.001,
    seed: int | np.random.Generator = 0,
    *,
    n_users: tuple[int, int] = (1000, 1000),
    n_test: int = 1000,
    shots: tuple[int, int] = (45, 9),
    standardised: bool = False,
    two_at_random: bool = False,
    temperature: float = 0.0,
) -> Simulation:
    """Users who choose the best answer to a prompt over the worst, by their own weights of the scorers.

    The defaults are LoRe's: raw scores, 1,000 seen and 1,000 unseen users with 45 and 9 training prompts each, all test prompts,
    no noise. PersonalLLM's own users have standardised scores, alpha .01 and two random answers.

    Args:
        embeddings: (M R, D) rows of the answers; answer r to prompt p is row p R + r.
        scores: (M, R, K) what each of K scorers gives each of R answers to M prompts. The last `n_test` prompts are for testing.
        alpha: concentration; .001 is nearly one scorer for each user, large values make everybody alike.
        seed: the same seed gives the same bits. A generator is taken as it stands, and moved on.
        n_users: seen and unseen users.
        n_test: test prompts, each of which every user answers.
        shots: training prompts of a seen and of an unseen user, drawn for each of them.
        standardised: whether each scorer is first given mean 0 and standard deviation 1 over the answers to training prompts.
            Where PersonalLLM's constants are wanted, give scores that were standardised with them.
        two_at_random: compare two different random answers instead of the best and the worst. Equal rewards are a tie.
        temperature: a choice goes the other way with probability sigma(-difference of rewards / temperature); 0 never does.

    Raises:
        DataError: a number outside its range, scores that are not finite or do not fit the embeddings, or a prompt whose answers
            somebody finds all equally good, so that there is no best one.
    Cost: O(U M R K) time; memory for the choices, a block of rewards (`BLOCK` x M x R) and whatever the table takes.
    """
    table, scores = as_embeddings(embeddings), np.asarray(scores, dtype=np.float64)
    if scores.ndim != 3 or min(scores.shape) < 1 or scores.shape[1] < 2:
        raise DataError(f"scores have shape {scores.shape}; expected (prompts, answers, scorers) with at least two answers")
    n_prompts, n_answers, k = scores.shape
    if len(table) != n_prompts * n_answers:
        raise DataError(
            f"{len(table)} embeddings for {n_prompts} prompts x {n_answers} answers; expected {n_prompts * n_answers}"
        )
    if not np.isfinite(scores).all():
        raise DataError("the scores hold NaN or infinite numbers; expected a finite score of every answer by every scorer")
    if not (math.isfinite(alpha) and alpha > 0):
        raise DataError(f"alpha is {alpha}; expected a finite number above 0")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise DataError(f"temperature is {temperature}; expected a finite number of at least 0, 0 for people who never err")
    if min(n_users) < 1:
        raise DataError(f"n_users are {n_users}; expected at least one seen and one unseen user")
    if not 1 <= n_test < n_prompts:
        raise DataError(f"n_test is {n_test}; expected a number from 1 to {n_prompts - 1}: some prompts are to learn from")
    first_test = n_prompts - n_test
    if not all(1 <= n <= first_test for n in shots):
        raise DataError(f"shots are {shots}; expected two numbers between 1 and the {first_test} training prompts")
    if standardised:
        learned = scores[:first_test].reshape(-1, k)
        spread = learned.std(axis=0)
        if not (spread > 0).all():
            raise DataError(f"scorer {int(spread.argmin())} gives every answer the same score; it cannot be standardised")
        scores = (scores - learned.mean(axis=0)) / spread
    rng = np.random.default_rng(seed)
    weights = dirichlet_users(rng, alpha, k, sum(n_users))
    met = _met(rng, first_test, [n for n, count in zip(shots, n_users, strict=True) for _ in range(count)])
    people = _People(scores, weights, two_at_random, temperature, rng)
    tests = np.arange(first_test, n_prompts)
    learning = people.choose(met)
    testing = people.choose([tests] * len(weights))
    seen, unseen = names(*n_users)
    sides = ((0, n_users[0], seen), (n_users[0], len(weights), unseen))
    (train, test_seen), (support, test_unseen) = (
        [_pairs(table, [part[u] for u in range(start, stop)], ids, n_answers) for part in (learning, testing)]
        for start, stop, ids in sides
    )
    return Simulation(
        *(train, test_seen, support, test_unseen), weights[: n_users[0]], weights[n_users[0] :], standardised=standardised
    )


def dirichlet_users(rng: np.random.Generator, alpha: float, k: int, n_users: int) -> Floats:
    """(U, K) draws of Dirichlet(alpha 1_K)."""
    weights: Floats = rng.dirichlet(np.full(k, alpha), size=n_users)
    # Dirichlet with a tiny alpha can underflow to 0/0; such a user is one scorer alone, which is its limit.
    broken = ~np.isfinite(weights).all(axis=1)
    weights[broken] = np.eye(k)[rng.integers(k, size=int(broken.sum()))]
    return weights


def names(n_seen: int, n_unseen: int) -> tuple[list[str], list[str]]:
    """Ids of simulated users, of equal length within a group, so that they sort as they are numbered."""
    seen, unseen = len(str(n_seen - 1)), len(str(n_unseen - 1))
    return [f"seen{u:0{seen}d}" for u in range(n_seen)], [f"unseen{u:0{unseen}d}" for u in range(n_unseen)]


def _met(rng: np.random.Generator, n_prompts: int, counts: list[int]) -> list[Ints]:
    """So many different prompts for each user, at random."""
    out: list[Ints] = []
    for start in range(0, len(counts), BLOCK):  # all users at once would be a number for every user and prompt
        block = counts[start : start + BLOCK]
        order = np.argsort(rng.random((len(block), n_prompts)), axis=1)
        out += [row[:count].copy() for row, count in zip(order, block, strict=True)]
    return out


@dataclass(frozen=True, eq=False)
class _Choices:
    """One user's choices: which answers to which prompts."""

    prompt: Ints
    chosen: Ints  # place among the answers
    rejected: Ints
    tie: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _People:
    """Users with weights (U, K) who are asked about prompts with scores (M, R, K)."""

    scores: Floats
    weights: Floats
    two_at_random: bool
    temperature: float
    rng: np.random.Generator

    def choose(self, prompts: list[Ints]) -> list[_Choices]:
        """Every user's choices between answers to that user's prompts."""
        return [self._choices(user, mine, reward) for user, mine, reward in self._rewards(prompts)]

    def _rewards(self, prompts: list[Ints]) -> Iterator[tuple[int, Ints, Floats]]:
        """Each user with their prompts (n,) and rewards (n, R)."""
        n_prompts, n_answers, k = self.scores.shape
        flat = self.scores.reshape(-1, k)
        for start in range(0, len(self.weights), BLOCK):
            every = (self.weights[start : start + BLOCK] @ flat.T).reshape(-1, n_prompts, n_answers)
            for user, reward in enumerate(every, start):
                yield user, prompts[user], reward[prompts[user]]

    def _choices(self, user: int, prompts: Ints, reward: Floats) -> _Choices:
        place = np.arange(len(prompts))
        if self.two_at_random:
            one = self.rng.integers(reward.shape[1], size=len(prompts))
            other = (one + self.rng.integers(1, reward.shape[1], size=len(prompts))) % reward.shape[1]
            swapped = reward[place, one] < reward[place, other]
            best, worst = np.where(swapped, other, one), np.where(swapped, one, other)
        else:
            best, worst = reward.argmax(axis=1), reward.argmin(axis=1)
        gain = reward[place, best] - reward[place, worst]
        tie = gain == 0
        if not self.two_at_random and tie.any():
            raise DataError(
                f"user {user} finds all answers to prompt {int(prompts[tie][0])} equally good, so none is the best; "
                "leave such prompts out, or compare two_at_random"
            )
        if self.temperature:
            # Beyond 700 the exponential overflows, and nobody errs there.
            errs = self.rng.random(len(gain)) * (1 + np.exp(np.minimum(gain / self.temperature, 700))) < 1
            best, worst = np.where(errs, worst, best), np.where(errs, best, worst)
            tie = np.zeros_like(tie)  # whoever errs tosses a coin where both are equal
        return _Choices(prompts, best, worst, tie)


def _pairs(table: Embeddings, people: list[_Choices], ids: list[str], n_answers: int) -> EmbeddedPairs:
    prompt, chosen, rejected, tie = (
        np.concatenate([getattr(one, name) for one in people]) for name in ("prompt", "chosen", "rejected", "tie")
    )
    users = np.repeat(np.asarray(ids, dtype=object), [len(one.prompt) for one in people])
    first = prompt * n_answers
    rows = torch.from_numpy(first + chosen), torch.from_numpy(first + rejected)
    return EmbeddedPairs(table, *rows, users, tie=tie, unit=prompt)
